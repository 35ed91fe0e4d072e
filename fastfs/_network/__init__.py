"""A model as a function of its parameters: layers, what depends on what, forwards elsewhere, first-order changes."""
