"""What is recorded during a run, and the sentinels that judge it."""
