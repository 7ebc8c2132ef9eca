"""Settings of a training run that takes a few seconds, for crash checks, GPU checks and tests."""

from typing import Any

TINY: dict[str, Any] = {
    "vit": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "layerscale_init": 1.0},
    "global_size": 28,
    "local_size": 14,
    "n_local": 2,
    "cache_size": 32,
    "n_prototypes": 32,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "batch_size": 8,
    "epochs": 3,
    "drop_path": 0.2,
    "log_every": 1,
    "eval_every_epochs": 0,
    "estimate": False,
    "eval_resize": 28,
    "eval_crop": 28,
    "precision": "fp32",
    "on_collapse": "warn",  # such a small network hardly learns
}
