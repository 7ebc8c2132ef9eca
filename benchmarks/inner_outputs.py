"""Measure the cost of marking inner outputs in a loaded graph: forward passes with and without them take turns.

    python benchmarks/inner_outputs.py [--arch dinov2_vits14] [--rounds 60] [--threads N]

Three ways to run one image of 224 x 224 pixels take turns, in a random order in each round: a session without inner
outputs, a session with them that returns only the features, and the same session when it returns all of them. The model
has random weights. The script prints the median time of each and the median of the rounds' ratios to the first, and
writes them to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_model import RandomModel
from model.config import CONFIGS
from model.cpus import available_cpus
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.protocol import Features

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", choices=CONFIGS, default="dinov2_vits14")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=available_cpus())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graph = RandomModel(arguments.arch, None, Path(folder)).graph(224)
        plain = OnnxEngine(graph, threads=arguments.threads)
        marked = OnnxEngine(graph, threads=arguments.threads, inner="always")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    every = (*Features._fields, *(name for name in marked.outputs if "." in name))
    ways = {
        "without": lambda: plain.run(pixels),
        "marked, features only": lambda: marked.run(pixels),
        "marked, all outputs": lambda: marked.run_outputs(pixels, every),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 3):
        for name, run in random.sample(list(ways.items()), len(ways)):
            began = time.perf_counter()
            run()
            if number >= 3:  # after the warm-up
                times[name].append(1e3 * (time.perf_counter() - began))
    result = {
        "command": " ".join(["python benchmarks/inner_outputs.py", *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "threads": arguments.threads,
        "load": round(os.getloadavg()[0], 2),
        "ways": {
            name: {
                "median_ms": round(statistics.median(taken), 2),
                "ratio": round(statistics.median(a / b for a, b in zip(taken, times["without"], strict=True)), 3),
            }
            for name, taken in times.items()
        },
    }
    for name, row in result["ways"].items():
        print(f"{name:22} {row['median_ms']:8.2f} ms  ratio {row['ratio']:.3f}")
    path = RESULTS / f"{result['date']}-inner-outputs.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
