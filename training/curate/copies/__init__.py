"""Copies of images: exact, re-encoded, resized, cropped, mirrored, rotated and recoloured ones."""
