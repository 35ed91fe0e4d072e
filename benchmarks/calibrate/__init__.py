"""Calibrated learning rates against a grid of one rate for all; ``python -m benchmarks.calibrate`` writes the table."""
