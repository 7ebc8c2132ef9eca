"""The command that compares two models on a frozen set of images: may the challenger replace the champion?"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.shared import DATA, MODEL_NAMES, ArtifactsDirOption, ThreadsOption, decode_limits, fail, settings_for
from cli.shared import _warn as warn
from model.files import write_text
from model.pooling import DEFAULT_POOLING, Pooling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.jobs.verdict import GateRules, Verdict

REFUSED = 3
"""The exit status if the challenger may not replace the champion. An error has the status 2."""


def compare(
    champion: Annotated[str, typer.Argument(help=f"The live model: auto, {MODEL_NAMES}.")],
    challenger: Annotated[str, typer.Argument(help=f"The new model: {MODEL_NAMES}.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Folder of images, with one subfolder per class if the images have classes. With train/ and val/, "
            "the images of val/ are classified by those of train/."
        ),
    ],
    set_file: Annotated[
        Path | None,
        typer.Option(
            "--set", help="List of the frozen set. It is written if it does not exist. Default: in the data folder."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option(min=2, help="Maximum number of images in a new list, for each of train/ and val/.")
    ] = 5000,
    labels: Annotated[bool, typer.Option(help="Whether the folders of a new list are classes.")] = True,
    rule: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A rule of the gate, e.g. margin=0.02. It can be repeated."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Engine of both models: auto, fastest, or runtime[:precision]. Default: that of the service. "
            "[DINOV2_ENGINE]"
        ),
    ] = None,
    threads: ThreadsOption = None,
    pooling: Annotated[Pooling, typer.Option(help="Features that form the vector.")] = DEFAULT_POOLING,
    data_dir: ArtifactsDirOption = DATA,
    out: Annotated[Path | None, typer.Option(help="File to which the verdict is written as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Decide whether a new model (the challenger) may replace the live one (the champion). Both are compared on the
    same frozen set of images. The exit status is 0 if the challenger passes and 3 if it is refused."""
    from service.errors import ServiceError
    from service.jobs.compare import CompareOptions, Progress
    from service.jobs.compare import compare as compare_models
    from service.jobs.live_sample import drawn_live
    from service.model_list import named_artifact

    try:
        settings = settings_for(None, data_dir)
        options = CompareOptions(
            engine=engine or settings.engine,
            threads=threads,
            pooling=pooling,
            labels=labels,
            most=most,
            set_file=set_file,
            limits=decode_limits(settings),
            rules=read_rules(rule or []),
        )
        progress = Progress(say=lambda line: typer.echo(line, err=True), advance=_ProgressLines().advance)
        old, new = (named_artifact(name, data_dir, progress.say, warn)[0] for name in (champion, challenger))
        with drawn_live(settings, progress.say) as live:
            verdict = compare_models(old, new, data, data_dir, options, progress, live)
        if out is not None:
            write_text(out, json.dumps(verdict.as_json(), indent=2) + "\n")
    except (ServiceError, ValueError, OSError, ModuleNotFoundError) as error:
        raise fail(error) from error
    if as_json:
        typer.echo(json.dumps(verdict.as_json(), indent=2))
    else:
        print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(code=REFUSED)


def read_rules(words: list[str]) -> "GateRules":
    """Return the rules of the gate that KEY=VALUE arguments set. A value is a JSON number or list.

    Raises:
        ValueError: an argument has another form, the rule is unknown, or its value is not allowed.
    """
    from service.jobs.verdict import GateRules

    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--rule {word}: must be KEY=VALUE, for example margin=0.02")
        try:
            values[name] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--rule {word}: {text!r} is not a number or a list of numbers") from error
    return GateRules.read(values)


class _ProgressLines:
    """Progress lines on a terminal, one for each tenth of the images of a model."""

    def __init__(self) -> None:
        self._done = 0

    def advance(self, count: int, total: int) -> None:
        before, self._done = self._done, self._done + count
        if sys.stderr.isatty() and 10 * before // total != 10 * self._done // total:
            typer.echo(f"  {self._done} of {total} images", err=True)
        if self._done >= total:
            self._done = 0


def print_verdict(verdict: "Verdict") -> None:
    """Print the figures of a verdict as tables, and the decision with its reasons."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, figures = Console(), verdict.figures
    for who in ("champion", "challenger"):
        about = verdict.about.get(who, {})
        typer.echo(f"{who:<11} {about.get('name', 'unknown')} ({about.get('precision', 'unknown')})")
    if figures.accuracy is not None:
        typer.echo(f"accuracy    {figures.accuracy.measure}")
    table = Table("", "champion", "challenger", "difference", "interval", box=None)
    for row in _rows(verdict):
        table.add_row(*row)
    console.print(table)
    if figures.worst_classes:
        few = f", {figures.classes_too_small} have too few queries" if figures.classes_too_small else ""
        typer.echo(f"The worst of {figures.classes_tested} classes{few}:")
        worst = Table("", "queries", "champion", "challenger", "difference", "upper limit", box=None)
        for fall in figures.worst_classes:
            worst.add_row(
                f"{escape(fall.label)}{' (fallen)' if fall.fallen else ''}",
                str(fall.n_queries),
                _percent(fall.champion),
                _percent(fall.challenger),
                _points(fall.difference),
                _points(fall.upper),
            )
        console.print(worst)
    typer.echo("passed" if verdict.passed else "refused")
    for reason in verdict.reasons:
        typer.echo(f"  {reason}")


def _rows(verdict: "Verdict") -> "Iterator[tuple[str, ...]]":
    """Yield the rows of the table of figures."""
    figures = verdict.figures
    if (found := figures.accuracy) is not None:
        interval = f"{_points(found.low)} to {_points(found.high)}"
        accuracies = (_percent(found.champion), _percent(found.challenger))
        yield ("accuracy", *accuracies, _points(found.difference), interval)
        yield (f"changed, of {found.n_queries} queries", "", "", _percent(found.changed), "")
    for name, what in (
        ("rankme_share", "RankMe / maximum"),
        ("spread", "spread"),
        ("near_identical", "near-identical images"),
        ("dead_dimensions", "dead dimensions"),
    ):
        values = [getattr(signs, name) for signs in (figures.champion, figures.challenger)]
        yield (what, *("NaN" if value is None else f"{value:.3f}" for value in values), "", "")
    if figures.neighbours_kept is not None:
        yield ("neighbours kept", "", "", _percent(figures.neighbours_kept), "")
    for live in figures.live_neighbours_kept:
        yield (f"the same, {live.n_items} items of {live.collection}", "", "", _percent(live.kept), "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"
