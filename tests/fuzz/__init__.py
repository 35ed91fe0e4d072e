"""Generated models and training loops, and the judges that the monitor has to satisfy on them."""
