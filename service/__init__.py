"""Bytes in, answers out: the REST service over an exported artifact. Loads without torch."""
