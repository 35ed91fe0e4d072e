"""From numbers on the device to sinks, without making the device or the training loop wait."""
