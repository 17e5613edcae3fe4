"""Exact per-sample importance from one forward and one backward pass of a batch."""
