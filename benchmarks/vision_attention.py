"""Measure how much longer a request for attention maps or patch features takes than a plain forward pass.

    python benchmarks/vision_attention.py [--model dinov2_vits14] [--rounds 20] [--threads 2]

The model has random weights. One image of 640 x 480 pixels is decoded, resized and run at 224 x 224 pixels by ONNX
Runtime in float32, in this process and without a server. In each round, the plain pass and every request take turns.
The plain pass decodes the image and computes its features, and a request also computes and encodes the answer.

The script prints the shortest and the median time of each, the time that a request adds (the difference of the shortest
times), and its ratio to the plain pass. On a machine with other load, use `--clock cpu`: the times are then CPU times,
and one thread runs everything. The result is written to benchmarks/results/.
"""

import argparse
import datetime
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_model import RandomModel
from model.cpus import available_cpus
from model.engines.choice import load_engine
from model.export.artifact import export_artifact
from model.export.options import Backbone, ExportOptions
from model.preprocess import REFERENCE_224
from service.features.pipeline import PLAIN
from service.vision.local import Vision

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention, last block": ("attention", {}),
    "attention, all blocks and heads": ("attention", {"blocks": "all"}),
    "attention, mass 0.6": ("attention", {"blocks": "all", "mass": 0.6}),
    "attention, rollout": ("attention", {"fuse_blocks": "rollout"}),
    "attention, rollout by maximum": ("attention", {"fuse_blocks": "rollout", "fuse_heads": "max"}),
    "attention, all blocks, npy": ("attention", {"blocks": "all", "format": "npy"}),
    "attention, png": ("attention", {"format": "png"}),
    "attention, overlay": ("attention", {"format": "overlay"}),
    "attention, figure of all heads": ("attention", {"format": "figure"}),
    "attention, figure of fused heads": ("attention", {"format": "figure", "fuse_heads": "mean"}),
    "features, npy": ("features", {"format": "npy"}),
    "features, json": ("features", {"format": "json"}),
    "features, four layers, npy": ("features", {"format": "npy", "layers": "2,5,8,11"}),
    "features, pca": ("features", {"format": "pca"}),
    "features, pca of the foreground": ("features", {"format": "pca", "foreground": True}),
}


def a_picture() -> bytes:
    """Return a JPEG of 640 x 480 pixels with smooth shapes."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def open_random(name: str, threads: int, folder: Path) -> Vision:
    random = RandomModel(name, None, folder)
    weights = load_file(random.weights_file)
    backbone = Backbone("random", weights, random.config, REFERENCE_224, {}, "Apache-2.0")
    artifact = export_artifact(backbone, folder / "artifacts", ExportOptions())
    return Vision(artifact, load_engine(artifact, "onnxruntime", threads=threads), threads)


def measure(vision: Vision, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the times in milliseconds of the plain pass and of each request, one per round."""
    image = a_picture()

    def request(name: str, options: dict[str, Any]) -> Callable[[], object]:
        def run() -> object:
            answer = vision.run(name, [image], **options)
            return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY) if isinstance(answer, dict) else answer

        return run

    work: dict[str, Callable[[], object]] = {"plain pass": lambda: vision.analyse(image, PLAIN)}
    work |= {label: request(*parts) for label, parts in REQUESTS.items()}
    times: dict[str, list[float]] = {label: [] for label in work}
    for turn in range(rounds + 1):
        for label, run in work.items():
            started = clock()
            run()
            if turn:  # the first round warms up
                times[label].append(1000 * (clock() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--date", default=datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    arguments = parser.parse_args()
    cpu = arguments.clock == "cpu"
    if cpu:
        arguments.threads = 1
    with tempfile.TemporaryDirectory() as folder:
        vision = open_random(arguments.model, arguments.threads, Path(folder))
        times = measure(vision, arguments.rounds, time.thread_time if cpu else time.perf_counter)
        vision.engine.close()
    plain = min(times["plain pass"])
    table = Table("request", "shortest ms", "median ms", "added ms", "added / pass")
    rows = {}
    for label, each in times.items():
        shortest, middle = min(each), statistics.median(each)
        added = shortest - plain
        table.add_row(label, f"{shortest:.1f}", f"{middle:.1f}", f"{added:.1f}", f"{added / plain:.2f}")
        rows[label] = {"shortest_ms": round(shortest, 2), "median_ms": round(middle, 2), "added_ms": round(added, 2)}
    Console().print(table)
    result = {
        "benchmark": "vision-attention",
        "date": arguments.date,
        "model": arguments.model,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "clock": arguments.clock,
        "times": rows,
    }
    path = Path(__file__).parent / "results" / f"{arguments.date}-vision-attention.json"
    path.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
