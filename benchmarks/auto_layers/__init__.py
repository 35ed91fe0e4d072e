"""What ``layers="auto"`` picks on real architectures; ``python -m benchmarks.auto_layers`` writes the table."""
