"""Store a random network in files, so that several processes of a benchmark can load it."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.config import ViTConfig, config_for
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import AttentionForm, GraphSpec, Precision
from model.vit import DinoVisionTransformer


class RandomModel:
    """A network with random weights, stored in `folder` as a weights file and as ONNX graphs. LayerScale is 0.5."""

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
        """Return the path of an ONNX graph, which is written on the first call. `size` is the input side in pixels."""
        path = self._folder / f"{size}-{precision}-{attention}.onnx"
        if not path.exists():
            spec = GraphSpec(size=(size, size), precision=precision, attention=attention)
            write_onnx(self._weights, self.config, spec, path)
        return path
