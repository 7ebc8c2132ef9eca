"""The data pipeline of training: sources of images, decoding, loading, augmentation and masking."""
