"""The overhead of `fastfs.Monitor`: `python -m benchmarks.monitor`."""
