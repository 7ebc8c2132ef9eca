"""Write the report of a curation: a page with what was kept, what was dropped and why, with examples.

The page is one file without scripts. It contains its thumbnails, and all text from outside, such as the names of files,
is escaped. It has no date and no path of the dataset, because equal images must give equal files.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.curate.drops import Drop
from training.curate.map2d import positions
from training.curate.outcome import Outcome, data_digest
from training.curate.table import Images, Indices, Pixels
from training.pages.charts import Series, histogram, line_chart, point_map
from training.pages.page import html_page, html_section, html_table

THUMBNAIL: Final = 96  # pixels of the longer side, at most
QUALITY: Final = 60  # of JPEG
BINS: Final = 40
EXAMPLES: Final = 12  # of each reason
REASONS: Final = 8  # of each stage with examples
KEPT_SHOWN: Final = 48
UNREADABLE_SHOWN: Final = 20
POINTS: Final = 8000  # of a map
HIDDEN: Final = frozenset({"sensitive"})
"""The stages whose dropped images are not shown, because many people may read the report."""

CSS: Final = """
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(224px, 1fr)); gap: 10px; }
.pairs.alone { grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); }
.pair { background: var(--card); border-radius: 10px; padding: 10px; font-size: 12px; min-width: 0; }
.pair div { display: flex; gap: 8px; align-items: flex-end; min-height: 96px; margin-bottom: 6px; }
.pair span { display: block; color: var(--muted); font-size: 11px; }
.pair p, .pair code { font-size: 12px; overflow-wrap: anywhere; }
.grid { display: flex; flex-wrap: wrap; gap: 6px; }
.pair img, .grid img { width: auto; max-width: 96px; height: auto; border-radius: 6px; }
.part i { display: inline-block; height: 9px; border-radius: 3px; background: var(--c0); vertical-align: middle; }
h3 { font-size: 14px; margin: 18px 0 8px; font-weight: 600; } h3 span { font-weight: 400; margin-left: 6px; }
.missing { width: 96px; height: 72px; border: 1px dashed var(--line); border-radius: 6px; color: var(--muted);
  display: flex !important; align-items: center; justify-content: center; text-align: center; }
"""

T = TypeVar("T")
Read = Callable[[int], Pixels]
Beside = Callable[[Drop], Pixels | None]


def write_report(path: Path, outcome: Outcome, read: Read, *, name: str, beside: Beside | None = None) -> None:
    """Write the report of an outcome to a file.

    Args:
        path: the file.
        outcome: the images, and what became of them.
        read: returns the upright pixels of an image by its number. An image that it cannot read has no thumbnail.
        name: the name of the dataset.
        beside: returns the image to show beside a dropped one, such as the evaluation image of a leak, or None. It is
            not called if the drop names a kept image.

    Raises:
        OSError: the file cannot be written.
    """
    images = outcome.images
    sections = [
        _head(name, outcome),
        _tiles(outcome),
        html_section("What each stage dropped", _stages(outcome)),
        html_section("Map of the images", _maps(outcome)),
        html_section("Kept images", _grid(images, outcome.kept, read)),
        html_section("Dropped images", _dropped(outcome, read, beside)),
        html_section("Measures", _measures(outcome)),
        html_section("Classes", _classes(outcome)),
        html_section("Files that could not be read", _unreadable(outcome)),
        html_section("Sources", html_table([[str(i), source] for i, source in enumerate(outcome.sources, 1)])
                     if outcome.sources else ""),
        html_section("Next steps", _next_steps()),
    ]  # fmt: skip
    path.write_text(html_page(f"Curation: {name}", sections, CSS), encoding="utf-8")


def reason_kind(reason: str, kept: str | None = None) -> str:
    """Return the kind of a reason: the reason without names of images, numbers and remarks in brackets.

    For example, the kind of `copy of 1/cats/7.jpg (similarity 0.981)` is `copy of another image`. `kept` is the key of
    the image that was kept instead of the dropped one.
    """
    text = reason.replace(kept, "another image") if kept else reason
    text = re.split(r" \S*/", text, maxsplit=1)[0]
    text = re.sub(r" *\(.*", "", text)
    text = re.sub(r"; it starts with(?: [0-9a-f]{2})+", "", text)
    return re.sub(r"\d[\d.,]*", "N", text).strip(" :,") or reason


# Numbers


def _head(name: str, outcome: Outcome) -> str:
    digest = data_digest(outcome.images, outcome.kept)
    return f'<h1>Curation: {escape(name)}</h1><p class="muted">data digest <code>{digest}</code></p>'


def _tiles(outcome: Outcome) -> str:
    n_images, n_kept = len(outcome.images) + len(outcome.unreadable), len(outcome.kept)
    n_bytes = int(outcome.images.n_bytes[outcome.kept].sum())
    tiles = [
        (f"{n_images:,}", "images found"),
        (f"{n_kept:,}", f"kept ({n_kept / n_images:.1%})"),
        (f"{len(outcome.train):,}", "to train on"),
        (f"{len(outcome.held_out):,}", "held out"),
        (f"{len(outcome.images) - n_kept:,}", "dropped"),
        (f"{len(outcome.unreadable):,}", "could not be read"),
        (_size(n_bytes), "kept images"),
    ]
    if outcome.restored:
        tiles.append((f"{len(outcome.restored):,}", "restored"))
    cells = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{cells}</div>'


def _size(n_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"


def _counted(outcome: Outcome) -> dict[str, Counter[str]]:
    """Return the number of dropped images by stage and by kind of reason. Stages are in the order in which they ran."""
    counts: dict[str, Counter[str]] = {}
    for drop in outcome.drops:
        counts.setdefault(drop.stage, Counter())
    for drop in _final(outcome):
        counts[drop.stage][_kind(outcome, drop)] += 1
    return counts


def _kind(outcome: Outcome, drop: Drop) -> str:
    return reason_kind(drop.reason, None if drop.because is None else outcome.images.key[drop.because])


def _final(outcome: Outcome) -> list[Drop]:
    """Return the drops that count: the first of each image that is not restored, in the order of the images."""
    return [drop for index, drop in sorted(outcome.drop_of.items()) if index not in outcome.restored]


def _stages(outcome: Outcome) -> str:
    """Return a table of stages and reasons, with a bar for the images that are left after each stage."""
    n_all = left = len(outcome.images) + len(outcome.unreadable)
    rows = []
    counts = {"scan": Counter({reason_kind(r): 0 for _, r in outcome.unreadable})} | _counted(outcome)
    counts["scan"].update(reason_kind(reason) for _, reason in outcome.unreadable)
    for stage, reasons in counts.items():
        n = sum(reasons.values())
        left -= n
        bar = f'<i style="width:{100 * left / n_all:.1f}px"></i>'
        rows.append(
            f'<tr><td><b>{escape(stage)}</b></td><td></td><td class="n">{n:,}</td><td class="n">{left:,}</td>'
            f'<td class="part">{bar}</td></tr>'
        )
        rows += [
            f'<tr><td></td><td>{escape(kind)}</td><td class="n">{number:,}</td><td></td><td></td></tr>'
            for kind, number in _most_common(reasons)
        ]
    head = '<tr><th>stage</th><th>reason</th><th class="n">dropped</th><th class="n">left</th><th></th></tr>'
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _most_common(reasons: Counter[str]) -> list[tuple[str, int]]:
    """Return reasons and their numbers, the most frequent first. From `2 * REASONS` on, they are added up."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    first, rest = ordered[: 2 * REASONS], ordered[2 * REASONS :]
    return [*first, ("other reasons", sum(n for _, n in rest))] if rest else first


