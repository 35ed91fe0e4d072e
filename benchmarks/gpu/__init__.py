"""The steps of `benchmarks/gpu.sh`: what they run and need, their limits, and where their results go.

Needs only the standard library, so that it can say what is missing.
"""
