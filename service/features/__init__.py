"""Compute the features of images, with one decode and one forward pass for each image: the pipeline, the batcher and
the cache."""
