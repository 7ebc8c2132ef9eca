"""Collections of vectors: what is kept, and what is nearest."""
