"""Curation: raw images in, a clean, diverse training set without leaks of evaluation images out."""
