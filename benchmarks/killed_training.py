"""Kill a training job at random moments, and check that it ends with the weights of an undisturbed one.

The same small training runs twice as a job of the kind `train`. The first job runs without interruption. While the
second one runs, the worker (`dinov2 worker`) or the training is killed with SIGKILL again and again, and a new worker
is started. Three kinds of kills take turns in random order:

    worker   only the worker: Linux sends SIGTERM to the training, which saves its state
    training only the training: the worker puts the job back into the queue
    both     both at the same moment: the training resumes from its last saved state

In the end, the results of both jobs must be identical to the bit: the checkpoint, the tensors of the last state, the
lines of metrics.jsonl (except times and memory) and the evaluations.

    python benchmarks/killed_training.py [--kills 20] [--seed 0] [--folder DIR]

The last line is the result as JSON. The exit status is 1 if the results differ.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.tiny_training import TINY  # noqa: E402
from benchmarks.training_crash import differences, make_photos, outcome  # noqa: E402
from service.jobs.process import holders  # noqa: E402
from service.jobs.records import FINISHED, Job, NewJob  # noqa: E402
from service.jobs.store import JobStore  # noqa: E402
from training.recipe import load_config  # noqa: E402
from training.train import train  # noqa: E402
from training.watch.monitor import read_lines  # noqa: E402

WORKER = (sys.executable, "-m", "cli", "worker", "--kinds", "train")
KINDS = ("worker", "training", "both")
STEPS_PER_EPOCH = 3
LIMIT_S = 600.0


def toml(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


def overrides(epochs: int) -> list[str]:
    """Return the settings of the training. It saves its state after every step."""
    settings = {**TINY, "epochs": epochs, "lr": 0.02, "save_every_minutes": 1e-9}
    return [f"{name}={toml(value)}" for name, value in settings.items()]


class Place:
    """A data folder with a job, and the worker that runs it."""

    def __init__(self, folder: Path, images: Path, epochs: int, worker: Sequence[str]) -> None:
        self.store = JobStore(folder)
        params = {"data": [str(images)], "recipe": "smoke", "overrides": overrides(epochs)}
        self.job = self.store.create(NewJob("train", params)).id
        self.out = self.store.folder(self.job) / "run"
        self._command = worker
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")},
            "DINOV2_DATA_DIR": str(folder),
            "DINOV2_JOB_ROOTS": str(images.parent),
            "DINOV2_LOG_LEVEL": "error",
            "OMP_NUM_THREADS": "1",
        }
        self._worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        """Start a worker if none runs."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(self._command, cwd=ROOT, env=self._environment)

    def kill(self, what: str) -> bool:
        """Kill the worker, the training, or both. Return whether a training was running."""
        assert self._worker is not None
        trainings = holders(self.store.folder(self.job) / "lock")
        pids = {"worker": [self._worker.pid], "training": trainings, "both": [*trainings, self._worker.pid]}[what]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what != "training":
            self._worker.wait()
        return bool(trainings)

    def ended(self) -> Job | None:
        """Return the job if it has ended."""
        job = self.store.get(self.job)
        return job if job.state in FINISHED else None

    def finish(self) -> Job:
        """Wait for the end of the job, and stop the worker."""
        self.start_worker()
        until = time.monotonic() + LIMIT_S
        while (job := self.ended()) is None:
            assert time.monotonic() < until, f"job {self.job} has not ended after {LIMIT_S} s"
            time.sleep(0.05)
        assert self._worker is not None
        self._worker.terminate()
        self._worker.wait()
        assert job.state == "succeeded", job.error
        return job


def disturb(place: Place, kills: int, moments: random.Random) -> dict[str, int]:
    """Kill processes of the job, and start a worker after each kill. Return how often each kind of kill happened while
    a training was running."""
    done = dict.fromkeys(KINDS, 0)
    left = [KINDS[number % len(KINDS)] for number in range(kills)]
    moments.shuffle(left)
    while left:
        place.start_worker()
        began, later = time.time(), moments.random() * 0.3
        if moments.random() < 0.25:
            wait_until = time.monotonic() + moments.random() * 4  # at any moment, also before the first step
            wanted = None
        else:
            wait_until, wanted = time.monotonic() + LIMIT_S, moments.randint(1, 3)
        while time.monotonic() < wait_until and place.ended() is None:
            lines = sum(line["time"] > began for line in read_lines(place.out / "metrics.jsonl"))
            if wanted is not None and lines >= wanted:
                time.sleep(later)
                break
            time.sleep(0.02)
        assert place.ended() is None, f"the job has ended after {sum(done.values())} kills: make it longer"
        if place.kill(left[-1]):
            print(f"killed after {len(read_lines(place.out / 'metrics.jsonl'))} steps: {left[-1]}", flush=True)
            done[left.pop()] += 1
    return done


def run_in_process(images: Path, overrides: Sequence[str], out: Path) -> None:
    """Train in this process, with one thread as the jobs do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(load_config("smoke", str(images), out, overrides), Console(quiet=True))
    finally:
        torch.set_num_threads(threads)


def compare(
    folder: Path, kills: int, seed: int, epochs: int | None = None, worker: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train with and without kills, and return the figures.

    Args:
        folder: the folder for both.
        kills: the number of kills.
        seed: the seed of their moments.
        epochs: the length of the training; None: long enough for so many kills.
        worker: the command of a worker; None: `dinov2 worker`. With another worker, the undisturbed training runs in
            this process and not as a job.

    Raises:
        AssertionError: the results differ, or a job failed.
    """
    epochs = epochs or 6 + kills
    images = folder / "images"
    make_photos(images)
    began = time.monotonic()
    if worker is None:
        whole = Place(folder / "whole", images, epochs, WORKER)
        whole.finish()
        out = whole.out
    else:
        out = folder / "whole"
        run_in_process(images, overrides(epochs), out)
    undisturbed_s = time.monotonic() - began
    killed = Place(folder / "killed", images, epochs, worker or WORKER)
    began = time.monotonic()
    done = disturb(killed, kills, random.Random(seed))
    job = killed.finish()
    seconds = time.monotonic() - began
    results = [outcome(killed.out), outcome(out)]
    for result in results:
        result["checkpoint"][2].pop("revision")  # of the code, which may be edited meanwhile
    wrong = differences(*results)
    assert not wrong, f"differs in {', '.join(wrong)}"
    return {
        "kills": done,
        "attempts": job.attempt,
        "steps": epochs * STEPS_PER_EPOCH,
        "seconds": round(seconds, 1),
        "undisturbed_seconds": round(undisturbed_s, 1),
        "bit_equal": True,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for the jobs, which is kept; default: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            figures = compare(given.folder or Path(temporary), given.kills, given.seed)
        except AssertionError as error:
            print(f"DIFFERS: {error}")
            return 1
    print(json.dumps({"benchmark": "killed_training", "seed": given.seed, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
