"""Measures the largest input of each linear layer on given images.

These values are needed to build an fp8 TensorRT plan.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ViTConfig
from model.cpus import available_cpus
from model.engines.onnxruntime_engine import load_runtime
from model.onnx_graph.build import write_onnx
from model.onnx_graph.nodes import FloatArray, Weights
from model.onnx_graph.spec import GraphSpec


def measure_activations(weights: Weights, config: ViTConfig, pixels: FloatArray, *, batch: int = 4) -> dict[str, float]:
    """Run a model on images, and return the largest absolute input of every linear layer, keyed by layer name.

    The model runs in float32 on ONNX Runtime's CPU provider.

    Args:
        weights: the model's weights, keyed by Meta's parameter names.
        config: the model's configuration.
        pixels: normalised images [B, 3, H, W], similar to the images that will be served.
        batch: the number of images per forward pass.

    Raises:
        ValueError: H or W is not a multiple of the patch size, `pixels` is empty, or a layer's input is not finite.
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
    """Add an output `<layer>.largest` to the graph for every linear layer, and return the names of the layers.

    The output is the largest absolute value of the layer's input.
    """
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
