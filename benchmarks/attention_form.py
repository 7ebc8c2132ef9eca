"""Measure the time and memory of attention operators in a whole backbone, to choose the operator for ONNX graphs.

    python benchmarks/attention_form.py [--model dinov2_vits14] [--sizes 224 518 1022] [--rounds 9]

The operators are ONNX's standard `Attention` (opset 23), ONNX Runtime's `MultiHeadAttention`, which works in tiles on a
CPU, and torch's `scaled_dot_product_attention`. The first two run in ONNX Runtime. Each operator runs in a separate
process with the same number of threads. They take turns within each round, and each round starts with another operator.
The column `MB` is the increase of resident memory from the loaded engine to the peak of the forward passes. The peak is
reset after loading, which only Linux supports. Batches above 1 are skipped at sizes above `--largest-batched` pixels.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_model import RandomModel
from benchmarks.workers import Worker
from model.cpus import available_cpus
from training.watch.flops import describe_device

RESULTS = Path(__file__).parent / "results"
FORMS = ("standard", "tiled", "torch")


def start(model: RandomModel, name: str, form: str, size: int, threads: int) -> Worker:
    engine = "torch" if form == "torch" else "graph"
    path = model.weights_file if form == "torch" else model.graph(size, attention=form)  # type: ignore[arg-type]
    extra = {"model": name, "depth": model.config.depth}
    return Worker(engine, path, size=size, threads=threads, spinning=False, **extra)


def measure(model: RandomModel, name: str, size: int, batch: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure all operators at one image size and batch size. Return one table row for each operator."""
    workers = {form: start(model, name, form, size, threads) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    loaded, peak = {}, {}
    try:
        for form, worker in workers.items():
            loaded[form] = worker.ask(do="memory", batch=batch)["rss_mb"]
            worker.ask(do="run", batch=batch)  # warms up
        for number in range(rounds):
            turn = number % len(FORMS)
            for form in FORMS[turn:] + FORMS[:turn]:
                seconds[form].append(workers[form].ask(do="run", batch=batch)["s"])
        for form, worker in workers.items():
            peak[form] = worker.ask(do="memory", batch=batch)["peak_mb"]
    finally:
        for worker in workers.values():
            worker.close()
    standard = np.array(seconds["standard"])
    return [
        {
            "form": form,
            "size": size,
            "batch": batch,
            "ms_median": round(float(np.median(seconds[form])) * 1e3, 1),
            "ms_best": round(min(seconds[form]) * 1e3, 1),
            "speed_of_standard": round(float(np.median(standard / np.array(seconds[form]))), 3),
            "peak_growth_mb": None if peak[form] is None else round(peak[form] - loaded[form], 1),
        }
        for form in FORMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--depth", type=int, help="number of blocks; fewer blocks make a trial run faster")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518, 1022])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--largest-batched", type=int, default=518, help="largest size in pixels with batches above 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = RandomModel(arguments.model, arguments.depth, Path(folder))
        for size in arguments.sizes:
            for batch in arguments.batches:
                if batch == 1 or size <= arguments.largest_batched:
                    rows += measure(model, arguments.model, size, batch, arguments.threads, arguments.rounds)
    print(f"{'form':<10}{'px':>6}{'batch':>6}{'ms median':>11}{'best':>9}{'x standard':>12}{'MB':>9}")
    for row in rows:
        print(
            f"{row['form']:<10}{row['size']:>6}{row['batch']:>6}{row['ms_median']:>11}{row['ms_best']:>9}"
            f"{row['speed_of_standard']:>12}{'-' if row['peak_growth_mb'] is None else row['peak_growth_mb']:>9}"
        )
    result = {
        "benchmark": "attention_form",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/attention_form.py", *sys.argv[1:]]),
        "model": arguments.model,
        "depth": model.config.depth,
        "threads": arguments.threads,
        "machine": describe_device(torch.device("cpu")),
        "rows": rows,
    }
    print(json.dumps(result))
    out = arguments.out or RESULTS / f"{result['date']}-attention-form.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
