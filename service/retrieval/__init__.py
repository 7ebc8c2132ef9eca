"""Search: parse requests, find where each query starts, query the store, and order the results."""
