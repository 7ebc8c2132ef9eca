"""Write the report of a run: `report.html` in the run's folder, a page with the run's settings, events and results.

The report can be written at the end of a run or at any other time, because it is made only from files in the run's
folder: config.json, metrics.jsonl, evaluations.jsonl, events.jsonl, knn.json, skipped.txt, sheets/*.png and the
provenance in checkpoint.safetensors. If a file is missing, its section is left out.

The page contains its style sheet, the curves (`training/pages/charts.py`) and the last image sheet
(`training/pages/sheets.py`), so it can be emailed and archived as one file. It has no script, and all text from the
files is escaped.
"""

import base64
import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError, safe_open

from model.files import write_text
from model.loading import RUN_CHECKPOINTS, run_checkpoint
from training.config import TrainConfig, loss_names
from training.pages.charts import Series, line_chart
from training.pages.page import html_page, html_section, html_table
from training.watch.monitor import EVALUATIONS, EVENTS, METRICS, read_lines

REPORT = "report.html"
SHEETS = "sheets"
SHEET_WIDTH = 1400  # pixels; large enough to see patches, small enough to email
SHOWN_K = 10  # neighbours
EVENTS_SHOWN = 20
SKIPPED_SHOWN = 10

Lines = Sequence[Mapping[str, Any]]


