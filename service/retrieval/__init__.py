"""Search: parse requests, determine the vector of each query, query the store, and order the results."""
