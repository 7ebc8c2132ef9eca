"""Jobs: training, export and other work that takes minutes to days, run by worker processes beside the service."""
