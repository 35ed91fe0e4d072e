"""The figures and numbers of the paper, recomputed by ``fastfs reproduce``."""
