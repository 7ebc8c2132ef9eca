"""Compare int8 with bf16 in OpenVINO: the time of a random ViT-S, and the cosines of a trained model.

    python benchmarks/openvino_int8.py ARTIFACT IMAGES [--seconds 300] [--at-most 296]

IMAGES is a folder with `train/` and `val/`. In the static graphs, the inputs of linear layers are quantised to uint8 by
the largest range of the layer's input over 64 images of `train`, and the weights to int8 per output channel. All other
operators compute in bf16. In the scaled graphs, channels with large inputs are first scaled down as in SmoothQuant: the
factors are folded into the LayerNorm before attention and feed-forward, and into the values of attention. The other
rows are the int8 graph that `dinov2 export` writes, and int8 weights that OpenVINO converts to bf16.

The cosines are the lowest over the images of `val`, compared with float32. All graphs take turns in the measurement of
the time, and so does float32 in OpenVINO and in ONNX Runtime. On a busy machine, CPU times say more than wall times.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.artifact import load_artifact
from model.config import ViTConfig, config_for
from model.decode import decode
from model.engines import parity
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.openvino_engine import load_runtime
from model.folder import walk
from model.onnx_graph.build import write_onnx
from model.onnx_graph.linear import is_named
from model.onnx_graph.spec import GraphSpec
from model.vit import DinoVisionTransformer

RESULTS = Path(__file__).parent / "results"
CALIBRATION = 64
BATCHES = (1, 8)
Weights = dict[str, np.ndarray]
Ranges = dict[str, tuple[np.ndarray, np.ndarray]]
"""The smallest and the largest value of each input channel, by linear layer."""


def linear_layers(graph: Any) -> dict[str, Any]:
    """Return the matrix products with constant weights [in, out], by the name of the layer."""
    return {
        op.get_friendly_name().removesuffix(".matmul"): op
        for op in graph.get_ordered_ops()
        if op.get_type_name() == "MatMul" and op.input_value(1).get_node().get_type_name() == "Constant"
    }


class Graphs:
    """Makes graphs of one network. Their files are written to `folder`."""

    def __init__(self, weights: Weights, config: ViTConfig, size: tuple[int, int], folder: Path) -> None:
        self.config, self.size, self.folder = config, size, folder
        self.core, self.operators = load_runtime().Core(), load_runtime().opset13
        self.weights = weights

    def run_of(self, graph: Any, hint: str = "bf16", threads: int = 1) -> Callable[[np.ndarray], Any]:
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
            "ENABLE_CPU_PINNING": False,
        }
        request = self.core.compile_model(graph, "CPU", options).create_infer_request()
        return lambda pixels: request.infer({"pixels": pixels}, share_inputs=True)

    def graph(self, weights: Weights, precision: str = "fp32", float_layers: tuple[str, ...] = ()) -> Any:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.onnx"
        write_onnx(weights, self.config, GraphSpec(self.size, precision, float_layers=float_layers), path)
        return self.core.read_model(path)

    def ranges(self, weights: Weights, batches: list[np.ndarray]) -> Ranges:
        graph = self.graph(weights)
        for name, op in linear_layers(graph).items():
            op.input_value(0).get_tensor().add_names({f"input of {name}"})
        names = list(linear_layers(graph))
        graph.add_outputs([f"input of {name}" for name in names])
        run, found = self.run_of(graph, "f32"), {}
        for pixels in batches:
            outputs = run(pixels)
            for name in names:
                rows = outputs[f"input of {name}"].reshape(-1, outputs[f"input of {name}"].shape[-1])
                low, high = found.get(name, (rows[0], rows[0]))
                found[name] = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        return found

    def scaled(self, ranges: Ranges) -> Weights:
        """Return weights that compute the same function, scaled as in SmoothQuant with alpha 0.5."""
        weights, width = {name: np.array(array) for name, array in self.weights.items()}, self.config.embed_dim
        for block in range(self.config.depth):
            key, qkv = f"blocks.{block}", f"blocks.{block}.attn.qkv"
            for layer, norm in (("attn.qkv", "norm1"), ("mlp.fc1", "norm2"), ("attn.proj", None)):
                weight = weights[f"{key}.{layer}.weight"]  # [out, in]
                inputs = np.maximum(np.abs(ranges[f"{key}.{layer}"]).max(0), 1e-5)
                factors = np.sqrt(inputs / np.maximum(np.abs(weight).max(0), 1e-5)).astype(np.float32)
                weights[f"{key}.{layer}.weight"] = weight * factors
                if norm is None:  # the input is a weighted mean of the values, the last third of qkv
                    weights[f"{qkv}.weight"][2 * width :] /= factors[:, None]
                    weights[f"{qkv}.bias"][2 * width :] /= factors
                else:
                    weights[f"{key}.{norm}.weight"] /= factors
                    weights[f"{key}.{norm}.bias"] /= factors
        return weights

    def quantised(self, weights: Weights, ranges: Ranges | None, float_layers: tuple[str, ...] = ()) -> Any:
        """Return a graph with int8 weights, and with uint8 inputs of these ranges if `ranges` is not None."""
        graph, new = self.graph(weights), self.operators
        for name, op in linear_layers(graph).items():
            if any(is_named(name, layers) for layers in float_layers):
                continue
            weight = op.input_value(1).get_node().data.T
            scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
            steps = np.rint(weight / scale).astype(np.int8)
            weight = new.multiply(new.convert(new.constant(steps), "f32"), new.constant(scale))
            inputs = op.input_value(0)
            if ranges is not None:
                low, high = min(0.0, float(ranges[name][0].min())), float(ranges[name][1].max())
                step = (high - low) / 255
                low = -round(-low / step) * step  # so that 0 is exact
                edges = np.float32(low), np.float32(low + 255 * step)
                inputs = new.fake_quantize(inputs, *edges, *edges, 256).output(0)
            op.output(0).replace(new.matmul(inputs, weight, False, True).output(0))
        graph.validate_nodes_and_infer_types()
        return graph


def variants(graphs: Graphs, batches: list[np.ndarray]) -> dict[str, Any]:
    """Return the graphs that are compared. `batches` are the images that determine the ranges."""
    ends = ("mlp.fc2", "attn.proj")
    default = (*ends, f"blocks.{graphs.config.depth - 1}")
    ranges = graphs.ranges(graphs.weights, batches)
    scaled = graphs.scaled(ranges)
    balanced = graphs.ranges(scaled, batches)
    return {
        "bf16": graphs.graph(graphs.weights),
        "exported int8 graph": graphs.graph(graphs.weights, "int8", default),
        "int8 weights only": graphs.quantised(graphs.weights, None),
        "static, all layers": graphs.quantised(graphs.weights, ranges),
        "static, without fc2": graphs.quantised(graphs.weights, ranges, ends[:1]),
        "static, without fc2 and proj": graphs.quantised(graphs.weights, ranges, ends),
        "scaled, all layers": graphs.quantised(scaled, balanced),
        "scaled, without fc2": graphs.quantised(scaled, balanced, ends[:1]),
        "scaled, without fc2 and proj": graphs.quantised(scaled, balanced, ends),
        "scaled, without fc2, proj and the last block": graphs.quantised(scaled, balanced, default),
    }


def measure_cosines(artifact_path: Path, images: Path, at_most: int, folder: Path) -> dict[str, dict[str, float]]:
    artifact = load_artifact(artifact_path)
    manifest = artifact.manifest

    def pixels(part: str, count: int) -> list[np.ndarray]:
        files = sorted(Path(listed.path) for listed in walk(images / part) if listed.is_image)
        files = files[:: -(-len(files) // count)]
        parts = [files[top : top + parity.BATCH] for top in range(0, len(files), parity.BATCH)]
        decoded = [[decode(file.read_bytes()) for file in part] for part in parts]
        return [parity.pixels_at(batch, manifest.preprocess, manifest.input_size) for batch in decoded]

    graphs = Graphs(dict(artifact.weights), manifest.config, manifest.input_size, folder)
    val, rows = pixels("val", at_most), {}
    reference = graphs.run_of(graphs.graph(graphs.weights), "f32")
    wanted = [{name: reference(batch)[name].copy() for name in ("cls", "patches")} for batch in val]
    for variant, graph in variants(graphs, pixels("train", CALIBRATION)).items():
        run, lowest = graphs.run_of(graph), {"cls": 1.0, "patches": 1.0}
        for batch, exact in zip(val, wanted, strict=True):
            outputs = run(batch)
            for name in lowest:
                a, b = exact[name], outputs[name]
                lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
                lowest[name] = min(lowest[name], float(((a * b).sum(-1) / lengths).min()))
        rows[variant] = {"images": sum(map(len, val))} | {key: round(value, 5) for key, value in lowest.items()}
        print(f"{variant:<46} {rows[variant]}", flush=True)
    return rows


def measure_times(seconds: float, threads: int, folder: Path) -> dict[str, dict[str, float]]:
    config = config_for("dinov2_vits14")
    torch.manual_seed(0)
    weights = {name: tensor.numpy() for name, tensor in DinoVisionTransformer(config).state_dict().items()}
    pixels = {batch: torch.randn(batch, 3, 224, 224).numpy() for batch in BATCHES}
    graphs = Graphs(weights, config, (224, 224), folder)
    runs = {name: graphs.run_of(graph, threads=threads) for name, graph in variants(graphs, [pixels[8]]).items()}
    runs["fp32"] = graphs.run_of(graphs.graph(weights), "f32", threads)
    write_onnx(weights, config, GraphSpec((224, 224)), folder / "model.onnx")
    runs["ONNX Runtime fp32"] = OnnxEngine(folder / "model.onnx", threads=threads).run
    times: dict[tuple[str, int], list[tuple[float, float]]] = {(name, batch): [] for name in runs for batch in BATCHES}
    end, names, turn = time.monotonic() + seconds, list(runs), 0
    while time.monotonic() < end or turn < 2:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for batch in BATCHES:
                cpu, wall = time.process_time(), time.perf_counter()
                runs[name](pixels[batch])
                times[name, batch].append((time.process_time() - cpu, time.perf_counter() - wall))
        turn += 1
    rows: dict[str, dict[str, float]] = {}
    for (name, batch), own in times.items():
        base, mine = np.array(times["bf16", batch][1:]), np.array(own[1:])  # the first round prepares the runtime
        row: dict[str, float] = {"rounds": len(mine)}
        for column, clock in enumerate(("cpu", "wall")):
            best, median = mine[:, column].min(), np.median(base[:, column] / mine[:, column])
            row[f"{clock}_ms_per_image"] = round(1e3 * float(best) / batch, 1)
            row[f"{clock}_speed_to_bf16_best"] = round(float(base[:, column].min() / best), 2)
            row[f"{clock}_speed_to_bf16_median"] = round(float(median), 2)
        rows[f"{name}, batch {batch}"] = row
        print(f"{name}, batch {batch}: {row}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of an exported model")
    parser.add_argument("images", type=Path, help="folder with train/ and val/")
    parser.add_argument("--seconds", type=float, default=300, help="duration of the measurement of the time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-most", type=int, default=1000, help="images of val")
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    arguments = parser.parse_args()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result: dict[str, Any] = {"benchmark": "openvino-int8", "date": date, "openvino": load_runtime().__version__}
    result |= {"threads": arguments.threads, "load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        result["cosines"] = measure_cosines(arguments.artifact, arguments.images, arguments.at_most, Path(first))
        result["times"] = measure_times(arguments.seconds, arguments.threads, Path(second))
    out = arguments.out or RESULTS / f"{date}-openvino-int8.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
