"""Measure the images/s of the engines on this machine's CPU, compared with other implementations and the CPU's limit.

    python benchmarks/engine.py [--model dinov2_vits14] [--sizes 224 518] [--batches 1 8] [--rounds 12]

The table has these rows: our backbone in torch, eager and compiled; our ONNX graph in ONNX Runtime in fp32 and int8,
and in OpenVINO in fp32 and bf16; the Dinov2Model of transformers, eager and compiled; and a plain `torch.onnx.export`
of this model (opset 18) in ONNX Runtime. All rows use the weights of one random network, because the speed does not
depend on the weights. The column `cosine` is the lowest cosine between the class tokens of the row and of torch eager.
For int8 and bf16, it is valid only for these random weights. Missing packages are listed below the table.

These rules make the comparison fair:

- All engines run in one process and take turns within each round, and each round starts with another engine. Other
  load, a hot cache or a throttled clock therefore affects all engines equally. `vs torch` is the speed relative to
  torch eager as the median over the rounds, and the column after it compares the best times.
- All engines use the same number of threads. A pause before each turn lets the threads of the previous engine sleep.
- With `--waiting passive`, which is the default and the setting of the service, waiting threads sleep at once in all
  runtimes. With `--waiting default`, they follow the default of each runtime. Threads that spin while they wait are a
  little faster if nothing else runs, but take cores from other programs (benchmarks/contention.py). Each setting
  favours different runtimes, so run both.
- Compilation, graph optimisation and `--warmup` rounds precede the measurement.
- GFLOP/s count the operations of the float32 network (training/watch/flops.py), also for int8. The limit is the faster
  one of two float32 matrix products, in torch and in ONNX Runtime, which take turns in the same rounds.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
PAUSE_S = 0.02


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, np.ndarray]:
    """Call the functions in turns, and return the seconds of each function in each round, as arrays [rounds].

    Each round starts with another function.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            runs[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the lowest cosine between corresponding rows of two arrays [B, D]."""
    return float(np.min(np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))))


def measure(
    case: Any, batches: list[int], engines: list[str], rounds: int, warmup: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the engines at one input size. Return one table row per batch size and engine, and a dictionary with
    the reason for each engine that cannot run.
    """
    from benchmarks.engine_peers import BUILDERS, MissingError, products
    from training.watch.flops import backbone_flops

    built, missing = {}, {}
    for name in engines:
        print(f"{case.size} px: building {name}", file=sys.stderr, flush=True)
        try:
            built[name] = BUILDERS[name](case)
        except MissingError as error:
            missing[name] = str(error)
        except Exception as error:  # noqa: BLE001  one failing engine must not end the run
            missing[name] = f"fails: {type(error).__name__}: {str(error)[:300]}"
    work, limits = products(case.threads, spinning=case.spinning)
    rows = []
    for batch in batches:
        pixels = np.random.default_rng(0).standard_normal((batch, 3, case.size, case.size), dtype=np.float32)
        reference, runs, cosines = built[engines[0]](pixels), {}, {}
        for name, run in list(built.items()):
            try:
                cosines[name] = lowest_cosine(reference, run(pixels))  # the first call may compile
            except Exception as error:  # noqa: BLE001
                missing[name] = f"fails at batch {batch}: {type(error).__name__}: {str(error)[:300]}"
                del built[name]
            else:
                runs[name] = lambda run=run, pixels=pixels: run(pixels)
        seconds = interleaved(runs | limits, rounds, warmup)
        limit = {name: float(work / seconds[name].min() / 1e9) for name in limits}
        eager, flops = seconds[engines[0]], backbone_flops(case.config, case.size)
        for name in runs:
            best = float(seconds[name].min())
            rows.append(
                {
                    "engine": name,
                    "size": case.size,
                    "batch": batch,
                    "images_per_s": round(batch / best, 2),
                    "images_per_s_median": round(batch / float(np.median(seconds[name])), 2),
                    "gflop_per_s": round(batch * flops / best / 1e9, 1),
                    "share_of_limit": round(batch * flops / best / 1e9 / max(limit.values()), 3),
                    "ratio_to_torch": round(float(np.median(eager / seconds[name])), 3),
                    "ratio_to_torch_best": round(float(eager.min() / best), 3),
                    "ratio_of_rounds": [
                        round(float(value), 2) for value in np.percentile(eager / seconds[name], [10, 90])
                    ],
                    "cosine": round(cosines[name], 6),
                    "limit_gflop_per_s": {key: round(value, 1) for key, value in limit.items()},
                }
            )
    return rows, missing


def print_table(rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    print(
        f"{'engine':<24}{'px':>5}{'batch':>6}{'img/s best':>12}{'median':>9}{'GFLOP/s':>9}{'of limit':>9}"
        f"{'vs torch':>9}{'best':>7}{'10-90 %':>12}{'cosine':>10}"
    )
    for row in rows:
        low, high = row["ratio_of_rounds"]
        print(
            f"{row['engine']:<24}{row['size']:>5}{row['batch']:>6}{row['images_per_s']:>12}"
            f"{row['images_per_s_median']:>9}{row['gflop_per_s']:>9}{row['share_of_limit']:>9.0%}"
            f"{row['ratio_to_torch']:>9}{row['ratio_to_torch_best']:>7}{f'{low}-{high}':>12}{row['cosine']:>10.6f}"
        )
    for row in {json.dumps(row["limit_gflop_per_s"]): row for row in rows}.values():
        print(f"limit at {row['size']} px, batch {row['batch']}: {row['limit_gflop_per_s']} GFLOP/s")
    for name, reason in missing.items():
        print(f"{name}: {reason}")


def main() -> None:
    from model.config import config_for
    from model.cpus import available_cpus

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="sides of the input in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measurement")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--waiting", choices=["passive", "default"], default="passive")
    parser.add_argument("--depth", type=int, help="number of blocks; fewer blocks make a trial run faster")
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    parser.add_argument("--skip", nargs="+", default=[], help="names of engines to leave out, as in the table")
    arguments = parser.parse_args()
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the environment variables of OpenMP were set")
    variables = PASSIVE if arguments.waiting == "passive" else {}
    os.environ.update(variables | {"OMP_NUM_THREADS": str(arguments.threads)})
    import torch

    from benchmarks.engine_peers import BUILDERS, make_case, versions
    from training.watch.flops import describe_device

    unknown = set(arguments.skip) - set(BUILDERS)
    if unknown:
        parser.error(f"--skip: unknown engines {sorted(unknown)}; the engines are {', '.join(BUILDERS)}")
    engines = [name for name in BUILDERS if name not in arguments.skip]
    config = config_for(arguments.model)
    if arguments.depth:
        config = replace(config, depth=arguments.depth)
    rows, missing = [], {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            spinning = arguments.waiting == "default"
            case = make_case(config, size, arguments.threads, spinning=spinning, folder=Path(folder))
            found, gone = measure(case, arguments.batches, engines, arguments.rounds, arguments.warmup)
        rows += found
        missing |= gone
    print_table(rows, missing)
    result = {
        "benchmark": "engine",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
        "model": arguments.model,
        "depth": config.depth,
        "threads": arguments.threads,
        "waiting": arguments.waiting,
        "variables": variables,
        "rounds": arguments.rounds,
        "machine": describe_device(torch.device("cpu")),
        "versions": versions(),
        "rows": rows,
        "missing": missing,
    }
    print(json.dumps(result))
    suffix = "" if arguments.waiting == "passive" else "-default-waiting"
    suffix += "" if arguments.model == "dinov2_vits14" else f"-{arguments.model}"
    suffix += "" if arguments.sizes == [224] else "-" + "-".join(map(str, arguments.sizes))
    out = arguments.out or RESULTS / f"{result['date']}-engine{suffix}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
