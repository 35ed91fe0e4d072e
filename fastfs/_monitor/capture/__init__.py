"""Captures a training step through hooks: features, backward vectors, gradients, and second forwards of the model."""
