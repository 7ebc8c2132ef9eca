"""Compute the features of images. Each image is decoded once and passes through the network once. The package contains
the pipeline, the batcher, the forward pass and the caches."""
