"""Kill training runs at random moments and check that they resume with identical results.

Each case is a small run with different settings, for instance with streamed images, a distillation, or a k-NN guard
that rolls the run back. The case first runs once without interruption. Then the same run is started, killed with
SIGKILL at a random moment and restarted, until it finishes. In half of the starts, the run saves its state after every
step and the disk is slow, so that many kills interrupt the writing of a state. The results must be bit-identical to the
results of the uninterrupted run: the lines of metrics.jsonl (except times and memory), the evaluations, the checkpoint,
and the tensors of the last state. No partial files may remain.

    python benchmarks/training_crash.py [--kills 100] [--seed 0] [--case NAME]... [--folder DIR]

The script prints a table and, as the last line, the result as JSON. The exit status is 1 if a run differs. The runs are
forked from a process that has imported torch, which saves seconds per start. tests/training/test_safety.py also kills
`python -m training`.
"""

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tiny_training import TINY
from model.checkpoint import load_checkpoint
from training import run as between
from training import train as loop
from training.config import TrainConfig
from training.state import find_state
from training.watch.monitor import read_lines

SETTINGS = TINY | {"epochs": 5, "lr": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "sinkhorn": {},
    "softmax, two heads, streamed": {
        "centering": "softmax",
        "shared_head": False,
        "ibot_bottleneck_dim": 4,
        "cache_bytes": 0,
        "micro_batch": 4,
    },
    "batch norm, sgd": {"centering": "batch_norm", "optimizer": "sgd_normalized"},
    "last phase, fp16": {
        "last_phase": {"share": 0.4, "global_size": 42, "local_size": 28},
        "precision": "fp16",
        "log_every": 2,
    },
    "distillation": {"ibot_patches": "all"},
    "not finite": {"log_every": 3},
    "k-NN guard": {"on_measure": "rollback", "eval_every_epochs": 0.4, "measure_margin": 20, "keep_states": 1},
}
MEASURED = {"time", "seconds", "images_per_s", "data_wait_share", "peak_memory_bytes", "mfu"}
BAD_STEP = 7  # the step of the case "not finite" with a non-finite loss, counted from 0


