"""DINOv2's vision transformer in one file.

Parameter names, initialisation and outputs are those of facebookresearch/dinov2
(`dinov2/models/vision_transformer.py`), so the published weights load with `strict=True`, and code written for torch
hub's models keeps working. The implementation differs internally. Attention always uses `scaled_dot_product_attention`.
Drop path (stochastic depth) computes a branch only for the samples that do not skip it. The position embedding is
resized by matrix products (`model/pos_embed.py`), which are differentiable and can be exported to any runtime.

Legend: B batch, H x W pixels, p patch size, h x w = H/p x W/p patches, N = h*w, R registers, T = 1 + R + N tokens, D
width, A attention heads.
"""

import functools
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PosEmbedRule, ViTConfig
from model.pos_embed import resize_matrix

NORM_EPS = 1e-6


class FeatureDict(TypedDict):
    """The tensors that `forward_features` returns, with the names that Meta's code uses."""

    x_norm_clstoken: Tensor
    x_norm_regtokens: Tensor
    x_norm_patchtokens: Tensor
    x_prenorm: Tensor
    masks: NotRequired[Tensor | None]


@functools.lru_cache(maxsize=64)
def _resize_tensor(side: int, n: int, rule: PosEmbedRule, device: torch.device) -> Tensor:
    """Return the matrix that resizes an axis from `side` to `n` patches, as a cached tensor [n, side] on `device`.

    Without the cache, each forward pass would copy the matrix to the device and block the host.
    """
    with torch.inference_mode(False):
        return torch.tensor(resize_matrix(side, n, rule), device=device)


