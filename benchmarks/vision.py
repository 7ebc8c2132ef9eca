"""Measure the time that each vision task adds to a forward pass, in this process.

    python benchmarks/vision.py [--arch dinov2_vits14] [--image FILE] [--rounds 30] [--threads N]

Without `--arch`, the bundled model is measured, otherwise a model of this size with random weights. Both get heads with
random weights.

Each round runs, in turns, a plain forward pass of one image and every task on the same image. The time of a task is
that of its forward pass with the inner outputs that it needs, its computation, and the encoding of its answer. The
decoding of the image is measured separately, because every request decodes its image once. The script prints the
medians, and each task's ratio to the plain pass as the median of the rounds' ratios, and writes the result to
benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.vision_heads import add_heads, random_artifact
from model.artifact import bundled_artifact, load_artifact
from model.config import CONFIGS
from model.cpus import available_cpus
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.parity import sample_photos
from service.features.pipeline import View
from service.options import parse_options
from service.vision import tasks
from service.vision.local import Vision
from service.vision.pictures import png_bytes

RESULTS = Path(__file__).parent / "results"
STAGES = ("pass", "compute", "encode")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("segment", {"format": "rle"}),
    ("segment", {"format": "rle", "method": "cut"}),
    ("segment", {"format": "rle", "method": "multi"}),
    ("segment", {"format": "rle", "method": "cluster"}),
    ("attention", {"format": "json"}),
    ("attention", {"format": "overlay"}),
    ("attention", {"format": "figure", "blocks": "all"}),
    ("features", {"format": "npy"}),
    ("features", {"format": "pca"}),
    ("detect", {"format": "json"}),
    ("match", {"format": "json"}),
    ("depth", {"format": "json", "head": "linear4"}),
    ("depth", {"format": "json", "head": "dpt"}),
    ("analyze", {"outputs": "embedding,attention,mask,boxes,depth", "depth": {"head": "linear4"}}),
]


def run_ms(vision: Vision, name: str, options: dict[str, Any], images: list[bytes]) -> dict[str, float]:
    """Run a task and return the milliseconds of its passes, its computation and its encoding."""
    task = tasks.task(name)
    parsed = parse_options(task.options, options)
    view = task.view(parsed, vision.model)
    times = {"pass": 0.0, "compute": 0.0, "encode": 0.0}
    results = []
    for image in images:
        began = time.perf_counter()
        analysed = vision.analyse(image, view)
        passed = time.perf_counter()
        results.append(task.compute(analysed, parsed, vision.model))
        times["pass"] += passed - began
        times["compute"] += time.perf_counter() - passed
    began = time.perf_counter()
    task.encode(results, parsed)
    times["encode"] = time.perf_counter() - began
    return {stage: 1e3 * seconds for stage, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", choices=CONFIGS)
    parser.add_argument("--image", type=Path, help="image file; default: a generated image")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def load(arch: str | None, threads: int, folder: Path) -> Vision:
    """Return the bundled model, or one of this size with random weights, with heads in `folder`."""
    artifact = load_artifact(bundled_artifact(), derived_dir=folder) if arch is None else random_artifact(arch, folder)
    add_heads(artifact)
    return Vision(artifact, OnnxEngine(artifact.file("model.onnx"), threads=threads, inner="always"), threads)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Run all cases and write the result."""
    threads = arguments.threads or available_cpus()
    vision = load(arguments.arch, threads, folder)
    image = arguments.image.read_bytes() if arguments.image else png_bytes(sample_photos(1)[0])
    plain: list[float] = []
    times: list[list[dict[str, float]]] = [[] for _ in CASES]
    for number in range(arguments.rounds + 2):
        began = time.perf_counter()
        vision.analyse(image, View())
        if number >= 2:  # after the warm-up
            plain.append(1e3 * (time.perf_counter() - began))
        for (name, options), taken in zip(CASES, times, strict=True):
            task = tasks.task(name)
            measured = run_ms(vision, name, options, [image] * task.images[0])
            if number >= 2:
                taken.append({**measured, "images": task.images[0]})
    pass_ms = statistics.median(plain)
    print(f"{vision.artifact.name}: decoding and a plain pass {pass_ms:.1f} ms")
    rows = []
    for (name, options), taken in zip(CASES, times, strict=True):
        images = int(taken[0]["images"])
        row: dict[str, Any] = {"task": name, "options": options, "images": images}
        row |= {stage: round(statistics.median(each[stage] for each in taken), 2) for stage in STAGES}
        totals = [sum(each[stage] for stage in STAGES) for each in taken]
        ratios = [(total - images * base) / base for total, base in zip(totals, plain, strict=True)]
        row["added_passes"] = round(statistics.median(ratios), 3)
        rows.append(row)
        shown = " ".join(f"{key}={value}" for key, value in options.items())
        total = sum(row[stage] for stage in STAGES)
        print(f"{name:10} {shown:34} {total:8.1f} ms, adds {row['added_passes']:.2f} passes")
    result = {
        "command": " ".join(["python benchmarks/vision.py", *sys.argv[1:]]),
        "model": vision.artifact.name,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": threads,
        },
        "load": os.getloadavg()[0],
        "plain_pass_ms": round(pass_ms, 2),
        "tasks": rows,
    }
    path = RESULTS / f"{datetime.date.today()}-vision-{vision.artifact.manifest.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
