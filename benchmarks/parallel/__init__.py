"""Benchmarks of runs on several ranks."""
