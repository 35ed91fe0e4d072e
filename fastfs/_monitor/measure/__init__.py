"""From captured tensors to numbers on the device: sums over features and parameters, and how far to trust them."""
