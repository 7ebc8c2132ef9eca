"""One decode and one forward pass per image: pipeline, batcher and cache."""
