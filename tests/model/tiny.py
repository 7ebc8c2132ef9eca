"""A small backbone in which every part affects the output.

It has large LayerScale gains and register tokens, and its weights are not near zero.
"""

import numpy as np

from model.config import ViTConfig
from model.export.options import Backbone
from model.preprocess import PreprocessSpec

CONFIG = ViTConfig(embed_dim=48, depth=2, num_heads=3, img_size=70, layerscale_init=0.5, num_register_tokens=2)
SPEC = PreprocessSpec(resize=80, crop=70)


def random_weights(seed: int = 0, config: ViTConfig = CONFIG) -> dict[str, np.ndarray]:
    import torch

    from model.vit import DinoVisionTransformer

    torch.manual_seed(seed)
    model = DinoVisionTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}


def backbone(**changes: object) -> Backbone:
    """Return the tiny backbone as an argument for `export_artifact`. `changes` replace some of its fields."""
    fields = {"preprocess": SPEC, "provenance": {}, "licence": "Apache-2.0"} | changes
    return Backbone(name="tiny", weights=random_weights(), config=CONFIG, **fields)
