"""Compares the records of several runs: what they have in common, and what parts first.

It reads the grids of :mod:`fastfs._report.grids`. Needs the extra ``scaling`` (scipy, pandas).
"""
