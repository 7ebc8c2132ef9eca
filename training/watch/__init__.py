"""Logging of a run, and the sentinels that detect when it fails."""
