"""Compute foreground masks, the weights of image regions, and comparisons of patches from features that the network has
already computed."""
