"""Helpers shared by several packages: output files, optional dependencies, devices, formatting."""
