"""The paper's figures and numbers, computed again: ``fastfs reproduce``."""
