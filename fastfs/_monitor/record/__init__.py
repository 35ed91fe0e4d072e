"""From numbers on the device to records in files: without waiting, and without losing what is due."""
