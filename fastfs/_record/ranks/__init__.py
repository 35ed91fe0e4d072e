"""What the ranks of a run send, and how one record is made of it."""
