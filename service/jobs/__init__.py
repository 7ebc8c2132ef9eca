"""Jobs: work that outlives a request, such as a retraining."""
