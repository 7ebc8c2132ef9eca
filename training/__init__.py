"""Train DINOv2 on images without labels, and write a checkpoint.

`training.train.train(config)` starts a training run. `python -m training` and the `dinov2 train` command call that
function.
"""
