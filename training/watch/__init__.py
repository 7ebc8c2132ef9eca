"""Logging of a training run, and sentinels that detect when the run fails."""
