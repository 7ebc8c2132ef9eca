"""The files of one random network, shared by benchmarks with several processes."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.config import ViTConfig, config_for
from model.onnx_graph.build import AttentionForm, GraphSpec, Precision, write_onnx
from model.vit import DinoVisionTransformer


class RandomModel:
    """A network with random weights, stored in `folder` as weights and as graphs. LayerScale is 0.5."""

    def __init__(self, name: str, depth: int | None, folder: Path) -> None:
        torch.manual_seed(0)
        config = config_for(name)
        self.config: ViTConfig = replace(config, layerscale_init=0.5, **({"depth": depth} if depth else {}))
        self._folder = folder
        state = DinoVisionTransformer(self.config).state_dict()
        self._weights = {key: tensor.numpy() for key, tensor in state.items()}
        self.weights_file = folder / "weights.safetensors"
        save_file(state, self.weights_file)

    def graph(self, size: int, *, precision: Precision = "fp32", attention: AttentionForm = "standard") -> Path:
        """Return the graph's path, writing it once per input side in pixels, precision and form of attention."""
        path = self._folder / f"{size}-{precision}-{attention}.onnx"
        if not path.exists():
            spec = GraphSpec(size=(size, size), precision=precision, attention=attention)
            write_onnx(self._weights, self.config, spec, path)
        return path
