"""Helpers that several packages share: output files, optional dependencies, devices, formatting."""
