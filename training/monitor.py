"""What a run says: a progress bar for people, one JSON line per few steps for everything else.

Collapse, the way self-supervised training dies, shows in two numbers that every line carries: the DINO loss beside ln K
(a network that cannot tell photos apart sits exactly there) and the mean entropy of the teacher's targets for class
tokens (ln K: the targets say nothing). `dino_over_ln_k` that stays near 1 after a third of the run is the alarm.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

COLLAPSED = 0.99  # of ln K
LINES_TO_WARN = 3  # in a row: one bad line is noise


class Monitor:
    """Progress bar and `metrics.jsonl` of one run; a context manager. Appends, so a resumed run keeps its history."""

    def __init__(self, path: Path, total_steps: int, first_step: int, batch_size: int, console: Console) -> None:
        self.console = console
        self._path, self._batch_size = path, batch_size
        self._total_steps, self._flat_lines = total_steps, 0
        self._since, self._since_step = time.perf_counter(), first_step
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
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, steps_done: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=steps_done)

    def write(self, steps_done: int, figures: dict[str, float | str]) -> None:
        """One line of metrics.jsonl, with images/s since the last one, and the bar's figures; a warning at collapse."""
        now = time.perf_counter()
        speed = (steps_done - self._since_step) * self._batch_size / max(now - self._since, 1e-9)
        self._since, self._since_step = now, steps_done
        line = {"step": steps_done, **figures, "images_per_s": round(speed, 1), "time": round(time.time(), 1)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = f"loss {figures['loss']:.3f}  dino/lnK {figures['dino_over_ln_k']:.3f}  {speed:.0f} img/s"
        self._progress.update(self._task, figures=shown)
        if not self.console.is_terminal:
            self.console.print(f"step {steps_done}  {shown}")
        flat = float(figures["dino_over_ln_k"]) >= COLLAPSED and 3 * steps_done >= self._total_steps
        self._flat_lines = self._flat_lines + 1 if flat else 0
        if self._flat_lines == LINES_TO_WARN:
            self.console.print(
                f"warning: step {steps_done}: the DINO loss stays at ln K: the network tells no photos apart "
                "(collapse); lower teacher_temp, or train longer"
            )
