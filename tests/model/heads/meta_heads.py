"""Random heads with the tensor names and shapes of Meta's published files, and random tokens for them."""

import dataclasses
from typing import Any

import numpy as np

from model.config import CONFIGS, ViTConfig
from model.heads.record import HeadDescription, HeadRecord, ImageTokens, dpt_shapes
from model.heads.store import Head, make_head

ARCHS = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
    return (rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(fan_in))).astype(np.float32)


def classification(dim: int, layers: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"weight": _random(rng, 1000, (layers + 1) * dim), "bias": _random(rng, 1000)}


def segmentation(dim: int, layers: int, classes: int = 150, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    width = layers * dim
    return {
        "decode_head.conv_seg.weight": _random(rng, classes, width, 1, 1),
        "decode_head.conv_seg.bias": _random(rng, classes),
        "decode_head.bn.weight": 1 + 0.3 * _random(rng, width),
        "decode_head.bn.bias": _random(rng, width),
        "decode_head.bn.running_mean": _random(rng, width),
        "decode_head.bn.running_var": rng.uniform(0.2, 2, width).astype(np.float32),
        "decode_head.bn.num_batches_tracked": np.array(40_000),
    }


def linear_depth(dim: int, layers: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    waves = np.cos(np.pi * np.outer(np.arange(256) / 256, np.arange(4)))  # so that neighbouring bins agree
    weight = waves @ _random(rng, 4, 2 * dim * layers) + _random(rng, 256, 2 * dim * layers)
    return {
        "decode_head.conv_depth.weight": weight.astype(np.float32)[:, :, None, None],
        "decode_head.conv_depth.bias": _random(rng, 256),
    }


def dpt(dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = {f"decode_head.{name}": _random(rng, *shape) for name, shape in dpt_shapes(dim).items()}
    state["decode_head.conv_depth.head.4.bias"] += 1  # otherwise the last ReLU could make all depths 0
    return state


def checkpoint(tensors: dict[str, np.ndarray]) -> Any:
    """Return what mmcv saves: the tensors, the state of an optimizer, and notes with a numpy scalar."""
    import torch

    state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    moments = {0: {"step": 38400, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    return {
        "meta": {"mmcv_version": "1.5.0", "iter": 38400, "hook_msgs": {"best_score": np.float32(0.3)}, "CLASSES": None},
        "state_dict": state,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
    }


def config_of(arch: str, registers: int = 0) -> ViTConfig:
    return dataclasses.replace(CONFIGS[arch], num_register_tokens=registers)


def tokens_of(config: ViTConfig, grid: tuple[int, int] = (3, 4), seed: int = 1) -> ImageTokens:
    """Return random tokens of every block, and the last block's after the norm of `norm_of`."""
    rng = np.random.default_rng(seed)
    count = 1 + config.num_register_tokens + grid[0] * grid[1]
    inner = {
        f"tokens.{i}": rng.standard_normal((count, config.embed_dim), dtype=np.float32) for i in range(config.depth)
    }
    last = normed(inner[f"tokens.{config.depth - 1}"], norm_of(config))
    return ImageTokens(last[0], last[1 + config.num_register_tokens :], grid, inner)


def norm_of(config: ViTConfig) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    weight = 1 + 0.3 * rng.standard_normal(config.embed_dim, dtype=np.float32)
    return weight, rng.standard_normal(config.embed_dim, dtype=np.float32)


def normed(tokens: np.ndarray, norm: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Apply layer normalisation in float64."""
    wide = tokens.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return (scaled * norm[0] + norm[1]).astype(np.float32)


def opened(read: tuple[HeadDescription, dict[str, np.ndarray]], config: ViTConfig) -> Head:
    """Return a head that was read from a file, as `open_head` returns a stored one."""
    description, tensors = read
    record = HeadRecord(
        **description.model_dump(), sha256="0" * 64, model="0" * 64, created="2026-01-01T00:00:00+00:00"
    )
    return make_head(record, tensors, config, norm_of(config))
