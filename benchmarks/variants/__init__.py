"""Versions of the kernel behind `feature_stats`, compiled beside one another: measured on a GPU, or read without one."""
