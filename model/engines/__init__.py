"""Runtimes behind one protocol, which one serves, and the comparison with the reference."""
