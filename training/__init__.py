"""DINOv2's self-supervised training: from images to a checkpoint. A training run is a job, not a server.

`training.train.train(config)` runs it; `python -m training` and the `dinov2 train` command call that function.
"""
