"""Executes batches: a model, its KV cache and the sampler on one device. Knows no request, no scheduler, no socket."""