def write_report(out: Path) -> Path:
    """Write the report of the run in the folder `out`, and return the report's path.

    Raises:
        ValueError: `out` is not the folder of a run.
        OSError: the page cannot be written.
    """
    config, metrics = _json(out / "config.json"), read_lines(out / METRICS)
    if not config and not metrics:
        raise ValueError(f"{out} is not a run's folder: it has neither config.json nor {METRICS}")
    evaluations = read_lines(out / EVALUATIONS)
    facts = next(filter(None, (_provenance(out / name) for name in RUN_CHECKPOINTS)), {})
    knn = _json(out / "knn.json")
    sections = [
        _head(config, facts, metrics),
        _tiles(metrics, evaluations, knn, facts),
        html_section("Events", _events(read_lines(out / EVENTS))),
        html_section("Curves", _charts(metrics, evaluations, config)),
        html_section("Image sheet", _sheet(out / SHEETS)),
        html_section("k-NN on held-out images", _knn_table(knn)),
        html_section("Data", _data(config, facts, out / "skipped.txt")),
        html_section("Settings that differ from the default", _settings(config)),
        html_section("Origin", _origin(facts)),
        html_section("Next steps", _next_steps(out, config)),
    ]
    page = html_page(f"{config.get('recipe', 'run')}: {out.name}", sections)
    path = out / REPORT
    write_text(path, page)
    return path


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file and return it. If the file is missing or damaged, return an empty dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _provenance(path: Path) -> dict[str, Any]:
    """Return the provenance (a description of the origin) that a checkpoint file contains. The weights are not loaded.
    If the file is missing or damaged, return an empty dict."""
    try:
        with safe_open(path, "np") as file:
            content = json.loads((file.metadata() or {}).get("provenance", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> float | None:
    """Return `value` as a float if it is a finite number, and None otherwise."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def points_of(lines: Lines, name: str) -> list[tuple[float, float | None]]:
    """Return a point (step, value) for every log line that contains a step and the metric `name`. A value that is not
    finite becomes None."""
    return [(step, _number(x[name])) for x in lines if name in x and (step := _number(x.get("step"))) is not None]


def values_of(lines: Lines, name: str) -> list[float]:
    return [value for _, value in points_of(lines, name) if value is not None]


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return "unknown"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _sources(config: Mapping[str, Any]) -> list[str]:
    """Return the paths and URLs of the run's images."""
    data = config.get("data", [])
    return [str(source) for source in (data if isinstance(data, list) else [data])]


def _head(config: Mapping[str, Any], facts: Mapping[str, Any], metrics: Lines) -> str:
    vit = config.get("vit")
    shape = ", ".join(f"{key} {value}" for key, value in vit.items()) if isinstance(vit, dict) else ""
    model = f"{config.get('model', 'unknown model')}{f' ({shape})' if shape else ''}"
    times = values_of(metrics, "time")
    when = f"{_when(times[0])} to {_when(times[-1])}" if times else ""
    images = ", ".join(_sources(config)) or "unknown data"
    parts = [f"{model}, on {images}", str(facts.get("hardware", "")), when]
    text = "".join(f'<p class="muted">{escape(part)}</p>' for part in parts if part)
    return f"<h1>Training: {escape(str(config.get('recipe', 'unknown recipe')))}</h1>{text}"


def _released_knn(knn: Mapping[str, Any]) -> tuple[int, float] | None:
    """Return k and the accuracy of the class token in `knn`, which contains k-NN accuracies by pooling and k.

    k is 10, or the largest smaller value. If there is none, return None.
    """
    row = knn.get("cls")
    found = {int(k): _number(v) for k, v in row.items() if str(k).isdecimal()} if isinstance(row, dict) else {}
    shares = {k: share for k, share in found.items() if share is not None and k <= SHOWN_K}
    return (max(shares), shares[max(shares)]) if shares else None


def _best_value(facts: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the name and the value of the measure of the best checkpoint, or None if the run has no measure."""
    measure = facts.get("measure")
    pairs = list(measure.items()) if isinstance(measure, dict) else []
    value = _number(pairs[0][1]) if pairs else None
    return None if value is None else (str(pairs[0][0]), value)


def _tiles(metrics: Lines, evaluations: Lines, knn: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the run's most important metrics as a row of HTML tiles."""
    tiles: list[tuple[str, str]] = []
    if (released := _released_knn(knn)) is not None:
        tiles.append((f"{released[1]:.1%}", f"{released[0]}-NN, released checkpoint"))
    elif during := values_of(evaluations, "knn_cls_10"):
        tiles.append((f"{during[-1]:.1%}", "10-NN, last evaluation"))
    if (best := _best_value(facts)) is not None:
        tiles.append((f"{best[1]:.1%}", f"{best[0]}, best"))
    steps = values_of(metrics, "step")
    if steps:
        tiles.append((f"{steps[-1]:,.0f}", "steps"))
    if isinstance(facts.get("photos"), int):
        tiles.append((f"{facts['photos']:,}", "images"))
    seconds = sum(values_of(metrics, "seconds"))
    if seconds:
        tiles.append((_duration(seconds), "training time"))
    middle: list[tuple[str, str, Callable[[float], str]]] = [
        ("images_per_s", "images/s, median", lambda v: f"{v:,.0f}"),
        ("mfu", "MFU, median", lambda v: f"{v:.1%}"),
        ("data_wait_share", "of the time spent waiting for data", lambda v: f"{v:.1%}"),
    ]
    for name, words, shown in middle:
        if values := sorted(values_of(metrics, name)):
            tiles.append((shown(values[len(values) // 2]), words))
    if memory := values_of(metrics, "peak_memory_bytes"):
        tiles.append((f"{max(memory) / 2**30:.2f} GiB", "peak memory"))
    cells = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _events(events: Lines) -> str:
    """Return the latest events, such as warnings, rollbacks and stops, as an HTML list."""
    shown = events[-EVENTS_SHOWN:]
    items = "".join(f"<li><b>{escape(str(e.get('kind')))}</b>: {escape(str(e.get('message')))}</li>" for e in shown)
    more = f"<p class='muted'>{len(events) - len(shown)} earlier events are in {EVENTS}.</p>"
    return f"<ul>{items}</ul>{more if len(events) > len(shown) else ''}" if events else ""


def names_of(lines: Lines, start: str) -> list[str]:
    """Return the metric names in `lines` that begin with `start`, without duplicates, in order of first appearance."""
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(start)))


def _charts(metrics: Lines, evaluations: Lines, config: Mapping[str, Any]) -> str:
    """Return charts of the run's metrics, as HTML. Charts without data are left out."""
    prototypes = _number(config.get("n_prototypes"))
    knn_all = names_of(evaluations, "knn")
    knn_shown = [name for name in knn_all if name.endswith("_10")] or knn_all  # one k is enough to show the trend
    ln_k = math.log(prototypes) if prototypes and prototypes > 1 else None
    rates = [name for name in names_of(metrics, "lr") if name != "lr_factor"]

    def lines(*names: str, of: Lines = metrics) -> list[Series]:
        return [Series(name, points) for name in names if (points := points_of(of, name))]

    charts = [
        line_chart(lines("loss", *loss_names()), title="Losses", y_label="nats"),
        line_chart(
            lines("dino_over_ln_k"), title="DINO loss and ln K", y_label="share of ln K", mark=(1.0, "collapse")
        ),
        line_chart(lines(*knn_shown, of=evaluations), title="k-NN during the run", y_label="accuracy"),
        line_chart(
            lines("teacher_entropy"),
            title="Entropy of the teacher's targets",
            y_label="nats",
            mark=None if ln_k is None else (ln_k, "ln K: no information"),
            floor=0,
        ),
        line_chart(lines("own_knn", "view_certainty", "retrieval", of=evaluations), title="Measure of the run"),
        line_chart(lines("held_out_loss", of=evaluations), title="Loss on held-out images", y_label="share of ln K"),
        line_chart(
            [*lines("rankme_share"), *lines("held_out_rankme_share", of=evaluations)],
            title="RankMe of class tokens",
            y_label="share of the largest rank",
            floor=0,
        ),
        line_chart(lines(*names_of(metrics, "grad")), title="Gradient norms", y_label="before clipping", floor=0),
        line_chart(lines(*rates), title="Learning rate", floor=0),
        line_chart(lines("images_per_s"), title="Speed", y_label="images/s", floor=0),
        line_chart(lines("mfu", "data_wait_share"), title="Use of the machine", y_label="share", floor=0),
    ]
    text = "".join(charts)
    return f'<div class="charts">{text}</div>' if text else ""


def _sheet(folder: Path) -> str:
    """Return an HTML `<img>` that contains the last image sheet as a JPEG, reduced in size. If there is no sheet, or it
    cannot be read, return an empty string."""
    sheets = sorted(folder.glob("*.png"))
    if not sheets:
        return ""
    try:
        with Image.open(sheets[-1]) as image:
            image.thumbnail((SHEET_WIDTH, 10 * SHEET_WIDTH), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=82)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="image sheet {escape(sheets[-1].stem)}" src="data:image/jpeg;base64,{data}">'


def _knn_table(knn: Mapping[str, Any]) -> str:
    """Return an HTML table of k-NN accuracies by pooling (rows) and k (columns)."""
    rows = {str(name): row for name, row in knn.items() if isinstance(row, dict)}
    ks = list(dict.fromkeys(str(k) for row in rows.values() for k in row))
    if not ks:
        return ""

    def cell(value: Any) -> str:
        number = _number(value)
        return "" if number is None else f"{number:.1%}"

    table = [[name, *(cell(row.get(k)) for k in ks)] for name, row in rows.items()]
    return html_table(table, ["features", *(f"k = {k}" for k in ks)], range(1, len(ks) + 1))


def _data(config: Mapping[str, Any], facts: Mapping[str, Any], skipped: Path) -> str:
    """Return the training data's folder, number of images and digest as an HTML table. If images could not be read, the
    first of them are listed below the table.
    """
    rows = [[words, str(facts[key])] for key, words in (("photos", "training images"), ("data_sha256", "digest"))
            if key in facts]  # fmt: skip
    if "data" in config:
        rows.insert(0, ["images", ", ".join(_sources(config))])
    body = html_table(rows) if rows else ""
    if skipped.exists():
        lines = [line for line in skipped.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        first = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines[:SKIPPED_SHOWN])
        more = f", the first {SKIPPED_SHOWN} of them" if len(lines) > SKIPPED_SHOWN else ""
        body += f"<p>{len(lines):,} files could not be read and were skipped{more} (all in skipped.txt):</p>"
        body += f"<ul>{first}</ul>"
    return body


def _settings(config: Mapping[str, Any]) -> str:
    """Return an HTML table of the settings that differ from their defaults."""
    missing = object()
    defaults = {
        name: missing if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
        for name, field in TrainConfig.model_fields.items()
    }
    rows = [
        [name, json.dumps(value), "" if default is missing else json.dumps(default)]
        for name, value in config.items()
        if name not in ("data", "out", "recipe") and (default := defaults.get(name, missing)) != value
    ]
    return html_table(rows, ["setting", "value", "default"]) if rows else ""


def _origin(facts: Mapping[str, Any]) -> str:
    """Return an HTML table with the code revision, the hardware, the torch version and the initial weights."""
    words = {"revision": "code revision", "hardware": "hardware", "torch": "torch", "init": "started from"}
    rows = [
        [shown, facts[key] if isinstance(facts[key], str) else json.dumps(facts[key])]
        for key, shown in words.items()
        if facts.get(key) is not None
    ]
    return html_table(rows) if rows else ""


def _next_steps(out: Path, config: Mapping[str, Any]) -> str:
    """Return an HTML text block with the commands that export the checkpoint and resume training."""
    steps = []
    if (checkpoint := run_checkpoint(out)) is not None:
        steps.append(f"dinov2 export {shlex.quote(str(checkpoint))}   # then: dinov2 serve")
    if sources := _sources(config):
        data = " ".join(f"--data {shlex.quote(source)}" for source in sources)
        recipe, folder = (shlex.quote(str(x)) for x in (config.get("recipe"), out))
        steps.append(
            f"dinov2 train {data} --recipe {recipe} --out {folder}"
            "   # resumes where it stopped; add the settings it was started with"
        )
    return f"<pre>{escape(chr(10).join(steps))}</pre>" if steps else ""
