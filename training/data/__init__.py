"""The training data pipeline: image sources, decoding, loading, augmentation and masking."""
