"""How fast fastfs is on a machine: timing, inputs, ceilings and contestants, and the command ``fastfs bench``.

The benchmarks of the repository (``benchmarks/``) are built on the same parts.
"""
