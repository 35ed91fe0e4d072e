"""Benchmarks of the comparison of runs: what parts first, and what transfers over width and depth."""
