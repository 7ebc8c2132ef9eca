"""Measures how large the inputs of each linear layer are on given images. fp8 needs these ranges in advance."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ViTConfig
from model.cpus import available_cpus
from model.engines.onnxruntime_engine import load_runtime
from model.onnx_graph.build import GraphSpec, write_onnx
from model.onnx_graph.nodes import FloatArray, Weights


def measure_activations(weights: Weights, config: ViTConfig, pixels: FloatArray, *, batch: int = 4) -> dict[str, float]:
    """Return the largest absolute input of every linear layer, by layer name, in float32 on ONNX Runtime's CPU
    provider.

    Args:
        weights: Meta's parameter names to arrays.
        pixels: normalised images [B, 3, H, W], like those to be served.
        batch: images per forward pass.

    Raises:
        ValueError: a side that is not a multiple of the patch size, no images, or a value that is not finite.
    """
    ort = load_runtime()
    if not len(pixels):
        raise ValueError("at least one image is needed to measure activations")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        write_onnx(weights, config, GraphSpec((pixels.shape[2], pixels.shape[3]), outputs=("cls",)), path)
        graph = onnx.load(path, load_external_data=False)
        layers = _add_largest(graph)
        onnx.save(graph, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cpus()
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        parts = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
        per_part = [session.run([f"{layer}.largest" for layer in layers], {"pixels": part}) for part in parts]
    largest = np.max(np.array(per_part, dtype=np.float64), axis=0)
    if not np.isfinite(largest).all():
        raise ValueError(
            f"layers whose inputs are not finite: {[layers[i] for i in np.flatnonzero(~np.isfinite(largest))]}"
        )
    return dict(zip(layers, map(float, largest), strict=True))


def _add_largest(model: onnx.ModelProto) -> list[str]:
    """Add an output `<layer>.largest` for every linear layer; return the layers."""
    graph, layers = model.graph, []
    stored = {tensor.name for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type != "MatMul" or node.input[1] not in stored:
            continue
        layer = node.input[1].removesuffix(".weight")
        layers.append(layer)
        graph.node.append(helper.make_node("Abs", [node.input[0]], [f"{layer}.absolute"]))
        graph.node.append(helper.make_node("ReduceMax", [f"{layer}.absolute"], [f"{layer}.largest"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{layer}.largest", TensorProto.FLOAT, []))
    return layers
