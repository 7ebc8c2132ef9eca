"""Log the metrics of a training run, and detect when the run fails."""
