"""Small backbones of every kind with random weights, and functions that run them as ONNX graphs.

The weights are far from their initial values, so that every part affects the output.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from model.config import ViTConfig
from model.engines.protocol import Features
from model.onnx_graph.build import build_onnx
from model.onnx_graph.spec import GraphSpec

BASE = ViTConfig(embed_dim=64, depth=3, num_heads=4, patch_size=14, img_size=98, layerscale_init=0.3)
VARIANTS = {
    "mlp": BASE,
    "swiglu": dataclasses.replace(BASE, ffn="swiglu"),
    "registers": dataclasses.replace(BASE, num_register_tokens=4, pos_embed_rule="antialias"),
    "no layerscale": dataclasses.replace(BASE, layerscale_init=None, pos_embed_rule="size"),
}


def random_model(config: ViTConfig, seed: int = 0):
    import torch

    from model.vit import DinoVisionTransformer

    torch.manual_seed(seed)
    model = DinoVisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def arrays(model) -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


def random_pixels(batch: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 3, *size), dtype=np.float32)


def torch_features(model, pixels: np.ndarray) -> Features:
    import torch

    with torch.no_grad():
        found = model.forward_features(torch.from_numpy(pixels))
    return Features(*(found[f"x_norm_{part}"].numpy() for part in ("clstoken", "patchtokens", "regtokens")))


def session(graph: onnx.ModelProto | Path, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    model = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(graph: onnx.ModelProto | Path, pixels: np.ndarray) -> Features:
    return Features(*session(graph).run(["cls", "patches", "registers"], {"pixels": pixels}))


def built(model, spec: GraphSpec, activations: Mapping[str, float] | None = None) -> onnx.ModelProto:
    return build_onnx(arrays(model), model.config, spec, activations=activations)


def min_cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = (a.astype(np.float64) * b).sum(-1)
    return float((dot / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).min(initial=1.0))
