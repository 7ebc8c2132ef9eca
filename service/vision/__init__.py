"""Computations on features that the network has already produced. Nothing here runs the network."""
