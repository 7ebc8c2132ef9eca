"""Images to checkpoint: DINOv2's self-supervised training. A job, never a server.

`training.train.train(config)` is the whole of it; `python -m training` and the `dinov2 train` command call it.
"""
