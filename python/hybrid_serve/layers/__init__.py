"""Building blocks of models over ``ops``: each takes tensors and the batch as arguments; knows no model and no checkpoint."""