def resize_tensor(side: int, n: int, rule: PosEmbedRule, device: torch.device) -> Tensor:
    """Return the matrix that resizes an axis from `side` to `n` patches, as a cached tensor [n, side] on `device`.

    Code that compiles a whole forward pass must mark this function as constant, because torch's compiler ignores
    `lru_cache` and cannot trace the numpy code that fills the cache.
    """
    return _resize_tensor(side, n, rule, device)


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, 3, H, W] -> [B, D, h, w] -> [B, N, D]


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, A, T, D/A]
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(x)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))  # [B, A, T, D/A] -> [B, T, D]

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights [B, A, T, T] after the softmax, for B images, A heads and T tokens.

        The weights are for inspection only, because their memory is quadratic in T.
        """
        q, k, _ = self._split(x)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """A SiLU-gated feed-forward layer (arXiv 2002.05202). The first half of the output of `w12` is the gate."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.embed_dim, 2 * config.hidden_dim)
        self.w3 = nn.Linear(config.hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in the precision of its input, whatever the precision of its weights.

    FSDP2 casts the weights of a block to half precision, but the residual stream stays in float32. torch accepts the
    two in one call only under autocast on a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerScale(nn.Module):
    """A layer that multiplies each channel of a residual branch by a learned gain (arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block, which computes x + ls1(attn(norm1(x))) and then x + ls2(mlp(norm2(x)))."""

    def __init__(self, config: ViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp: Mlp | SwiGLU = Mlp(config) if config.ffn == "mlp" else SwiGLU(config)
        init = config.layerscale_init
        self.ls1: nn.Module = nn.Identity() if init is None else LayerScale(dim, init)
        self.ls2: nn.Module = nn.Identity() if init is None else LayerScale(dim, init)
        self.drop_path_rate = drop_path_rate

    def _attn_branch(self, x: Tensor) -> Tensor:
        return self.ls1(self.attn(self.norm1(x)))

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop_path_rate > 0:
            for branch in (self._attn_branch, self._mlp_branch):
                kept, scale = self._kept_samples(x)
                x = x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)
            return x
        x = x + self._attn_branch(x)
        return x + self._mlp_branch(x)

    def _kept_samples(self, x: Tensor) -> tuple[Tensor, float]:
        """Choose at random the samples for which a residual branch is computed.

        Returns:
            The indices of these samples, and the factor by which the branch's output is multiplied to keep its expected
                value.
        """
        batch = x.shape[0]
        n_kept = max(1, round(batch * (1 - self.drop_path_rate)))
        return torch.randperm(batch, device=x.device)[:n_kept], batch / n_kept


class DinoVisionTransformer(nn.Module):
    """The DINOv2 backbone.

    Args:
        config: the shape of the backbone.
        drop_path_rate: the fraction of samples that skip each residual branch in training. It is the same in every
            block.

    Raises:
        ValueError: `drop_path_rate` is not in [0, 1).
    """

    def __init__(self, config: ViTConfig, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), not {drop_path_rate}")
        self.config = config
        self.embed_dim = self.num_features = config.embed_dim
        self.patch_size = config.patch_size
        self.num_register_tokens = config.num_register_tokens
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_register_tokens, dim)) if config.num_register_tokens else None
        )
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, drop_path_rate) for _ in range(config.depth))
        self.norm = LayerNorm(dim, eps=NORM_EPS)
        if not self.cls_token.is_meta:  # loaded weights replace the tensors of a network on the meta device
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise the weights as DINOv2 does.

        The weights of linear layers and the positions are drawn from a truncated normal distribution (std 0.02), and
        the class and register tokens from a normal distribution (std 1e-6). The biases of linear layers are set to
        zero.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _pos_embed_for(self, h: int, w: int) -> Tensor:
        """Return the position embedding [1, 1 + h*w, D] for a grid of (h, w) patches and a model of width D.

        If the model was trained for another grid, the positions are resized by the model's `pos_embed_rule`.
        """
        side = self.config.grid
        if (h, w) == (side, side):
            return self.pos_embed
        rule = self.config.pos_embed_rule
        rows, columns = (resize_tensor(side, n, rule, self.pos_embed.device) for n in (h, w))
        patches = self.pos_embed[0, 1:].float().view(side, side, -1)  # [M, M, D]
        resized = torch.einsum("hi,ijd->hjd", rows, patches)
        resized = torch.einsum("wj,hjd->hwd", columns, resized).reshape(1, h * w, -1)
        return torch.cat((self.pos_embed[:, :1], resized.to(self.pos_embed.dtype)), dim=1)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        height, width = x.shape[-2:]
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"input of {height}x{width} pixels: both sides must be multiples of the patch size {p}")
        return height // p, width // p

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Convert pixels to the tokens that enter the first block.

        Args:
            x: normalised pixels [B, 3, H, W].
            masks: [B, N] bool for N patches, True where the mask token replaces a patch. If None, no patch is replaced.

        Returns:
            The T tokens of each image [B, T, D], with width D: the class token, the registers and the patches.
                Positions are added to all but the registers.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        h, w = self._grid_of(x)
        # The residual stream keeps the weights' precision; under autocast the convolution returns half precision.
        x = self.patch_embed(x).to(self.pos_embed.dtype)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
        x = x + self._pos_embed_for(h, w).to(x.dtype)
        if self.register_tokens is not None:  # added after the positions, because registers have no position
            registers = self.register_tokens.expand(x.shape[0], -1, -1).to(x.dtype)
            x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
        return x

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> FeatureDict:
        """Compute all features of a batch of B images with a model of width D.

        Args:
            x: normalised pixels [B, 3, H, W]. H and W are multiples of the patch size.
            masks: [B, N] bool for N patches, True where the mask token replaces a patch. If None, no patch is replaced.

        Returns:
            A dictionary. Its values after the last norm are the class tokens `x_norm_clstoken` [B, D], the R registers
                `x_norm_regtokens` [B, R, D] and the patch tokens `x_norm_patchtokens` [B, N, D]. It also contains all T
                tokens before the last norm, `x_prenorm` [B, T, D], and the argument `masks`.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        normed, first_patch = self.norm(x), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Return the patch tokens [B, N, D] after each of the chosen blocks, in the order of the blocks.

        Args:
            x: normalised pixels [B, 3, H, W] of B images with N patches each, for a model of width D.
            n: the indices of the chosen blocks, or an integer n to choose the last n blocks.
            reshape: whether to return the patch tokens as [B, D, h, w] for a grid of h x w patches, instead of [B, N,
                D].
            return_class_token: whether to return a pair (patch tokens, class token [B, D]) for each block.
            norm: whether to apply the last norm to the tokens of every block.

        Raises:
            ValueError: the model has no such block, or H or W is not a multiple of the patch size.
        """
        depth = len(self.blocks)
        wanted = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"n={n}: the model has {depth} blocks, 0 to {depth - 1}")
        h, w = self._grid_of(x)
        tokens = self.prepare_tokens_with_masks(x)
        outputs = []
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = block(tokens)
            if index in wanted:
                outputs.append(self.norm(tokens) if norm else tokens)
        patches = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            patches = [out.transpose(1, 2).reshape(out.shape[0], -1, h, w) for out in patches]
        if return_class_token:
            return tuple(zip(patches, (out[:, 0] for out in outputs), strict=True))
        return tuple(patches)

    def get_attention(self, x: Tensor, block: int = -1) -> Tensor:
        """Compute the attention weights [B, A, T, T] of one block for B images, A heads and T tokens.

        They are computed in a separate, slower pass. Each row contains one query token's weights over all tokens and
        sums to one. If `block` is negative, it counts back from the last block (-1).

        Raises:
            ValueError: the model has no block with this number.
        """
        depth = len(self.blocks)
        if not -depth <= block < depth:
            raise ValueError(f"block={block}: the model has {depth} blocks, {-depth} to {depth - 1}")
        tokens = self.prepare_tokens_with_masks(x)
        for layer in self.blocks[: block % depth]:
            tokens = layer(tokens)
        last = self.blocks[block % depth]
        assert isinstance(last, Block)
        return last.attn.weights(last.norm1(tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings [B, D] of B images. An image's embedding is its class token after the last norm."""
        return self.forward_features(x)["x_norm_clstoken"]
