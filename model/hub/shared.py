"""What both adapters share: the attributes of the patch embedding, and loading without extra memory."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from model.checkpoint import state_dict_of
from model.config import ViTConfig
from model.loading import LoadedWeights
from model.vit import DinoVisionTransformer, PatchEmbed

Adapter = TypeVar("Adapter", bound=DinoVisionTransformer)


class DescribedPatchEmbed(PatchEmbed):
    """The patch embedding, with the attributes that Meta's and timm's have."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.img_size = (config.img_size, config.img_size)
        self.patch_size = (config.patch_size, config.patch_size)
        self.patches_resolution = self.grid_size = (config.grid, config.grid)
        self.num_patches = config.grid**2
        self.in_chans = 3
        self.embed_dim = config.embed_dim
        self.norm = nn.Identity()


def filled(make: Callable[[], Adapter], loaded: LoadedWeights) -> Adapter:
    """Make an adapter without memory for its parameters, and give it the loaded weights."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(state_dict_of(loaded), strict=True, assign=True)
    return model
