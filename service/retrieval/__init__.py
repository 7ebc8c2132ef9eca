"""Parse search requests, compute the vector of each query, query the store, and order the results."""
