"""The demo and the experiments. They import the rest of fastfs, never the reverse."""
