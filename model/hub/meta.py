"""Models with the interface of torch hub's models (facebookresearch/dinov2).

`HubModel` has the methods and attributes of `dinov2/models/vision_transformer.py`. `backbone_entry` and
`classifier_entry` return the functions of `hubconf.py`, with the arguments of `dinov2/hub/backbones.py` and
`dinov2/hub/classifiers.py`.

Legend: B batch, N patches, D width, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from model import downloads, zoo
from model.config import PosEmbedRule, ViTConfig, config_for
from model.heads.published import read_published
from model.hub.shared import DescribedPatchEmbed, filled
from model.loading import LoadedWeights, read_model
from model.vit import DinoVisionTransformer
from model.weights import check_architecture

PUBLISHED_WEIGHTS: Final = "LVD142M"
PUBLISHED_HEAD: Final = "IMAGENET1K"
IMAGENET_CLASSES: Final = 1000

_RULES: Final[dict[tuple[bool, float], PosEmbedRule]] = {
    (False, 0.1): "offset",
    (True, 0.0): "antialias",
    (False, 0.0): "size",
}
"""Meta's arguments `interpolate_antialias` and `interpolate_offset` for each of this project's rules."""


class HubModel(DinoVisionTransformer):
    """A backbone with the interface of torch hub's models.

    Args:
        config: the shape of the backbone.
        drop_path_rate: see `DinoVisionTransformer`.
    """

    def __init__(self, config: ViTConfig, *, drop_path_rate: float = 0.0) -> None:
        super().__init__(config, drop_path_rate=drop_path_rate)
        self.patch_embed = DescribedPatchEmbed(config)
        self.n_blocks = config.depth
        self.num_heads = config.num_heads
        self.num_tokens = 1
        self.chunked_blocks = False
        of_rule = {rule: values for values, rule in _RULES.items()}
        self.interpolate_antialias, self.interpolate_offset = of_rule[config.pos_embed_rule]
        self.head: nn.Module = nn.Identity()

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Return the positions [1, 1 + N, D] for an input of `w` x `h` pixels.

        As in Meta's code, `w` is the height of the input and `h` its width. `x` [B, 1 + N, D] only gives the data type.
        """
        p = self.patch_size
        return self._pos_embed_for(w // p, h // p).to(x.dtype)

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """Return the dictionary of `DinoVisionTransformer.forward_features`.

        If `x` is a list of batches, which may have different sizes, `masks` is a list of the same length or None, and
        the result is a list of dictionaries.
        """
        if not isinstance(x, list):
            return super().forward_features(x, masks)
        masks = [None] * len(x) if masks is None else masks
        return [super(HubModel, self).forward_features(part, mask) for part, mask in zip(x, masks, strict=True)]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Return the same as `DinoVisionTransformer.get_intermediate_layers`. A grid of patches is contiguous."""
        layers = super().get_intermediate_layers(x, n, reshape, True, norm)
        pairs = [(patches.contiguous() if reshape else patches, cls) for patches, cls in layers]
        return tuple(pairs) if return_class_token else tuple(patches for patches, _ in pairs)

    def forward(self, x: Any, masks: Any = None, *, is_training: bool = False) -> Any:
        """Return `head(class tokens)` [B, D] or, if `is_training`, what `forward_features` returns.

        If `x` is a list, the result is a list.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(part["x_norm_clstoken"]) for part in features]
        return self.head(features["x_norm_clstoken"])


