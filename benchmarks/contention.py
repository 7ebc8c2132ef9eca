"""Measure the images/s and latency of two engine processes that share the CPUs, compared with one process alone.

    python benchmarks/contention.py [--model dinov2_vits14] [--seconds 10] [--rounds 3] [--engines onnxruntime torch]

Each process computes one image after another. The cases are one or two processes, one thread or one thread per CPU, and
threads that wait with or without spinning. Spinning is an option of ONNX Runtime. For torch, it is the default of
libgomp, and OMP_WAIT_POLICY=passive turns it off. All cases take turns in each round. The column `of alone` compares
the images/s of a case with the setting of the service, which is one process of the first engine with one thread per CPU
and no spinning. The value is the median of the ratios of all rounds. If two processes share the CPUs well, it is 1 and
the latency doubles, because each process has half of the machine.
"""

import argparse
import datetime
import itertools
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.random_model import RandomModel
from benchmarks.workers import Worker
from model.cpus import available_cpus
from training.watch.flops import describe_device

RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    engine: str
    processes: int
    threads: int
    spinning: bool


def run_case(workers: list[Worker], seconds: float) -> tuple[float, list[float]]:
    """Run one case. Return the total images/s and the latency of every request in seconds."""
    at = time.monotonic() + 0.2
    for worker in workers:
        worker.send(do="load", at=at, seconds=seconds, batch=1)
    answers = [worker.receive() for worker in workers]
    return sum(answer["done"] for answer in answers) / seconds, [s for answer in answers for s in answer["latencies"]]


def measure(
    model: RandomModel, name: str, size: int, cases: list[Case], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Run all cases in turns, and return one table row for each case."""
    workers: dict[Case, list[Worker]] = {}
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    latencies: dict[Case, list[float]] = {case: [] for case in cases}
    try:
        for case in cases:
            path = model.graph(size) if case.engine == "onnxruntime" else model.weights_file
            settings = {"size": size, "threads": case.threads, "spinning": case.spinning}
            extra = {"model": name, "depth": model.config.depth}
            workers[case] = [Worker(case.engine, path, **settings, **extra) for _ in range(case.processes)]
            for worker in workers[case]:
                worker.ask(do="run", batch=1)
        for number in range(rounds):
            for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
                rate, found = run_case(workers[case], seconds)
                rates[case].append(rate)
                latencies[case] += found
    finally:
        for worker in itertools.chain.from_iterable(workers.values()):
            worker.close()
    alone = np.array(rates[cases[0]])
    return [
        case._asdict()
        | {
            "images_per_s": round(float(np.median(rates[case])), 2),
            "of_alone": round(float(np.median(np.array(rates[case]) / alone)), 3),
            "requests": len(latencies[case]),
            "ms_p50": round(float(np.percentile(latencies[case], 50)) * 1e3, 1),
            "ms_p99": round(float(np.percentile(latencies[case], 99)) * 1e3, 1),
        }
        for case in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--depth", type=int, help="number of blocks; fewer blocks make a trial run faster")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=["onnxruntime", "torch"], default=["onnxruntime", "torch"])
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    arguments = parser.parse_args()
    cpus = available_cpus()
    cases = [
        Case(engine, processes, threads, spinning)
        for engine in arguments.engines
        for spinning in (False, True)
        for processes in (1, 2)
        for threads in sorted({1, cpus}, reverse=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = RandomModel(arguments.model, arguments.depth, Path(folder))
        rows = measure(model, arguments.model, arguments.size, cases, arguments.seconds, arguments.rounds)
    print(
        f"{'engine':<13}{'processes':>10}{'threads':>8}{'spinning':>9}{'img/s':>8}{'of alone':>9}"
        f"{'p50 ms':>9}{'p99':>9}"
    )
    for row in rows:
        print(
            f"{row['engine']:<13}{row['processes']:>10}{row['threads']:>8}{row['spinning']!s:>9}{row['images_per_s']:>8}"
            f"{row['of_alone']:>9}{row['ms_p50']:>9}{row['ms_p99']:>9}"
        )
    result = {
        "benchmark": "contention",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/contention.py", *sys.argv[1:]]),
        "model": arguments.model,
        "depth": model.config.depth,
        "size": arguments.size,
        "cpus": cpus,
        "machine": describe_device(torch.device("cpu")),
        "rows": rows,
    }
    print(json.dumps(result))
    out = arguments.out or RESULTS / f"{result['date']}-contention.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
