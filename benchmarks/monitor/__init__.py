"""What does `fastfs.Monitor` cost: `python -m benchmarks.monitor`."""
