"""Run one evaluation of a model on a data set, and make its report."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.files import write_text
from training.data.dataset import Skipped
from training.evaluate import tasks
from training.evaluate.backbone import Backbone, spec_for
from training.evaluate.settings import (
    DepthSettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RetrievalSettings,
    SegmentationSettings,
    Task,
    make_settings,
)
from training.evaluate.task_data import Context, Track


@dataclass(frozen=True)
class Report:
    """The result of one evaluation.

    `columns` and `rows` are a table of the most important results, as text. `figures` contains all results as data.
    Percentages, such as accuracies, are fractions from 0 to 1. `notes` are sentences about what was left out and why.
    """

    task: Task
    model: str
    fingerprint: str
    protocol: dict[str, Any]
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    figures: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the report, without the table, as a dictionary that JSON can represent."""
        return {
            "task": self.task,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "protocol": self.protocol,
            "figures": self.figures,
            "notes": self.notes,
            "skipped": [{"path": s.name, "reason": s.reason} for s in self.skipped],
        }


def no_progress(what: str, total: int) -> Callable[[int], object]:
    """Return a function that ignores progress, so that no progress bar is shown."""
    return lambda count: None


def evaluate(
    task: Task,
    backbone: Backbone,
    data: str | Path,
    given: Mapping[str, Any] | None = None,
    *,
    cache: Path | None = None,
    track: Track = no_progress,
) -> Report:
    """Run one evaluation, and return its report.

    Args:
        task: the name of the evaluation task.
        backbone: the model.
        data: a folder or, for a task with class labels, any data that training accepts. docs/evaluation.md lists what
            each task needs.
        given: settings of the task that differ from its defaults.
        cache: folder where features are cached between calls. Segmentation and depth do not use it.
        track: function that starts a progress bar.

    Raises:
        ValueError: a setting or the data cannot be used, the features of an image are not finite, or the figures would
            be the same for every model. The message gives the reason.
        FloatingPointError: the loss or a weight of a head, or a figure, is not finite.
        OSError: the cache cannot be written.
    """
    settings = make_settings(task, given or {})
    blocks, depth = getattr(settings, "blocks", 1), len(backbone.model.blocks)
    if (most := blocks if isinstance(blocks, int) else max(blocks)) > depth:
        raise ValueError(f"{task} uses the last {most} blocks, but the model has {depth}: set blocks=N")
    context = Context(backbone, data, spec_for(backbone.spec, settings), settings.precision, cache, track)
    match settings:
        case KnnSettings():
            table, skipped = tasks.run_knn(context, settings)
        case LogisticSettings():
            table, skipped = tasks.run_logistic(context, settings)
        case LinearSettings():
            table, skipped = tasks.run_linear(context, settings)
        case SegmentationSettings():
            table, skipped = tasks.run_segmentation(context, settings)
        case DepthSettings():
            table, skipped = tasks.run_depth(context, settings)
        case RetrievalSettings():
            table, skipped = tasks.run_retrieval(context, settings)
        case _:
            raise AssertionError(task)
    _check_figures(table.figures, task)
    chosen = settings.model_dump(mode="json", exclude={"resize", "crop", "fit"})
    protocol = {"preprocess": context.spec.model_dump(mode="json"), **chosen, **table.protocol}
    return Report(
        task,
        backbone.name,
        backbone.fingerprint,
        protocol,
        table.columns,
        table.rows,
        table.figures,
        skipped,
        table.notes,
    )


def _check_figures(figures: Any, name: str) -> None:
    """Check that all numbers in nested dictionaries and lists of figures are finite.

    Raises:
        FloatingPointError: a number is NaN or infinite. The message names it, beginning with `name`.
    """
    if isinstance(figures, float) and not math.isfinite(figures):
        raise FloatingPointError(f"{name} is {figures}: it was computed from values that are NaN or too large")
    if isinstance(figures, Mapping | list | tuple):
        for key, value in figures.items() if isinstance(figures, Mapping) else enumerate(figures):
            _check_figures(value, f"{name}.{key}")


def print_report(report: Report, console: Console) -> None:
    """Print the protocol, the table, the notes and the first 20 skipped files of a report."""
    spec = report.protocol["preprocess"]
    size = f"short side {spec['resize'] or 'as it is'}, " + (f"crop {spec['crop']}" if spec["crop"] else "whole image")
    if "fit" in spec:
        size = f"{spec['fit']} to {spec['crop']}"
    rest = ", ".join(f"{key} {_short(value)}" for key, value in report.protocol.items() if key != "preprocess")
    console.print(f"{report.task} of {report.model}, fingerprint {report.fingerprint[:8]}", markup=False)
    console.print(f"protocol: {size}, {spec['interpolation']}; {rest}", markup=False, highlight=False)
    table = Table()
    for index, column in enumerate(report.columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    for item in report.skipped[:20]:
        console.print(f"skipped {item.name}: {item.reason}", markup=False, highlight=False)
    if len(report.skipped) > 20:
        console.print(f"... and {len(report.skipped) - 20} more; the file of --out lists all of them")


def _short(value: Any) -> str:
    return "/".join(str(part) for part in value) if isinstance(value, list) else str(value)


def write_json(report: Report, path: Path) -> None:
    """Write a report to a JSON file.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report.as_json(), indent=1) + "\n")
