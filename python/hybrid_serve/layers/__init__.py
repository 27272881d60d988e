"""Building blocks of models over ``ops``: each takes tensors and the batch as arguments; they know no model."""
