"""``bench``: how fast a server, the engine without one, and a start are; flags and JSON keys are vLLM's."""
