"""The monitor: capture of a training step, measurement of what the step did, and the record of it."""