# Maps and charts


def _maps(outcome: Outcome) -> str:
    """Return two maps with the same axes: all images with the stages that dropped them, and the kept images."""
    images = outcome.images
    if len(images) < 3:
        return ""
    xy, shown = positions(images.embedding)
    chosen = np.arange(0, len(images), -(-len(images) // POINTS))
    stage_of = {drop.index: drop.stage for drop in _final(outcome)}

    def points(numbers: Sequence[int]) -> list[tuple[float, float]]:
        return [(float(xy[i, 0]), float(xy[i, 1])) for i in numbers]

    held_out = set(outcome.held_out.tolist())
    stages = list(dict.fromkeys(drop.stage for drop in outcome.drops))
    before = {"kept": (0, points([i for i in chosen.tolist() if i not in stage_of]))}
    before |= {
        f"dropped: {stage}": (number, points([i for i in chosen.tolist() if stage_of.get(i) == stage]))
        for number, stage in enumerate(stages, 1)
        if stage in stage_of.values()
    }
    kept = [i for i in chosen.tolist() if i not in stage_of]
    after = {"trained on": (0, points([i for i in kept if i not in held_out]))}
    if held_out:
        after["held out"] = (1, points([i for i in kept if i in held_out]))
    every = "every image" if len(chosen) == len(images) else f"{len(chosen):,} of {len(images):,} images"
    text = (
        f"A point is an image ({every}), and images that look alike are near each other. The axes are the two first "
        f"principal components of the embeddings, which show {shown:.0%} of the variance."
    )
    maps = point_map(before, title="Before: all images") + point_map(after, title="After: kept images")
    return f'<p class="muted">{escape(text)}</p><div class="charts">{maps}</div>'


def _measures(outcome: Outcome) -> str:
    """Return histograms of the measures of kept and dropped images."""
    images = outcome.images
    is_kept = np.zeros(len(images), bool)
    is_kept[outcome.kept] = True
    shown: dict[str, npt.NDArray[np.float64]] = {
        "shorter side, pixels": np.minimum(images.width, images.height).astype(np.float64),
        "longer side / shorter side": np.maximum(images.width, images.height) / np.minimum(images.width, images.height),
    }
    shown |= {name.replace("_", " "): np.asarray(values, np.float64) for name, values in images.measures.items()}
    charts = [_histogram(name, values, is_kept) for name, values in shown.items() if len(values)]
    note = "The first and the last bar also count the values outside the axis."
    return f'<p class="muted">{note}</p><div class="charts">{"".join(charts)}</div>'


def _histogram(name: str, values: npt.NDArray[np.float64], is_kept: npt.NDArray[np.bool_]) -> str:
    values = np.nan_to_num(values)
    low, high = (float(x) for x in np.quantile(values, (0.002, 0.998)))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = np.linspace(low, high, BINS + 1)
    bins = np.clip(((values - low) / (high - low) * BINS).astype(np.int64), 0, BINS - 1)
    counts = {
        word: np.bincount(bins[chosen], minlength=BINS).tolist()
        for word, chosen in (("kept", is_kept), ("dropped", ~is_kept))
    }
    return histogram(edges.tolist(), counts, title=name)


def _classes(outcome: Outcome) -> str:
    """Return a chart of the sizes of the classes, from the largest to the smallest, before and after."""
    images = outcome.images
    before = Counter(label for label in images.label if label)
    after = Counter(label for i in outcome.kept.tolist() if (label := images.label[i]))
    if len(before) < 2:
        return ""
    lines = [
        Series(name, [(float(i), float(n)) for i, n in enumerate(sorted(sizes.values(), reverse=True), 1)])
        for name, sizes in (("all images", before), ("kept images", after))
    ]
    gone = len(before) - len(after)
    text = (
        f"{len(before):,} classes, of which {len(after):,} have kept images." if gone else f"{len(before):,} classes."
    )
    chart = line_chart(lines, title="Images per class", x_label="class, from the largest to the smallest", floor=0)
    return f'<p class="muted">{text}</p><div class="charts">{chart}</div>'


# Examples


def _thumbnail(pixels: Pixels | None, title: str) -> str:
    """Return an `<img>` that contains a reduced copy of an image, or a box with text if there is no image."""
    if pixels is None:
        return _box("not readable")
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = escape(title)
    return (
        f'<img alt="{alt}" title="{alt}" width="{image.width}" height="{image.height}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def _box(text: str) -> str:
    return f'<span class="missing">{escape(text)}</span>'


def _pixels(read: Read, index: int) -> Pixels | None:
    try:
        return read(index)
    except (OSError, ValueError):
        return None


def _spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, evenly spread."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def _grid(images: Images, kept: Indices, read: Read) -> str:
    cells = [_thumbnail(_pixels(read, i), str(images.key[i])) for i in _spread(kept.tolist(), KEPT_SHOWN)]
    return f'<p class="muted">{len(cells)} of {len(kept):,}</p><div class="grid">{"".join(cells)}</div>'


def _dropped(outcome: Outcome, read: Read, beside: Beside | None) -> str:
    """Return examples of dropped images by stage and reason, each beside the image that was kept instead of it."""
    groups: dict[tuple[str, str], list[Drop]] = {}
    for drop in _final(outcome):
        groups.setdefault((drop.stage, _kind(outcome, drop)), []).append(drop)
    parts = []
    for stage, counts in _counted(outcome).items():
        for kind, n in _most_common(counts)[:REASONS]:
            drops = _spread(groups.get((stage, kind), []), EXAMPLES)
            if not drops:
                continue
            number = f"{len(drops)} of {n:,}" if len(drops) < n else f"{n:,}"
            cards = "".join(_card(drop, outcome.images, read, beside) for drop in drops)
            alone = "" if "<span>kept" in cards or "<span>compared" in cards else " alone"
            head = f'<h3>{escape(stage)}: {escape(kind)} <span class="muted">{number}</span></h3>'
            parts.append(f'{head}<div class="pairs{alone}">{cards}</div>')
    return "".join(parts)


def _card(drop: Drop, images: Images, read: Read, beside: Beside | None) -> str:
    """Return a dropped image as HTML, with its key and the reason, and the image to compare it with if there is one."""
    key = str(images.key[drop.index])
    hidden = drop.stage in HIDDEN
    cells = f"<span>dropped{_box('not shown') if hidden else _thumbnail(_pixels(read, drop.index), key)}</span>"
    if drop.because is not None:
        cells += f"<span>kept{_thumbnail(_pixels(read, drop.because), str(images.key[drop.because]))}</span>"
    elif beside is not None and (other := beside(drop)) is not None:
        cells += f"<span>compared with{_thumbnail(other, drop.reason)}</span>"
    text = f'<code>{escape(key)}</code><p class="muted">{escape(drop.reason)}</p>'
    return f'<div class="pair"><div>{cells}</div>{text}</div>'


def _unreadable(outcome: Outcome) -> str:
    shown = sorted(outcome.unreadable)[:UNREADABLE_SHOWN]
    n = len(outcome.unreadable)
    more = f'<p class="muted">{n - len(shown):,} more are in manifest.jsonl.</p>' if n > len(shown) else ""
    return html_table(shown, ["image", "reason"]) + more if shown else ""


def _next_steps() -> str:
    steps = (
        "dinov2 train --data DATASET --recipe continue --out runs/mine init=dinov2_vits14_reg\n"
        "dinov2 curation restore DATASET 1/cats/7.jpg   # brings a dropped image back; all are in manifest.jsonl"
    )
    return f'<p class="muted">DATASET is the folder that contains this page.</p><pre>{escape(steps)}</pre>'
