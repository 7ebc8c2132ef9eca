"""From images to crops: sources, decoding, loading, augmentation and masking."""
