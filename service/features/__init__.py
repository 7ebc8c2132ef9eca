"""Compute the features of images, with one decode and one forward pass for each image. The modules contain the
pipeline, the batcher and the caches."""
