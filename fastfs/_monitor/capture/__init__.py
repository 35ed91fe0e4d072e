"""What happens in a training step, seen through hooks: layers, taps, kept rows, and forwards of the monitor's own."""
