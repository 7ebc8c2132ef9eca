"""A backbone's forward pass in numpy. If torch is not installed, it is the reference that exported graphs are compared
with.

The forward pass is computed in float64. It shares no code with the graphs and engines that are checked, except the
function that computes the matrices for resizing the position embeddings. It reads the weights of one block at a time,
so it needs little memory even for ViT-g. It is slow and never serves requests.

Legend: B batch, H x W pixels, p patch size, h x w = H/p x W/p patches, N = h*w, R registers, T = 1 + R + N tokens, D
width, A attention heads.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from model.config import ViTConfig
from model.engines.protocol import Features, FloatArray
from model.pos_embed import resize_matrix

Float64 = npt.NDArray[np.float64]

NORM_EPS: Final = 1e-6
_ERF_STEP: Final = 1 / 512
_ERF_END: Final = 6.0  # erf is 1 in float64 from here on


class NumpyReference:
    """Computes the features of a backbone in float64.

    Args:
        weights: the weights, keyed by Meta's parameter names, in any float type. The mapping may read each array from a
            file when it is accessed.
        config: the model's configuration.
    """

    name = "numpy"
    precision = "fp64"
    device = "cpu"

    def __init__(self, weights: Mapping[str, npt.NDArray[np.floating]], config: ViTConfig) -> None:
        self._weights, self._config = weights, config

    def run(self, pixels: FloatArray) -> Features:
        """Compute all features of normalised pixels [B, 3, H, W] in float64, and return them as float32.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        tokens = self._tokens(pixels)
        for block in range(self._config.depth):
            tokens, _ = self._block(block, tokens)
        normed = self._norm("norm", tokens).astype(np.float32)
        first_patch = 1 + self._config.num_register_tokens
        return Features(normed[:, 0], normed[:, first_patch:], normed[:, 1:first_patch])

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Compute the outputs in `names` for normalised pixels [B, 3, H, W], and return them as float32, keyed by name.

        The names are the fields of `Features`, and the optional outputs of exported graphs, which
        `model/onnx_graph/build.py` defines: `attention` [B, A, T] and `layer.<i>` [B, T, D]. This engine has no inner
        outputs.

        Raises:
            KeyError: this engine has no output of this name.
        """
        outputs = dict(self.run(pixels)._asdict()) if set(names) & set(Features._fields) else {}
        tokens = self._tokens(pixels)
        for block in range(self._config.depth):
            tokens, attention = self._block(block, tokens)
            if block == self._config.depth - 1:
                outputs["attention"] = attention.astype(np.float32)
            if f"layer.{block}" in names:
                outputs[f"layer.{block}"] = self._norm("norm", tokens).astype(np.float32)
        return {name: outputs[name] for name in names}

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        p = self._config.patch_size
        return all(side >= p and side % p == 0 for side in size) and set(outputs) <= set(Features._fields)

    def close(self) -> None:
        """Do nothing: no memory is held between calls."""

    def _array(self, name: str) -> Float64:
        return self._weights[name].astype(np.float64)

    def _tokens(self, pixels: FloatArray) -> Float64:
        """Return the tokens [B, T, D] that enter the first block."""
        config, p = self._config, self._config.patch_size
        batch, _, height, width = pixels.shape
        if height % p or width % p:
            raise ValueError(f"input of {height}x{width} pixels: both sides must be multiples of the patch size {p}")
        h, w = height // p, width // p
        # [B, 3, H, W] -> [B, 3, h, p, w, p] -> [B, h, w, 3, p, p] -> [B, N, 3*p*p]
        cut = pixels.astype(np.float64).reshape(batch, 3, h, p, w, p).transpose(0, 2, 4, 1, 3, 5)
        kernel = self._array("patch_embed.proj.weight").reshape(config.embed_dim, -1)  # [D, 3*p*p]
        patches = cut.reshape(batch, h * w, -1) @ kernel.T + self._array("patch_embed.proj.bias")
        positions = self._array("pos_embed")[0]  # [1 + M*M, D]
        patches += self._resized(positions[1:], h, w)
        cls = np.broadcast_to(self._array("cls_token") + positions[0], (batch, 1, config.embed_dim))
        if not config.num_register_tokens:
            return np.concatenate([cls, patches], axis=1)
        shape = (batch, config.num_register_tokens, config.embed_dim)
        return np.concatenate([cls, np.broadcast_to(self._array("register_tokens"), shape), patches], axis=1)

    def _resized(self, positions: Float64, h: int, w: int) -> Float64:
        """Resize the patch position embeddings [M*M, D] to a grid of h x w patches, and return them as [N, D]."""
        side, rule = self._config.grid, self._config.pos_embed_rule
        if (h, w) == (side, side):
            return positions
        rows, columns = (resize_matrix(side, n, rule).astype(np.float64) for n in (h, w))
        grid = positions.reshape(side, side, -1)
        return np.asarray(np.einsum("hi,wj,ijd->hwd", rows, columns, grid, optimize=True)).reshape(h * w, -1)

    def _block(self, index: int, x: Float64) -> tuple[Float64, Float64]:
        """Run a block on tokens [B, T, D]. Return its output and the class token's attention weights [B, A, T]."""
        name = f"blocks.{index}"
        attended, attention = self._attention(f"{name}.attn", self._norm(f"{name}.norm1", x))
        x = x + self._scaled(f"{name}.ls1", attended)
        hidden = self._norm(f"{name}.norm2", x)
        if self._config.ffn == "mlp":
            branch = self._linear(f"{name}.mlp.fc2", gelu(self._linear(f"{name}.mlp.fc1", hidden)))
        else:
            gate, value = np.split(self._linear(f"{name}.mlp.w12", hidden), 2, axis=-1)
            branch = self._linear(f"{name}.mlp.w3", gate / (1 + np.exp(-gate)) * value)
        return x + self._scaled(f"{name}.ls2", branch), attention

    def _attention(self, name: str, x: Float64) -> tuple[Float64, Float64]:
        batch, t, d = x.shape
        heads = self._config.num_heads
        # [B, T, 3*D] -> [3, B, A, T, D/A]
        q, k, v = self._linear(f"{name}.qkv", x).reshape(batch, t, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(d // heads)  # [B, A, T, T]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        joined = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, t, d)
        return self._linear(f"{name}.proj", joined), weights[:, :, 0]

    def _linear(self, name: str, x: Float64) -> Float64:
        return np.asarray(x @ self._array(f"{name}.weight").T + self._array(f"{name}.bias"))

    def _norm(self, name: str, x: Float64) -> Float64:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + NORM_EPS)
        return np.asarray(centred / deviation * self._array(f"{name}.weight") + self._array(f"{name}.bias"))

    def _scaled(self, name: str, branch: Float64) -> Float64:
        """Multiply `branch` by the LayerScale weights `name`, or return it unchanged if the model has no LayerScale."""
        return branch if self._config.layerscale_init is None else branch * self._array(f"{name}.gamma")


def gelu(x: Float64) -> Float64:
    """Return x * (1 + erf(x / sqrt(2))) / 2, the exact form of GELU."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def erf(x: Float64) -> Float64:
    """Compute the error function, with an absolute error below 1e-12. numpy does not provide it.

    Values are interpolated from a table with cubic Hermite polynomials, which use the exact slopes.
    """
    values, slopes = _erf_table()
    position = np.minimum(np.abs(x), _ERF_END) / _ERF_STEP
    cell = np.minimum(np.nan_to_num(position).astype(np.intp), len(values) - 2)
    t = position - cell
    start, end = values[cell], values[cell + 1]
    rise, before, after = end - start, slopes[cell] * _ERF_STEP, slopes[cell + 1] * _ERF_STEP
    inner = (before - rise) * (1 - t) + (rise - after) * t
    return np.asarray(np.copysign(start + t * (rise + (1 - t) * inner), x))


@lru_cache(maxsize=1)
def _erf_table() -> tuple[Float64, Float64]:
    """Return erf and its slope at multiples of `_ERF_STEP` from 0 to `_ERF_END`."""
    points = np.arange(round(_ERF_END / _ERF_STEP) + 1) * _ERF_STEP
    return np.array([math.erf(point) for point in points]), 2 / math.sqrt(math.pi) * np.exp(-np.square(points))
