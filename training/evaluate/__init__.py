"""Evaluations of a checkpoint, each with a named protocol and plain figures."""
