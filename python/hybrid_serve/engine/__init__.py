"""The engine process: requests in, steps, columns out."""
