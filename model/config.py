"""The shape of a DINOv2 backbone as a frozen dataclass, and the table of the model sizes.

The published sizes come from the DINOv2 paper (arXiv 2304.07193, Table 17, except that the published ViT-B has 12
blocks) and from "Vision Transformers Need Registers" (arXiv 2309.16588). `dinov2_vitt14` is this project's own small
size and has no published weights. This module does not import torch, so that the service can use it without torch.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

PosEmbedRule = Literal["offset", "antialias", "size"]
"""The rule by which `pos_embed` is resized to another grid of patches. `model/pos_embed.py` explains all three."""

FeedForward = Literal["mlp", "swiglu"]


@dataclass(frozen=True)
class ViTConfig:
    """The shape of one backbone.

    `img_size` is the side in pixels of the square input that the position embedding `pos_embed` was trained for, so
    `pos_embed` has `(img_size // patch_size) ** 2` patch positions. If `layerscale_init` is None, the blocks have no
    LayerScale.

    Raises:
        ValueError: a field is out of range. The message names the field, its value and the allowed values.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 14
    mlp_ratio: float = 4.0
    ffn: FeedForward = "mlp"
    num_register_tokens: int = 0
    img_size: int = 518
    pos_embed_rule: PosEmbedRule = "offset"
    layerscale_init: float | None = 1e-5

    def __post_init__(self) -> None:
        for field in ("embed_dim", "depth", "num_heads", "patch_size", "img_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}")
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must be at least 0, not {self.num_register_tokens}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, not {self.mlp_ratio}")
        if self.ffn not in get_args(FeedForward):
            raise ValueError(f"ffn must be one of {get_args(FeedForward)}, not {self.ffn!r}")
        if self.pos_embed_rule not in get_args(PosEmbedRule):
            raise ValueError(f"pos_embed_rule must be one of {get_args(PosEmbedRule)}, not {self.pos_embed_rule!r}")

    @property
    def grid(self) -> int:
        """The number of patches along one side of the square input that `pos_embed` was trained for."""
        return self.img_size // self.patch_size

    @property
    def hidden_dim(self) -> int:
        """The width of the feed-forward layer.

        With SwiGLU, it is 2/3 of the width of an MLP, rounded up to a multiple of 8.
        """
        hidden = int(self.embed_dim * self.mlp_ratio)
        return hidden if self.ffn == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8


_SIZES = {
    "dinov2_vitt14": ViTConfig(embed_dim=192, depth=12, num_heads=3, img_size=224, pos_embed_rule="antialias"),
    "dinov2_vits14": ViTConfig(embed_dim=384, depth=12, num_heads=6),
    "dinov2_vitb14": ViTConfig(embed_dim=768, depth=12, num_heads=12),
    "dinov2_vitl14": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    "dinov2_vitg14": ViTConfig(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}

CONFIGS: dict[str, ViTConfig] = _SIZES | {
    f"{name}_reg": replace(config, num_register_tokens=4, pos_embed_rule="antialias") for name, config in _SIZES.items()
}
"""The configurations, keyed by torch hub name. The `_reg` models have four registers and the rule "antialias"."""


def config_for(name: str) -> ViTConfig:
    """Return the configuration of the model with the torch hub name `name`.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(CONFIGS)}")
    return CONFIGS[name]
