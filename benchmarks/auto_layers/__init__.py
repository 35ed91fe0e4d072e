"""Layers that ``layers="auto"`` selects on real models; ``python -m benchmarks.auto_layers`` writes the table."""
