"""From what was captured to numbers: sums over features and parameters, ways to see an update, and their verdict."""
