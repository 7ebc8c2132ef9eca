"""Computations on features that the network has already computed: foreground masks, regions of images, and comparisons
of patches."""
