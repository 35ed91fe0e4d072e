"""Benchmarks of runs of several ranks."""
