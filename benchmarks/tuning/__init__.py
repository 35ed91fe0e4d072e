"""Versions of the kernel behind `feature_stats`: measured on a GPU, or read without one."""
