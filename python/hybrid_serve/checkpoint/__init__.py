"""Model files: where they are, what their headers say, how their tensors read as numpy arrays. Knows no torch."""
