"""Images to crops: sources, decoding, loading, augmentation, masking."""
