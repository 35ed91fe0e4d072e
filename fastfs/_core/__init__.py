"""The measurements as dispatcher ops, the checks of their inputs, and the rules of the optimizer op."""
