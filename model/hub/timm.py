"""Models with the interface of timm's DINOv2 models (`timm/models/vision_transformer.py`).

Legend: B batch, N patches, R registers, T = 1 + R + N tokens, D width, C classes, h x w patches.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor, nn

from model.config import PosEmbedRule, ViTConfig
from model.hub.shared import DescribedPatchEmbed, filled
from model.loading import read_model
from model.timm_config import timm_config
from model.vit import DinoVisionTransformer

GlobalPool = Literal["", "token", "avg", "max", "avgmax"]
_POOLS: Final = ("", "token", "avg", "max", "avgmax")


class TimmModel(DinoVisionTransformer):
    """A backbone with the interface of timm's DINOv2 models.

    The parameters have Meta's names. `dinov2 export --format timm` writes them under timm's.

    Args:
        config: the shape of the backbone.
        pretrained_cfg: the description of the weights, with the preprocessing (see `timm_config`).
        drop_path_rate: see `DinoVisionTransformer`.
    """

    def __init__(self, config: ViTConfig, pretrained_cfg: dict[str, Any], *, drop_path_rate: float = 0.0) -> None:
        super().__init__(config, drop_path_rate=drop_path_rate)
        self.patch_embed = DescribedPatchEmbed(config)
        self.pretrained_cfg = self.default_cfg = pretrained_cfg
        self.num_classes = 0
        self.global_pool: GlobalPool = "token"
        self.has_class_token = True
        self.num_reg_tokens = config.num_register_tokens
        self.num_prefix_tokens = 1 + config.num_register_tokens
        self.head_hidden_size = config.embed_dim
        self.head: nn.Module = nn.Identity()

    # The base class has methods of the same names with Meta's results. Code for timm expects timm's.
    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return all tokens [B, T, D] after the last norm: class token, registers, patches."""
        tokens = self.prepare_tokens_with_masks(x)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def pool(self, x: Tensor, pool_type: GlobalPool | None = None) -> Tensor:
        """Pool tokens [B, T, D] to [B, D], by `global_pool` unless `pool_type` is given. "" returns all tokens."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "":
            return x
        if pool_type == "token":
            return x[:, 0]
        patches = x[:, self.num_prefix_tokens :]
        if pool_type == "avg":
            return patches.mean(dim=1)
        if pool_type == "max":
            return patches.amax(dim=1)
        return 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens [B, T, D], and apply the classifier unless `pre_logits`."""
        pooled = self.pool(x)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, C] or, without a classifier, the pooled tokens [B, D]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the classifier with a new one for `num_classes` classes, or with none if this is 0.

        Raises:
            ValueError: `global_pool` is not one of "", "token", "avg", "max" and "avgmax".
        """
        if global_pool is not None:
            if global_pool not in _POOLS:
                raise ValueError(f"global_pool={global_pool!r}: one of {', '.join(map(repr, _POOLS))}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Identity() if num_classes == 0 else nn.Linear(self.embed_dim, num_classes)
        self.head.to(self.pos_embed.device, self.pos_embed.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return all tokens after the last norm [B, T, D], and a list of the patches after each chosen block.

        Args:
            x: normalised pixels [B, 3, H, W].
            indices: the chosen blocks, also negative ones; n for the last n blocks; None for all.
            return_prefix_tokens: whether the list has pairs (patches, class token and registers [B, 1 + R, D]).
            norm: whether to apply the last norm to the tokens of every chosen block.
            stop_early: whether to skip the blocks after the last chosen one. Then the tokens after the last norm are
                those of this block, as in timm.
            output_fmt: "NCHW" for patches [B, D, h, w], "NLC" for [B, N, D].
            intermediates_only: whether to return only the list.

        Raises:
            ValueError: the model has no such block, or `output_fmt` is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: NCHW or NLC")
        taken = self._block_numbers(indices)
        h, w = self._grid_of(x)
        tokens, outputs = self.prepare_tokens_with_masks(x), []
        for index, block in enumerate(self.blocks[: max(taken) + 1] if stop_early else self.blocks):
            tokens = block(tokens)
            if index in taken:
                outputs.append(self.norm(tokens) if norm else tokens)
        prefixes = [out[:, : self.num_prefix_tokens] for out in outputs]
        patches = [out[:, self.num_prefix_tokens :] for out in outputs]
        if output_fmt == "NCHW":
            patches = [out.transpose(1, 2).reshape(len(out), -1, h, w).contiguous() for out in patches]
        layers: list[Any] = list(zip(patches, prefixes, strict=True)) if return_prefix_tokens else patches
        return layers if intermediates_only else (self.norm(tokens), layers)

    def get_intermediate_layers(  # type: ignore[override]
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the list of `forward_intermediates`. In contrast to Meta's method, `norm` is False by default."""
        layers: list[Any] = self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )
        return layers

    def _block_numbers(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            count = depth if indices is None else indices
            wanted = list(range(depth - count, depth))
        else:
            wanted = [index + depth if index < 0 else index for index in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"indices={indices}: the model has {depth} blocks, {-depth} to {depth - 1}")
        return set(wanted)


def timm_model(
    source: Path | str,
    *,
    arch: str | None = None,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    pos_embed_rule: PosEmbedRule | None = None,
) -> TimmModel:
    """Load a model of any source with the interface of timm's models.

    Args:
        source: a checkpoint, a run's folder, an artifact's folder, a weights file, or the name of a published model.
        arch: the name of the architecture, for a file that does not contain it.
        num_classes: the number of classes of a new classifier, or 0 for none.
        drop_path_rate: see `DinoVisionTransformer`.
        pos_embed_rule: see `load_model`. By default, published weights and weights files of other projects get timm's
            rule, "antialias". Other sources keep their own rule.

    Raises:
        ValueError, OSError: see `model.loading.read_model`.
    """
    loaded = read_model(source, arch=arch, pos_embed_rule=pos_embed_rule)
    recorded = loaded.kind in ("checkpoint", "artifact")
    if not recorded and pos_embed_rule is None:
        loaded = replace(loaded, config=replace(loaded.config, pos_embed_rule="antialias"))
    spec = loaded.preprocess if recorded else None
    cfg = timm_config(loaded.config, spec)
    model = filled(lambda: TimmModel(loaded.config, cfg, drop_path_rate=drop_path_rate), loaded)
    model.reset_classifier(num_classes)
    return model.eval()
