"""Show the progress of a run and write its log files. The progress is a bar in a terminal, and plain lines elsewhere.

    metrics.jsonl      one JSON line every `log_every` steps: losses, schedules, speed, waiting, memory, gradients
    evaluations.jsonl  one JSON line per evaluation during the run: k-NN and other measurements
    events.jsonl       warnings, rollbacks and other messages; no line is ever removed

A resumed run repeats the steps after its checkpoint. The old lines for these steps are removed from metrics.jsonl and
evaluations.jsonl. TensorBoard and Weights & Biases get the same metrics (`training/watch/sinks.py`). A write error is
reported once and never stops the run.

The CPU queues work for a GPU ahead of time. To read a tensor's value, the CPU must wait for the GPU. Metrics are
therefore passed as tensors, and only `write` and `evaluated` read their values, in one transfer. The clock stops during
evaluations and saves (`paused`), so `images_per_s` is the speed of training.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from model.files import write_text
from training.data.loader import WAIT_WORTH_A_WORD
from training.data.progress import tell
from training.watch.sinks import Sink

METRICS, EVALUATIONS, EVENTS = "metrics.jsonl", "evaluations.jsonl", "events.jsonl"
NO_CURVES = {"step", "time", "seconds"}
LINES_TO_WARN = 3  # consecutive slow log lines before a warning; a single slow line is noise
Figure = Tensor | float | str | None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in a file that has one object per line. If the file does not exist, return an empty list.

    Incomplete lines, which a killed process may leave, are skipped.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def cut_lines(path: Path, last_step: int) -> None:
    """Remove the lines for steps after `last_step` from a log file, because a resumed run writes them again. Also
    remove incomplete lines.

    The new file is written under another name and then renamed, so a complete file exists at all times.
    """
    if not path.exists():
        return
    kept = "".join(json.dumps(x) + "\n" for x in read_lines(path) if x.get("step", 0) <= last_step)
    if kept != path.read_text(errors="replace"):
        write_text(path, kept)


def to_numbers(figures: Mapping[str, Figure]) -> dict[str, float | str | None]:
    """Convert metrics to plain Python values, and return them in the same order.

    Tensors must be scalars on the same device, and are copied to the CPU in one transfer. A value that is not finite
    becomes None, because JSON cannot represent it.
    """
    tensors = {name: value.detach() for name, value in figures.items() if isinstance(value, Tensor)}
    numbers: dict[str, float | str | None] = {n: v for n, v in figures.items() if not isinstance(v, Tensor)}
    if tensors:
        stacked = torch.stack([value.reshape(()).float() for value in tensors.values()])
        numbers |= dict(zip(tensors, stacked.tolist(), strict=True))
    plain = {name: numbers[name] for name in figures}
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in plain.items()}


def in_words(seconds: float) -> str:
    """Return a duration as text, such as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes. For a GPU, this is the memory of the tensors on the GPU. For a
    CPU, it is the main memory of the process, or None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@dataclass(frozen=True)
class RunSize:
    """The size of a run: the total number of steps, the number of steps already done at the start (0 unless the run is
    resumed), and the number of images per step over all processes."""

    total_steps: int
    first_step: int
    batch_size: int