def make_photos(folder: Path) -> None:
    """Write 27 images of three classes to `folder`, and three files that are not images."""
    rng = np.random.default_rng(0)
    for label in ("apples", "pears", "plums"):
        (folder / label).mkdir(parents=True)
        for number in range(9):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 30)).save(folder / label / f"{number}.png")
        (folder / label / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")


def spoiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement for a training-step function that makes the loss of the step `BAD_STEP` non-finite."""

    def run(*arguments: Any) -> Any:
        terms, seen = step(*arguments)
        return (terms | {"loss": terms["loss"] * math.nan} if arguments[4] == BAD_STEP else terms), seen

    return run


def slow(sync: Callable[[int], None]) -> Callable[[int], None]:
    """Return a slower replacement for `os.fsync`, so that more kills interrupt the writing of a file."""

    def run(descriptor: int) -> None:
        time.sleep(0.004)
        sync(descriptor)

    return run


def changeable_knn(spec: Any, data: Any, backbone: torch.nn.Module) -> dict[str, dict[int, float]]:
    """Return a fake k-NN accuracy that depends only on the weights. The real one hardly changes in such a small run."""
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in backbone.state_dict().values())).digest()
    return {"cls": {10: digest[0] / 255}}


def child(config: TrainConfig, case: str) -> int:
    """Run the training and return the exit status. If a check stops the run, write its message to stopped.txt."""
    if config.save_every_minutes < 1:
        setattr(os, "fsync", slow(os.fsync))  # noqa: B010 - its type is wider
    if case == "not finite":
        loop.train_step = spoiled(loop.train_step)  # type: ignore[attr-defined]
    if case == "k-NN guard":
        between.report_knn = changeable_knn  # type: ignore[assignment,attr-defined]
    try:
        loop.train(config, Console(quiet=True))
    except between.RunStopped as stopped:
        (config.out / "stopped.txt").write_text(str(stopped))
    return 0


def start(config: TrainConfig, case: str) -> int:
    """Fork a child process that runs the training, and return its process id."""
    number = os.fork()
    if number == 0:
        status = 70
        try:
            status = child(config, case)
        except BaseException as error:  # noqa: BLE001 - no exception may reach the code of the parent
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return number


def ended_before(number: int, moment: Callable[[], bool]) -> bool:
    """Wait until the child process ends or `moment` returns true. If `moment` returns true first, kill the process.

    Return true if the process ended, or false if it was killed.

    Raises:
        AssertionError: the process ended with an exit status other than 0.
    """
    while not moment():
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            assert status == 0, f"exit status {os.waitstatus_to_exitcode(status)}"
            return True
        time.sleep(0.001)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return False


def never() -> bool:
    """Return False, so that a child process is never killed."""
    return False


def moment_in(out: Path, seconds: float, moments: random.Random) -> Callable[[], bool]:
    """Choose a random moment for a kill, and return a function that is true from that moment.

    In a quarter of the calls, the moment is at any time within `seconds`. Otherwise it is shortly after one of the next
    steps that the run in `out` writes to metrics.jsonl.
    """
    if moments.random() < 0.25:
        until = time.monotonic() + moments.random() * seconds
        return lambda: time.monotonic() > until
    metrics = out / "metrics.jsonl"
    began = time.time()
    n_lines, later = moments.randint(1, 4), moments.random() * 0.1
    at: list[float] = []

    def come() -> bool:
        if not at and sum(line["time"] > began for line in read_lines(metrics)) >= n_lines:
            at.append(time.monotonic() + later)
        return bool(at) and time.monotonic() > at[0]

    return come


def tensors_digest(value: Any) -> str:
    """Return a SHA-256 digest of all tensors in a nested dictionary, in the order of their names."""
    digest = hashlib.sha256()
    for kind in sorted(value):
        for name in sorted(value[kind]):
            digest.update(f"{kind}.{name}".encode() + value[kind][name].numpy().tobytes())
    return digest.hexdigest()


def outcome(out: Path) -> dict[str, Any]:
    """Return the results of the run in `out`, without times and other values that may differ between runs."""
    saved, broken = find_state(out)
    assert saved is not None
    assert not broken, broken
    half = [path.name for path in out.rglob("*.part")]
    assert not half, f"incomplete files: {half}"
    names = [path.stem for path in (out / "states").iterdir() if path.stem.isdecimal()]
    assert all(names.count(name) == 2 for name in names), f"incomplete states: {sorted(names)}"
    weights, vit, facts = load_checkpoint(out / "checkpoint.safetensors")
    facts["settings"].pop("save_every_minutes")
    skipped = sorted(
        (out / "skipped.txt").read_text().splitlines()
    )  # sorted, because the order of a stream depends on its threads
    files = {name: out / name for name in ("knn.json", "stopped.txt")}
    return {
        "lines": [{k: v for k, v in line.items() if k not in MEASURED} for line in read_lines(out / "metrics.jsonl")],
        "evaluations": read_lines(out / "evaluations.jsonl"),
        "state": (saved.step, saved.memory, tensors_digest(torch.load(saved.path, weights_only=True))),
        "skipped": skipped,
        "checkpoint": (tensors_digest({"backbone": weights}), vit, facts),
        **{name: path.read_text() if path.exists() else None for name, path in files.items()},
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Compare the results of two runs, and return the names of the results that differ."""
    wrong = [name for name in expected if name != "lines" and found.get(name) != expected[name]]
    steps = [b["step"] for a, b in zip(found["lines"], expected["lines"], strict=False) if a != b]
    if found["lines"] != expected["lines"]:
        wrong.append(f"lines from step {steps[0] if steps else '(their number)'}")
    return wrong


def run_case(
    case: str, folder: Path, photos: Path, teacher: Path, kills: int, moments: random.Random
) -> dict[str, Any]:
    """Kill the run of a case `kills` times, and compare each finished run with the uninterrupted one.

    When a run finishes, a new run is started. Return the figures of the case.

    Raises:
        AssertionError: the results of a run differ.
    """

    def config(out: Path, every_step: bool) -> TrainConfig:
        given = {**SETTINGS, **CASES[case], "data": photos, "out": out}
        given |= {"teacher": teacher} if case == "distillation" else {}
        return TrainConfig.model_validate(given | {"save_every_minutes": 1e-9 if every_step else 5})

    started = time.monotonic()
    ended_before(start(config(folder / "whole", False), case), never)
    seconds = time.monotonic() - started
    expected = outcome(folder / "whole")
    figures = {"kills": 0, "while_writing": 0, "runs": 0, "steps": expected["state"][0], "seconds": round(seconds, 2)}
    while figures["kills"] < kills:
        out = folder / f"run{figures['runs']}"
        ended = False
        while not ended:
            enough = figures["kills"] >= kills
            moment = never if enough else moment_in(out, seconds, moments)
            ended = ended_before(start(config(out, moments.random() < 0.5), case), moment)
            if not ended:
                figures["kills"] += 1
                figures["while_writing"] += any(out.rglob("*.part"))
        wrong = differences(outcome(out), expected)
        assert not wrong, f"{case}, after {figures['kills']} kills: differs in {', '.join(wrong)} (see {out})"
        figures["runs"] += 1
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills per case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="case to run; repeatable; default: all cases"
    )
    parser.add_argument("--folder", type=Path, help="folder for the runs, which is kept; default: a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(1)  # forked processes must not use the threads of the parent
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        make_photos(folder / "photos")
        teacher = folder / "teacher"
        settings = {**SETTINGS, "data": folder / "photos", "out": teacher, "epochs": 1}
        ended_before(start(TrainConfig.model_validate(settings), ""), never)
        print(f"{'case':<30}{'kills':>6}{'while writing':>15}{'runs':>6}{'steps':>7}", flush=True)
        for case in given.case or CASES:
            try:
                figures = run_case(
                    case,
                    folder / case.replace(" ", "-"),
                    folder / "photos",
                    teacher,
                    given.kills,
                    random.Random(f"{given.seed} {case}"),
                )
            except AssertionError as error:
                print(f"DIFFERS: {error}")
                return 1
            found[case] = figures
            print(
                f"{case:<30}{figures['kills']:>6}{figures['while_writing']:>15}{figures['runs']:>6}{figures['steps']:>7}",
                flush=True,
            )
    print(json.dumps({"benchmark": "training_crash", "seed": given.seed, "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
