"""The HTTP side of a server: requests in, answers and event streams out. No torch, no socket to the engine."""
