"""Benchmarks: timing, inputs, memory ceilings and baseline implementations, and the command ``fastfs bench``.

The benchmarks of the repository (``benchmarks/``) use the same parts.
"""
