"""Builds segments: chooses the index kind, builds the index, tunes the search effort and writes the files.

A segment is a folder of files with part of a collection's vectors. Small segments have no index, because an exact
search of them is quick. To add items to a large segment, its HNSW graph is extended, or its inverted lists are rebuilt.
The files are first written to a folder with a temporary name. Once their checksums have been computed and the files
have been synced, the folder is renamed. Therefore, a crash never leaves an incomplete segment that looks complete.
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
"""Segments with fewer vectors than this have no index and are searched exactly."""
_TUNE_QUERIES: Final = 128
_TUNE_K: Final = 10


class Stopped(Exception):
    """The exception that ends a build when the store closes. The unfinished segment is discarded."""


def kind_for(spec: IndexSpec, count: int) -> str:
    """Return the name of the index kind for a segment of `count` vectors.

    The kind of a segment with fewer than `FLAT_BELOW` vectors is `flat`, because an exact search of so few vectors is
    quick, and training inverted lists needs many vectors.

    Raises:
        ValueError: the settings name a kind that this version does not know.
    """
    kind = auto_kind(count) if spec.kind == "auto" else kind_named(spec.kind)
    return EXACT.name if count < FLAT_BELOW else kind.name


class Built(NamedTuple):
    """The contents of a new segment that have not been written to files yet."""

    numbers: Numbers
    flat: Any
    index: Any
    payloads: list[bytes]
    effort: int  # the efSearch or nprobe that reaches the target recall
    kind: str


def build(
    kind: str,
    spec: CollectionSpec,
    chunks: Iterable[Chunk],
    *,
    grown_from: Segment | None = None,
    check: Callable[[], None] = lambda: None,
) -> Built:
    """Build the contents of a segment from items, and return them.

    Args:
        kind: the name of an index kind, as returned by `kind_for`.
        chunks: the items, in ascending order of their numbers.
        grown_from: an existing segment of the same kind. If it is given, the new segment also contains its items, and a
            copy of its index is extended. Otherwise, a new index is built.
        check: a function that is called between steps. It raises `Stopped` to end the build.
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
    """Return the search effort for an index: the lowest efSearch or nprobe in the kind's list at which the recall of
    the ten nearest vectors reaches the target plus a safety margin. Return the highest value in the list if none
    achieves this.

    The queries are a sample of the stored vectors. Each query's own vector is not counted as one of its neighbours.
    Live queries may be harder. `Maintenance` measures the recall of live queries and raises the effort if this recall
    is too low.
    """
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
        if recall(nearest, truth) >= target + (1 - target) / 2:  # a safety margin, because this is only a sample
            return effort
    return efforts[-1]


def recall(answers: Positions, truth: Positions) -> float:
    """Return the share of the true neighbours that were found. `answers` and `truth` are arrays of positions [q, k] for
    q queries. A position of -1 means that there is no neighbour."""
    wanted = (truth >= 0).sum()
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(answers, truth, strict=True))
    return float(hit / wanted) if wanted else 1.0


def write(folder: Path, built: Built) -> dict[str, tuple[int, str]]:
    """Write the files of a segment to a temporary folder, sync them, and rename the temporary folder to `folder`.

    Returns:
        A dictionary that maps each file name to the size of the file in bytes and its checksum.

    Raises:
        OSError, RuntimeError: the files cannot be written, for example because the disk is full. The temporary folder
            is removed.
    """
    aside = folder.with_name(f".{folder.name}.part")
    folder.parent.mkdir(exist_ok=True)
    aside.mkdir()
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
    """Return a folder name that no segment has used before."""
    return uuid.uuid4().hex


def remove_folders(root: Path, names: Iterable[str]) -> None:
    """Delete folders that no segment uses any more. Existing memory maps of the files in these folders stay valid."""
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)
