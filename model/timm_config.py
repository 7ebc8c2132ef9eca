"""timm's description of a model's weights (`pretrained_cfg`), from which timm makes the preprocessing.

The adapter for timm's code (`model/hub/timm.py`) and the export to timm's format use it. It does not import torch.
"""

import math
from typing import Any

from model.config import ViTConfig
from model.preprocess import PreprocessSpec


def timm_config(config: ViTConfig, spec: PreprocessSpec | None) -> dict[str, Any]:
    """Return the description of a model's weights.

    Args:
        config: the shape of the backbone.
        spec: the preprocessing of the model. If None, or if it keeps the whole image, the input is a square with sides
            of `config.img_size` and nothing is cut off, as in timm's configuration of the published weights.
    """
    spec = spec or PreprocessSpec(resize=config.img_size, crop=config.img_size, patch_size=config.patch_size)
    side, share = spec.crop or config.img_size, 1.0
    if spec.crop is not None and spec.resize is not None:
        share = spec.crop / spec.resize
        if math.floor(spec.crop / share) < spec.resize:  # timm resizes to this size
            share = math.nextafter(share, 0)
    modes = {"crop": "center", "pad": "border", "squash": "squash"}
    return {
        "num_classes": 0,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": share,
        "crop_mode": modes[spec.fit],
        "interpolation": spec.interpolation,
        "mean": spec.mean,
        "std": spec.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