class LinearClassifier(nn.Module):
    """A backbone with Meta's linear head, which reads the class tokens of one or four blocks and the mean patch token.

    Args:
        backbone: the backbone.
        linear_head: the head, with (1 + layers) * D inputs.
        layers: the number of blocks whose class tokens the head reads, 1 or 4.
    """

    def __init__(self, *, backbone: HubModel, linear_head: nn.Linear, layers: int = 4) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = linear_head
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, C] of C classes for pixels [B, 3, H, W]."""
        blocks = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        patches, classes = zip(*blocks, strict=True)
        return self.linear_head(torch.cat([*classes, patches[-1].mean(dim=1)], dim=1))


def hub_model(
    source: Path | str, *, drop_path_rate: float = 0.0, pos_embed_rule: PosEmbedRule | None = None
) -> HubModel:
    """Load a model of any source with the interface of torch hub's models.

    Args:
        source: a checkpoint, a run's folder, an artifact's folder, or the name of a published model.
        drop_path_rate: see `DinoVisionTransformer`.
        pos_embed_rule: see `load_model`.

    Raises:
        ValueError, OSError: see `model.loading.read_model`.
    """
    loaded = read_model(source, pos_embed_rule=pos_embed_rule)
    return filled(lambda: HubModel(loaded.config, drop_path_rate=drop_path_rate), loaded)


def backbone_entry(name: str) -> Callable[..., HubModel]:
    """Return torch hub's function for a backbone, with Meta's arguments.

    The function accepts `weights="LVD142M"` (the published weights), or any file or folder that `load_model` accepts.
    """

    def make(
        *,
        pretrained: bool = True,
        weights: Enum | Path | str = PUBLISHED_WEIGHTS,
        img_size: int | None = None,
        init_values: float = 1.0,
        drop_path_rate: float = 0.0,
        interpolate_antialias: bool | None = None,
        interpolate_offset: float | None = None,
    ) -> HubModel:
        rule = _rule(name, interpolate_antialias, interpolate_offset)
        if not pretrained:
            config = replace(config_for(name), layerscale_init=init_values, pos_embed_rule=rule)
            return HubModel(replace(config, img_size=img_size or config.img_size), drop_path_rate=drop_path_rate)
        asked = interpolate_antialias is not None or interpolate_offset is not None
        loaded = _weights_of(name, weights, rule if asked else None)
        if img_size not in (None, loaded.config.img_size):
            raise ValueError(f"img_size={img_size}: the weights have positions for {loaded.config.img_size} pixels")
        return filled(lambda: HubModel(loaded.config, drop_path_rate=drop_path_rate), loaded)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Make {name}: its published weights, or weights=FILE_OR_FOLDER, or random ones (pretrained=False)."
    return make


def classifier_entry(name: str) -> Callable[..., LinearClassifier]:
    """Return torch hub's function for a backbone with a linear head for ImageNet's classes, with Meta's arguments.

    The function also accepts a file with a head as `weights`, and `backbone_weights` as `backbone_entry` its `weights`.
    """

    def make(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: Enum | Path | str = PUBLISHED_HEAD,
        backbone_weights: Enum | Path | str = PUBLISHED_WEIGHTS,
    ) -> LinearClassifier:
        if layers not in (1, 4):
            raise ValueError(f"layers={layers}: 1 or 4")
        backbone = backbone_entry(name)(pretrained=pretrained, weights=backbone_weights)
        inputs = (1 + layers) * backbone.embed_dim
        if not pretrained:
            head = nn.Linear(inputs, IMAGENET_CLASSES)
        else:
            given = weights.value if isinstance(weights, Enum) else weights
            path = _download_head(name, layers) if given == PUBLISHED_HEAD else Path(given)
            _, tensors = read_published(path, "imagenet", backbone.config, kind="classification")
            weight, bias = (torch.from_numpy(tensors[part]) for part in ("weight", "bias"))
            if weight.shape[1] != inputs:
                raise ValueError(f"{path}: a head for {5 - layers} blocks, but layers={layers}")
            head = nn.Linear(inputs, len(bias))
            head.load_state_dict({"weight": weight, "bias": bias})
        return LinearClassifier(backbone=backbone, linear_head=head, layers=layers)

    make.__name__ = make.__qualname__ = f"{name}_lc"
    make.__doc__ = f"Make a linear classifier on {name}, which reads its last layers=1 or 4 blocks."
    return make


def _rule(name: str, antialias: bool | None, offset: float | None) -> PosEmbedRule:
    """Return the rule that Meta's two arguments describe. None means the model's own value."""
    own = next(values for values, rule in _RULES.items() if rule == config_for(name).pos_embed_rule)
    asked = (own[0] if antialias is None else antialias, own[1] if offset is None else offset)
    if asked not in _RULES:
        allowed = ", ".join(f"({a}, {o})" for a, o in _RULES)
        raise ValueError(f"(interpolate_antialias, interpolate_offset)={asked}: one of {allowed}")
    return _RULES[asked]


def _weights_of(name: str, weights: Enum | Path | str, rule: PosEmbedRule | None) -> LoadedWeights:
    given = weights.value if isinstance(weights, Enum) else weights
    if given == PUBLISHED_WEIGHTS:
        return read_model(name, pos_embed_rule=rule)
    loaded = read_model(Path(given), arch=name, pos_embed_rule=rule)
    if loaded.kind != "foreign":
        check_architecture(loaded.path, name, loaded.config)
    return loaded


def _download_head(name: str, layers: int) -> Path:
    """Download Meta's linear head for ImageNet unless it is in the cache, and return its path."""
    entry = zoo.ENTRIES[name]
    file = entry.path.replace("_pretrain.pth", f"_linear{layers if layers > 1 else ''}_head.pth")
    hosts = replace(zoo.Hosts.from_environment(), hugging_face=None)  # Hugging Face has no heads in Meta's format
    head = replace(entry, name=f"{name}_lc", path=file, size_bytes=None, sha256=None)
    return downloads.download(head, zoo.DownloadOptions(hosts=hosts))
