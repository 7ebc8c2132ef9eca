"""Show the comparison of DINO and DINOv2 (`training/compare.py`) as a table in the terminal and as an HTML page.

The numbers come from compare.json and from the log files of the two runs. The page is made with
`training/pages/page.py`, so it is self-contained: it has no script and no external files. All text is escaped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.pages.charts import Series, line_chart
from training.pages.page import html_page, html_section, html_table
from training.pages.report import names_of, points_of
from training.watch.monitor import EVALUATIONS, METRICS, read_lines

RUNS = {"dino": "DINO", "dinov2": "DINOv2"}
NETWORKS = {"untrained": "untrained", **RUNS}
LEGEND = (
    "Robustness: the share of images for which the changed version is nearer than any other image (recall@1), and in "
    "brackets the mean cosine of the two versions. docs/compare.md explains the loss figures."
)
KNN_WORDS = {"cls": "class token", "mean": "mean patch"}
Show = Callable[[Any], str]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _kept(value: Mapping[str, float]) -> str:
    return f"{_percent(value['recall@1'])} ({value['cosine']:.2f})"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


RUN_FIGURES: tuple[tuple[str, str, tuple[str, ...], Show], ...] = (
    ("loss", "std of its change / ln K", ("run", "stability", "change_std"), "{:.4f}".format),
    ("loss", "jumps", ("run", "stability", "jumps"), str),
    ("loss", "DINO loss / ln K, last", ("run", "dino_over_ln_k"), "{:.3f}".format),
    ("cost", "images/s, median", ("run", "images_per_s"), "{:,.1f}".format),
    ("cost", "seconds of training", ("run", "seconds"), "{:,.0f}".format),
    ("cost", "peak memory", ("run", "peak_memory_bytes"), _mebibytes),
)
"""The metrics of a training run. Each has a group, a name, a path in the results of a network, and a format."""


def rows(results: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Return the rows of the comparison table.

    Each row has three entries: the group of a metric, the name of the metric, and a list with its value for each
    network, as text. A metric is left out if no network has a value for it.
    """
    networks = results["networks"]
    first = networks["untrained"]
    accuracy = [
        ("accuracy", f"k-NN, {KNN_WORDS[pooling]}, k={k}", ("knn", pooling, k), _percent)
        for pooling, by_k in first.get("knn", {}).items()
        for k in by_k
    ]
    changes = [("robustness", name, ("robustness", "changes", name), _kept) for name in first["robustness"]["changes"]]
    lines: list[tuple[str, str, tuple[str, ...], Show]] = [
        *accuracy,
        ("accuracy", "logistic regression, class token", ("logistic", "accuracy"), _percent),
        *changes,
        ("robustness", "mean of these", ("robustness", "mean"), _kept),
        ("features", "cosine of different images", ("robustness", "other_photos_cosine"), "{:.2f}".format),
        ("features", "RankMe, share of maximum", ("rankme_share",), "{:.2f}".format),
        *RUN_FIGURES,
    ]
    table = [(group, name, [_cell(networks[n], path, show) for n in NETWORKS]) for group, name, path, show in lines]
    return [row for row in table if any(row[2])]


def _cell(figures: Mapping[str, Any], path: Sequence[str], show: Show) -> str:
    """Format the value at the path `path` in one network's results, using `show`. If there is no such value, return an
    empty string."""
    value: Any = figures
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "" if value is None else show(value)


def heading(results: Mapping[str, Any]) -> str:
    """Return a line of text with the recipe, seed, images and hardware of the comparison."""
    return (
        f"recipe {results['base']}, seed {results['settings']['seed']}: {results['photos_seen']:,} images seen, of "
        f"{results['photos']:,} in {results['data']}; {results['held_out']:,} held out; {results['hardware']}"
    )


def print_table(results: Mapping[str, Any], console: Console) -> None:
    """Print the comparison as a table in the terminal."""
    table = Table()
    for index, column in enumerate(("", "figure", *NETWORKS.values())):
        table.add_column(column, justify="left" if index < 2 else "right")
    before = ""
    for group, name, cells in rows(results):
        if before not in ("", group):
            table.add_section()
        table.add_row("" if group == before else group, name, *cells)
        before = group
    console.print(f"DINO and DINOv2, {heading(results)}", markup=False, highlight=False)
    console.print(table)
    console.print(LEGEND, markup=False, highlight=False)


def page(results: Mapping[str, Any], out: Path) -> str:
    """Return the HTML page of the comparison. `results` is the content of compare.json. The curves come from
    the log files of the two runs in the folder `out`."""
    lines = rows(results)
    groups = [group for group, _, _ in lines]
    table = [
        ["" if i and groups[i - 1] == group else group, name, *cells] for i, (group, name, cells) in enumerate(lines)
    ]
    changes = [
        [key, json.dumps(dino), json.dumps(results["settings"][key])] for key, dino in results["changes"].items()
    ]
    events = [(RUNS[name], event) for name in RUNS for event in results["networks"][name]["run"]["events"]]
    origin = [[key, str(results[key])] for key in ("hardware", "torch", "revision", "data", "data_sha256")]
    body = [
        f'<h1>DINO and DINOv2</h1><p class="muted">{escape(heading(results))}</p>',
        html_section("Figures", html_table(table, ["", "figure", *NETWORKS.values()], range(2, 2 + len(NETWORKS)))),
        f'<p class="muted">{escape(LEGEND)}</p>',
        html_section("Curves", charts(out)),
        html_section("Events", html_table(events) if events else ""),
        html_section("Settings that differ", html_table(changes, ["setting", *RUNS.values()])),
        html_section("Origin", html_table(origin)),
    ]
    return html_page("DINO and DINOv2", body)


def charts(out: Path) -> str:
    """Return charts that show the curves of both runs, as HTML. Charts without data are left out."""
    metrics = {name: read_lines(out / name / METRICS) for name in RUNS}
    evaluations = {name: read_lines(out / name / EVALUATIONS) for name in RUNS}

    def both(of: Mapping[str, list[dict[str, Any]]], figure: str) -> list[Series]:
        return [Series(RUNS[name], points_of(lines, figure)) for name, lines in of.items()]

    during = [name for name in names_of(evaluations["dinov2"], "knn_cls_") if not name.endswith("_1")]
    drawings = [
        line_chart(both(metrics, "dino_over_ln_k"), title="DINO loss", y_label="share of ln K", mark=(1.0, "collapse")),
        *(line_chart(both(evaluations, x), title=f"k-NN during the run, {x}", y_label="accuracy") for x in during),
        line_chart(both(metrics, "rankme_share"), title="RankMe of a batch", y_label="share of maximum", floor=0),
        line_chart(both(metrics, "loss"), title="Loss (DINOv2: sum of three)", y_label="nats"),
        line_chart(both(metrics, "teacher_entropy"), title="Entropy of the teacher's targets", y_label="nats", floor=0),
        line_chart(both(metrics, "images_per_s"), title="Speed", y_label="images/s", floor=0),
    ]
    text = "".join(drawings)
    return f'<div class="charts">{text}</div>' if text else ""
