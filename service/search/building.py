"""Making segments: which kind, its index, how hard a search must try, and the files.

Small segments are flat: quick to build, quick enough to search. A graph is continued when items are added; what is
trained is made anew. Files are written aside, synced, checksummed and then given their name, so a crash leaves nothing
that looks whole and is not.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from model.files import publish
from service.search.database import Chunk, Numbers, SegmentRow
from service.search.indexes import INDEX_FILE, Effort, add_in_steps, search, structure_of
from service.search.kinds import EXACT, auto_kind, kind_named
from service.search.segment_files import checksum
from service.search.segments import Mapped, Payloads, Positions, Segment, matrix_of
from service.search.store import CollectionSpec, IndexSpec, SearchParams

FLAT_BELOW: Final = 20_000
"""Segments with fewer vectors are searched exactly."""
_TUNE_QUERIES: Final = 128
_TUNE_K: Final = 10


class Stopped(Exception):
    """The store closes while a segment is being built; nothing of it is kept."""


def kind_for(spec: IndexSpec, count: int) -> str:
    """The kind for a segment of this size. Small ones are searched exactly, which is quick, and no index is trained on
    fewer vectors than it has cells to fill.

    Raises:
        ValueError: the settings name a kind that this version does not know.
    """
    kind = auto_kind(count) if spec.kind == "auto" else kind_named(spec.kind)
    return EXACT.name if count < FLAT_BELOW else kind.name


class Built(NamedTuple):
    """A segment's contents, not yet written."""

    numbers: Numbers
    flat: Any
    index: Any
    payloads: list[bytes]
    effort: int  # efSearch or nprobe that reaches the target recall
    kind: str


def build(
    kind: str,
    spec: CollectionSpec,
    chunks: Iterable[Chunk],
    *,
    grown_from: Segment | None = None,
    check: Callable[[], None] = lambda: None,
) -> Built:
    """Index the vectors of some items.

    Args:
        kind: the name of a kind, as `kind_for` returns it.
        chunks: the items, in ascending order.
        grown_from: a segment of this kind: its index is continued with the chunks instead of a new one begun.
        check: called between steps; raises `Stopped` to give up.
    """
    row = kind_named(kind)
    structure = structure_of(row)
    index, flat = structure.begin(spec, grown_from)
    parts: list[Numbers] = [] if grown_from is None else [grown_from.numbers]
    payloads: list[bytes] = [] if grown_from is None else list(grown_from.payloads)
    for chunk in chunks:
        parts.append(chunk.numbers)
        payloads += chunk.payloads
        add_in_steps(flat if index is None else index, chunk.vectors, check)
    numbers = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if not len(numbers):
        return Built(numbers, flat, None, payloads, 1, kind)
    matrix = matrix_of(flat, spec.dtype)
    index = structure.finish(row, spec, index, matrix, check)
    effort = 1 if index is None else tune(flat, matrix, index, kind, spec.index.target_recall)
    return Built(numbers, flat, index, payloads, effort, kind)


def tune(flat: Any, matrix: npt.NDArray[Any], index: Any, kind: str, target: float) -> int:
    """The least effort whose recall of the ten nearest reaches the target, for stored vectors as queries (themselves
    left out). The greatest, if none does. Live queries that are harder show in the measured recall, which raises it."""
    n = len(matrix)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:_TUNE_QUERIES])
    queries = np.ascontiguousarray(matrix[chosen], np.float32)
    k = min(_TUNE_K + 1, n)
    truth = flat.search(queries, k)[1]
    truth[truth == chosen[:, None]] = -1
    row = SegmentRow(0, "", kind, 0, n - 1, n, 1, {})
    trial = Segment(row, Path(), np.arange(n), flat, Mapped(matrix), index, Payloads.of([]))
    efforts = kind_named(kind).efforts
    for effort in efforts:
        params = SearchParams(ef_search=effort, nprobe=effort)
        nearest = search(trial, queries, k, None, Effort(params)).positions
        if recall(nearest, truth) >= target + (1 - target) / 2:  # of a sample: half way to perfect, to be safe
            return effort
    return efforts[-1]


def recall(answers: Positions, truth: Positions) -> float:
    """The share of the true neighbours [q, k] that are among the answers."""
    wanted = (truth >= 0).sum()
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(answers, truth, strict=True))
    return float(hit / wanted) if wanted else 1.0


def write(folder: Path, built: Built) -> dict[str, tuple[int, str]]:
    """Write a segment's files aside, sync them, then give the folder its name.

    Returns:
        Each file's size and checksum, as the database keeps them.

    Raises:
        OSError, RuntimeError: it could not be written (a full disk); nothing is left behind.
    """
    aside = folder.with_name(f".{folder.name}.part")
    aside.mkdir(parents=True)
    try:
        with (aside / "numbers.npy").open("wb") as file:
            np.save(file, built.numbers)
        with (aside / "payloads.npy").open("wb") as file:
            np.save(file, np.cumsum([0, *map(len, built.payloads)]))
        with (aside / "payloads.bin").open("wb") as file:
            file.writelines(built.payloads)
        faiss.write_index(built.flat, str(aside / "vectors.faiss"))
        if built.index is not None:
            faiss.write_index(built.index, str(aside / INDEX_FILE), structure_of(kind_named(built.kind)).write_flags)
        files = {path.name: (path.stat().st_size, checksum(path)) for path in sorted(aside.iterdir())}
        publish(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return files


def new_folder() -> str:
    """A name that no segment had before."""
    return uuid.uuid4().hex


def remove_folders(root: Path, names: Iterable[str]) -> None:
    """Delete folders that no segment uses: left by a crash, or replaced. Whoever has them mapped keeps them."""
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)
