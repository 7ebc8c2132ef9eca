"""Measure arrangements of decoding beside the engine on the same cores, compared with the bound of the CPU.

    python benchmarks/decode_beside.py ARTIFACT IMAGES [--engine onnxruntime:fp32] [--variants beside between]

A pipeline in this process decodes and preprocesses JPEG files from the folder IMAGES, and runs the artifact's engine on
them in batches. It has no HTTP, so the figures show what an arrangement gains at most. The variants are:

    beside      decoding threads and engine threads share all cores, as in the service
    fewer       the engine has one thread fewer than there are cores
    nice5       as `beside`, but the decoding threads have a lower priority (nice 5; Linux only)
    nice19      as `beside`, but the decoding threads have the lowest priority
    batch       as `beside`, but the decoding threads do not interrupt others when they wake (SCHED_BATCH; Linux only)
    between     decoding waits during a pass, and all cores decode between two passes
    passes      as many passes as there are cores run at the same time, each with one thread

The bound assumes that no core is ever idle: 1 / (engine's seconds per image + decoding seconds per image / cores). Both
times are measured alone, in the same rounds. The variants take turns, and each round starts with another one. The table
shows the median over the rounds of images/s and of the share of the bound.
"""

import argparse
import datetime
import json
import os
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.artifact import load_artifact
from model.cpus import available_cpus
from model.decode import decode
from model.engines.choice import load_engine
from model.engines.protocol import Engine, FloatArray
from model.preprocess import PreprocessSpec, preprocess
from training.watch.flops import describe_device

RESULTS = Path(__file__).parent / "results"
NICE = {"nice5": 5, "nice19": 19}
VARIANTS = ("beside", "fewer", *NICE, "batch", "between", "passes")
PAUSE_S = 0.2


class Gate:
    """Lets either decoding threads or the engine run.

    The engine waits until no image is being decoded. Images whose decoding has not begun wait until the pass has ended.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._decoding = 0
        self._passing = False

    @contextmanager
    def decoding(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._passing)
            self._decoding += 1
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= 1
                self._changed.notify_all()

    @contextmanager
    def passing(self) -> Iterator[None]:
        with self._changed:
            self._passing = True
            self._changed.wait_for(lambda: not self._decoding)
        try:
            yield
        finally:
            with self._changed:
                self._passing = False
                self._changed.notify_all()


def decode_all(files: list[bytes], spec: PreprocessSpec, threads: int) -> float:
    """Decode all files in `threads` threads, and return the seconds per image."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda data: preprocess(decode(data), spec), files))
        return (time.perf_counter() - start) / len(files)


def pass_s(engine: Engine, pixels: FloatArray, seconds: float) -> float:
    """Run forward passes for `seconds` seconds, and return the seconds per image."""
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        engine.run(pixels)
        images += len(pixels)
    return (time.perf_counter() - start) / images


def lower(variant: str) -> None:
    """Lower the priority of the current thread, if the variant says so."""
    if variant in NICE:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE[variant])
    if variant == "batch":
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))


def pipeline(
    engines: list[Engine], files: list[bytes], spec: PreprocessSpec, batch: int, seconds: float, variant: str
) -> float:
    """Decode and embed images for `seconds` seconds, and return images/s. Each engine has a thread of its own."""
    gate = Gate() if variant == "between" else None
    source, lock, ended, cores = cycle(files), threading.Lock(), threading.Event(), available_cpus()
    decoded: queue.Queue[FloatArray] = queue.Queue(maxsize=4 * max(batch * len(engines), cores))

    def work() -> None:
        lower(variant)
        while not ended.is_set():
            with lock:
                data = next(source)
            with gate.decoding() if gate else nullcontext():
                pixels = preprocess(decode(data), spec)
            decoded.put(pixels)

    def embed(engine: Engine) -> float:
        """Return the images/s of one engine."""
        engine.run(np.stack([decoded.get() for _ in range(batch)]))
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            pixels = np.stack([decoded.get() for _ in range(batch)])
            with gate.passing() if gate else nullcontext():
                engine.run(pixels)
            images += batch
        return images / (time.perf_counter() - start)

    threads = [threading.Thread(target=work) for _ in range(cores)]
    for thread in threads:
        thread.start()
    try:
        with ThreadPoolExecutor(len(engines)) as pool:
            return sum(pool.map(embed, engines))
    finally:
        ended.set()
        while any(thread.is_alive() for thread in threads):
            try:
                decoded.get(timeout=0.05)  # a thread may wait for room
            except queue.Empty:
                continue


def measure(arguments: argparse.Namespace, variants: list[str], cores: int) -> dict[str, list[float]]:
    """Return, for each variant and for the bound, the images/s of each round."""
    artifact = load_artifact(arguments.artifact)
    spec = artifact.manifest.preprocess
    files = [path.read_bytes() for path in sorted(arguments.images.rglob("*.jpg"))[: arguments.files]]
    if not files:
        raise ValueError(f"{arguments.images}: no .jpg files")
    engine = load_engine(artifact, arguments.engine, threads=cores)
    other = {
        "fewer": [
            load_engine(artifact, arguments.engine, threads=max(1, cores - 1)) for _ in range("fewer" in variants)
        ],
        "passes": [load_engine(artifact, arguments.engine, threads=1) for _ in range(cores * ("passes" in variants))],
    }
    pixels = np.stack([preprocess(decode(files[i % len(files)]), spec) for i in range(arguments.batch)])

    def bound() -> float:
        return 1 / (pass_s(engine, pixels, arguments.seconds / 2) + decode_all(files, spec, cores))

    def of(variant: str) -> Callable[[], float]:
        chosen = other.get(variant, [engine])
        return lambda: pipeline(chosen, files, spec, arguments.batch, arguments.seconds, variant)

    runs = {"bound": bound} | {variant: of(variant) for variant in variants}
    names, speeds = list(runs), {name: [] for name in runs}
    for number in range(arguments.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE_S)
            speeds[name].append(runs[name]())
        print(f"round {number + 1}: {', '.join(f'{n} {s[-1]:.1f}' for n, s in speeds.items())}", file=sys.stderr)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of an exported model")
    parser.add_argument("images", type=Path, help="folder with .jpg files, at any depth")
    parser.add_argument("--engine", default="onnxruntime:fp32")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=1, help="images per pass")
    parser.add_argument("--files", type=int, default=64, help="number of different images")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    arguments = parser.parse_args()
    cores = available_cpus()
    speeds = measure(arguments, arguments.variants, cores)
    rows: list[dict[str, Any]] = []
    print(f"{'variant':<14}{'images/s':>10}{'of bound':>10}")
    for name, values in speeds.items():
        share = statistics.median(value / bound for value, bound in zip(values, speeds["bound"], strict=True))
        row = {"variant": name, "images_per_s": round(statistics.median(values), 2), "share_of_bound": round(share, 3)}
        rows.append(row | {"rounds": [round(value, 2) for value in values]})
        print(f"{name:<14}{row['images_per_s']:>10}{share:>10.1%}")
    result = {
        "benchmark": "decode_beside",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python benchmarks/decode_beside.py {arguments.artifact.name} {arguments.images.name}",
        "engine": arguments.engine,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "cores": cores,
        "machine": describe_device(torch.device("cpu")),
        "rows": rows,
    }
    out = arguments.out or RESULTS / f"{result['date']}-decode-beside.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
