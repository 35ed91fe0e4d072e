"""Model internals: layer selection, autograd graph structure, isolated forwards and first-order changes."""
