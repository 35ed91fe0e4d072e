"""The tests: one folder for each part of the package, and what several of them share."""
