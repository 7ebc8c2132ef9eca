"""Measures the time of linear depth, DPT depth and linear segmentation, compared with one forward pass at 224 x 224.

    python benchmarks/vision_heads.py [--arch dinov2_vits14] [--out FILE.json]

Without `--arch`, the bundled model is measured. With `--arch`, a model of this size with random weights is measured.
The heads have random weights. Forward pass and heads take turns, so other work on the machine affects all of them. The
CPU time of all threads is measured, which depends less on other work than wall time does, and the fastest of the
repetitions counts. The time of a head is that of its task's `compute` and `encode`, which lead from the tokens to an
answer. The image has 348 x 348 pixels. numpy uses one thread, because several threads of its library OpenBLAS wait for
each other when other processes use the CPUs.
"""

import argparse
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy loads the library

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.artifact import Artifact, bundled_artifact, load_artifact  # noqa: E402
from model.config import CONFIGS  # noqa: E402
from model.convert import backbone_shapes  # noqa: E402
from model.cpus import available_cpus  # noqa: E402
from model.engines.onnxruntime_engine import OnnxEngine  # noqa: E402
from model.heads.record import HeadDescription, dpt_shapes, input_width  # noqa: E402
from model.heads.store import add_head, choose_head, open_head  # noqa: E402
from model.onnx_graph.build import write_onnx  # noqa: E402
from model.onnx_graph.spec import GraphSpec  # noqa: E402
from model.preprocess import REFERENCE_224, preprocess  # noqa: E402
from service.features.pipeline import View  # noqa: E402
from service.options import parse_options  # noqa: E402
from service.vision import tasks  # noqa: E402
from service.vision.linear import segment_linear  # noqa: E402
from service.vision.local import Vision  # noqa: E402

REPEAT = 40
DPT_REPEAT = 5


def random_artifact(arch: str, folder: Path) -> Artifact:
    """Return an artifact of this size with random weights, without the checks of a real export."""
    config = CONFIGS[arch]
    rng = np.random.default_rng(0)
    weights = {
        key: (rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
        for key, shape in backbone_shapes(config).items()
    }
    save_file(weights, folder / "weights.safetensors")
    write_onnx(weights, config, GraphSpec(size=(224, 224)), folder / "model.onnx")
    bundled = load_artifact(bundled_artifact(), derived_dir=folder)
    manifest = bundled.manifest.model_copy(update={"config": config, "name": arch, "preprocess": REFERENCE_224})
    files = {name: folder / name for name in ("weights.safetensors", "model.onnx")}
    return Artifact(path=folder, manifest=manifest, locations=files, derived_dir=folder / "derived")


def add_heads(artifact: Artifact) -> dict[str, HeadDescription]:
    """Add one head of each kind with random weights, and return the heads' descriptions, keyed by name."""
    config = artifact.manifest.config
    rng = np.random.default_rng(0)
    four = tuple(np.linspace(0, config.depth - 1, 4).round().astype(int).tolist())
    classes = tuple(map(str, range(150)))
    heads = [
        HeadDescription(
            name="linear1", kind="depth", layers=(config.depth - 1,), normed=False, depth_range=(0.001, 10), source="-"
        ),
        HeadDescription(name="linear4", kind="depth", layers=four, normed=False, depth_range=(0.001, 10), source="-"),
        HeadDescription(
            name="dpt",
            kind="depth",
            architecture="dpt",
            layers=four,
            normed=False,
            depth_range=(0.001, 10),
            source="-",
        ),
        HeadDescription(
            name="ade20k", kind="segmentation", layers=(config.depth - 1,), normed=True, classes=classes, source="-"
        ),
    ]
    for head in heads:
        if head.architecture == "dpt":
            shapes: dict[str, tuple[int, ...]] = dpt_shapes(config.embed_dim)
        else:
            rows = 256 if head.kind == "depth" else len(head.classes)
            shapes = {"weight": (rows, input_width(head.kind, len(head.layers), config.embed_dim)), "bias": (rows,)}
        tensors = {
            key: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02) for key, shape in shapes.items()
        }
        add_head(artifact, head, tensors)
    return {head.name: head for head in heads}


def work_of(vision: Vision, image: bytes) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the functions to measure, by name, and how often each is repeated."""
    heads = add_heads(vision.artifact)
    network_input = preprocess(np.asarray(Image.open(io.BytesIO(image))), vision.artifact.manifest.preprocess)[None]
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "forward pass": (lambda: vision.engine.run(network_input), REPEAT)
    }
    task = tasks.task("depth")
    for name in ("linear1", "linear4", "dpt"):
        analysed = vision.analyse(image, View(heads[name].outputs(vision.model.config)))
        for format_ in ("json", "npy", "png16", "png") if name == "linear4" else ("json",):
            options = parse_options(task.options, {"head": name, "format": format_})

            def run(analysed: Any = analysed, options: Any = options) -> None:
                task.encode([task.compute(analysed, options, vision.model)], options)

            work[f"depth, {name}, {format_}"] = (run, DPT_REPEAT if name == "dpt" else REPEAT)
    analysed = vision.analyse(image, View())
    head = open_head(vision.artifact, choose_head(vision.artifact, "segmentation", "ade20k"))
    work["segmentation, 150 classes"] = (lambda: segment_linear(head, analysed), REPEAT)
    return work


def measure(vision: Vision, image: bytes) -> dict[str, float]:
    """Return the shortest CPU time of each function in milliseconds."""
    work = work_of(vision, image)
    best = dict.fromkeys(work, float("inf"))
    for turn in range(REPEAT):
        for name, (function, repeat) in work.items():
            if turn < repeat:
                started = time.process_time()
                function()
                best[name] = min(best[name], 1000 * (time.process_time() - started))
    return best


def main() -> None:
    """Measure, print a table, and write a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(CONFIGS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (348, 348, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.arch is None:
            artifact = load_artifact(bundled_artifact(), derived_dir=Path(folder))
        else:
            artifact = random_artifact(arguments.arch, Path(folder))
        engine = OnnxEngine(artifact.file("model.onnx"), threads=available_cpus(), inner="always")
        vision = Vision(dataclasses.replace(artifact), engine, threads=available_cpus())
        best = measure(vision, buffer.getvalue())
    forward = best["forward pass"]
    print(f"{artifact.manifest.name}, {available_cpus()} CPUs")
    for name, ms in best.items():
        print(f"{name:<28} {ms:8.2f} ms  {ms / forward:6.2f} forward passes")
    if arguments.out is not None:
        rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        rows[artifact.manifest.name] = {
            "cpus": available_cpus(),
            "cpu_ms": {name: round(ms, 3) for name, ms in best.items()},
            "forward_passes": {name: round(ms / forward, 3) for name, ms in best.items()},
        }
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
