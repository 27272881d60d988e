"""What replicas and ranks of one model need to work together."""
