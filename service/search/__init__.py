"""Collections of vectors: storage and nearest-neighbour search."""