class Monitor:
    """A context manager that shows the progress of a run and writes its log files.

    Args:
        path: `metrics.jsonl` in the run's folder. The other files are in the same folder.
        size: the size of the run. Lines for steps after `size.first_step` are removed from the files.
        console: where messages are printed.
        active: True in one process of the run and False in the others. A monitor that is not active prints and writes
            nothing, and copies nothing from the device.
        device: the device whose memory is reported.
        sinks: further receivers of the metrics, such as TensorBoard.
        peak_flops: the total peak speed of all devices in operations per second (`training/watch/flops.py`). If it is
            None, MFU is not computed.
        advise: a function that takes the share of time spent waiting for images and returns the text of a warning.
    """

    def __init__(
        self,
        path: Path,
        size: RunSize,
        console: Console,
        *,
        active: bool = True,
        device: torch.device | None = None,
        sinks: Sequence[Sink] = (),
        peak_flops: float | None = None,
        advise: Callable[[float], str | None] = "{:.0%} of the time was spent waiting for images".format,
    ) -> None:
        self.console = console
        self._folder, self._batch_size, self._total_steps = path.parent, size.batch_size, size.total_steps
        self._active, self._device = active, device or torch.device("cpu")
        self._sinks, self._peak_flops, self._advise = list(sinks), peak_flops, advise
        self._steps, self._flops, self._waited, self._slow_lines = 0, 0.0, 0.0, 0
        self._since, self._failed = time.perf_counter(), set[str]()
        self._began, self._session_steps = time.monotonic(), 0  # for the time left
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
        )
        self._bar = active and console.is_terminal
        self._task = self._progress.add_task("train", total=size.total_steps, completed=size.first_step, figures="")
        if active:
            self.rewind(size.first_step)

    def __enter__(self) -> Self:
        if self._bar:
            self._progress.start()
        self._since, self._began = time.perf_counter(), time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._progress.stop()
        for sink in self._sinks:
            self.guarded(sink.name, sink.close)

    def rewind(self, step: int) -> None:
        """Remove the log lines for steps after `step`, and set the progress bar to `step`. The constructor does this
        for `size.first_step`. Call this method after a rollback.
        """
        self._start_line()
        if not self._active:
            return
        for name in (METRICS, EVALUATIONS):
            cut_lines(self._folder / name, step)
        self._progress.update(self._task, completed=step)

    def advance(self, steps_done: int, flops: float = 0.0) -> None:
        """Count one more finished step, and set the progress bar to `steps_done`.

        `flops` is the number of floating-point operations of the step over all processes (`training/watch/flops.py`).
        """
        self._steps += 1
        self._session_steps += 1
        self._flops += flops
        if self._active:
            self._progress.update(self._task, completed=steps_done)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the `with` block as time spent waiting for images. The training loop fetches each batch
        in such a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the `with` block from the training time. Use this for evaluations, saves and image
        sheets."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def write(self, steps_done: int, figures: Mapping[str, Figure]) -> dict[str, Any]:
        """Write a line to `metrics.jsonl` and return it. The line contains the metrics in `figures` and those that the
        monitor measures: speed, waiting time, memory and MFU.

        A monitor that is not active writes nothing and returns an empty dict.
        """
        if not self._active:
            self._start_line()
            return {}
        numbers = to_numbers(figures)  # waits for the device, so that its work is included in `seconds`
        seconds = max(time.perf_counter() - self._since, 1e-9)
        wait = self._waited / seconds
        line: dict[str, Any] = {"step": steps_done, **numbers}
        line["images_per_s"] = round(self._steps * self._batch_size / seconds, 1)
        line["data_wait_share"] = round(wait, 4)
        if (peak := peak_memory_bytes(self._device)) is not None:
            line["peak_memory_bytes"] = peak
        if self._peak_flops and self._flops:
            line["mfu"] = round(self._flops / seconds / self._peak_flops, 4)
        line["seconds"] = round(seconds, 3)  # training time since the last line
        line["time"] = round(time.time(), 1)
        self._start_line()
        self._append(METRICS, line)
        self._show(line)
        self._warn_of_waiting(steps_done, wait)
        return line

    def evaluated(self, steps_done: int, figures: Mapping[str, Figure]) -> None:
        """Write the metrics of an evaluation after `steps_done` steps to `evaluations.jsonl`, as one line."""
        if self._active:
            self._append(EVALUATIONS, {"step": steps_done, **to_numbers(figures)})

    def say(self, steps_done: int, kind: str, message: str) -> None:
        """Print a message and store it in `events.jsonl`. `kind` is a word such as warning, rollback or stop."""
        if self._active:
            self.tell(f"{kind}: {message}")
            self._append(EVENTS, {"step": steps_done, "kind": kind, "message": message, "time": round(time.time(), 1)})

    def tell(self, text: str) -> None:
        """Print a line with the time of day."""
        if self._active:
            tell(self.console, text)

    def _start_line(self) -> None:
        self._steps, self._flops, self._waited = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to the file `name`. Send the line's numbers to the sinks, unless the file is `events.jsonl`."""

        def write_file() -> None:
            # A failed write may leave an incomplete line: start a new one. Readers skip empty and incomplete lines.
            text = ("\n" if name in self._failed else "") + json.dumps(line) + "\n"
            with (self._folder / name).open("a") as file:
                file.write(text)

        self.guarded(name, write_file)
        if name == EVENTS:
            return
        numbers = {n: float(v) for n, v in line.items() if isinstance(v, int | float) and n not in NO_CURVES}
        for sink in list(self._sinks):
            if not self.guarded(sink.name, partial(sink.write, line["step"], numbers)):
                self._sinks.remove(sink)

    def guarded(self, name: str, action: Callable[[], object]) -> bool:
        """Run an action that may fail because of the disk or the network, and return whether it succeeded.

        The first failure is reported. Further failures are not reported until the action has succeeded again.
        """
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a client library may raise anything, and the run continues
            if name not in self._failed:
                again = name.endswith((".jsonl", ".html"))
                fate = " and tries again later" if again else " without it"
                self.tell(
                    f"warning: {name} cannot be written ({type(error).__name__}: {error}); the run continues{fate}"
                )
            self._failed.add(name)
            return False
        self._failed.discard(name)
        return True

    def _show(self, line: dict[str, Any]) -> None:
        remaining = (time.monotonic() - self._began) / max(self._session_steps, 1) * (self._total_steps - line["step"])
        parts = [
            f"epoch {line['epoch']:.2f}" if isinstance(line.get("epoch"), float) else "",
            (f"loss {line['loss']:.3f}" if isinstance(line.get("loss"), float) else "loss not finite"),
            (f"dino/lnK {line['dino_over_ln_k']:.3f}" if isinstance(line.get("dino_over_ln_k"), float) else ""),
            f"lr {line['lr']:.1e}" if isinstance(line.get("lr"), float) else "",
            f"{line['images_per_s']:.0f} img/s",
            f"mfu {line['mfu']:.0%}" if "mfu" in line else "",
            f"waits {line['data_wait_share']:.0%}" if line["data_wait_share"] >= WAIT_WORTH_A_WORD else "",
        ]
        shown = "  ".join(part for part in parts if part)
        self._progress.update(self._task, figures=shown)
        if not self._bar:
            self.tell(f"step {line['step']}/{self._total_steps}  {shown}  {in_words(remaining)} left")

    def _warn_of_waiting(self, steps_done: int, wait: float) -> None:
        self._slow_lines = self._slow_lines + 1 if wait > WAIT_WORTH_A_WORD else 0
        if self._slow_lines == LINES_TO_WARN:
            self.say(steps_done, "warning", f"step {steps_done}: {self._advise(wait)}")
