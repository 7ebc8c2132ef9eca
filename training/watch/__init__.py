"""Log the figures of a training run, and detect when the run fails."""
