"""What a checkpoint is worth: evaluations that name their protocol and return plain figures."""
