"""Making segments: which kind, its index, how hard a search must try, and the files.

Small segments are flat: quick to build, quick enough to search. A graph is continued when items are added; what is
trained is made anew. Files are written aside, synced, checksummed and then given their name, so a crash leaves nothing
that looks whole and is not.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from model.files import publish
from service.search.database import Chunk, Numbers, SegmentRow
from service.search.segments import (
    Mapped,
    Payloads,
    Positions,
    Segment,
    checksum,
    matrix_of,
    new_flat,
    with_storage,
)
from service.search.store import CollectionSpec, IndexSpec, SearchParams

BuiltKind = Literal["flat", "hnsw", "ivf_pq", "rabitq"]

FLAT_BELOW: Final = 20_000
HNSW_BELOW: Final = 2_000_000
"""Sizes of a collection at which `auto` goes from one kind to the next."""
HNSW_M: Final = 32
HNSW_EF_CONSTRUCTION: Final = 100
EFFORTS: Final[dict[str, tuple[int, ...]]] = {
    "flat": (1,),
    "hnsw": (64, 96, 128, 192, 256, 384, 512),
    "ivf_pq": (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    "rabitq": (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
}
"""efSearch or nprobe that tuning chooses from."""
_TUNE_QUERIES: Final = 128
_TUNE_K: Final = 10
_ADD: Final = 4096


class Stopped(Exception):
    """The store closes while a segment is being built; nothing of it is kept."""


def kind_for(spec: IndexSpec, count: int) -> BuiltKind:
    """The kind for a segment of this size. Small ones are searched exactly, which is quick, and no index is trained on
    fewer vectors than it has cells to fill."""
    if spec.kind == "flat" or count < FLAT_BELOW:
        return "flat"
    if spec.kind == "auto":
        return "hnsw" if count < HNSW_BELOW else "ivf_pq"
    return spec.kind


class Built(NamedTuple):
    """A segment's contents, not yet written."""

    numbers: Numbers
    flat: Any
    index: Any
    payloads: list[bytes]
    effort: int  # efSearch or nprobe that reaches the target recall


def build(
    kind: BuiltKind,
    spec: CollectionSpec,
    chunks: Iterable[Chunk],
    *,
    grown_from: Segment | None = None,
    check: Callable[[], None] = lambda: None,
) -> Built:
    """Index some vectors.

    Args:
        chunks: the items, in ascending order.
        grown_from: an `hnsw` segment: its graph is continued with the chunks instead of a new one begun.
        check: called between steps; raises `Stopped` to give up.
    """
    parts: list[Numbers] = []
    payloads: list[bytes] = []
    if kind == "hnsw":
        index = _new_graph(spec) if grown_from is None else _copied_graph(grown_from, spec)
        if grown_from is not None:
            parts.append(grown_from.numbers)
            payloads += grown_from.payloads
        flat = faiss.downcast_index(index.storage)
    else:
        index, flat = None, new_flat(spec.dimension, spec.dtype)
    for chunk in chunks:
        parts.append(chunk.numbers)
        payloads += chunk.payloads
        for begin in range(0, len(chunk.vectors), _ADD):
            check()
            (flat if index is None else index).add(chunk.vectors[begin : begin + _ADD])
    numbers = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if not len(numbers):
        return Built(numbers, flat, None, payloads, 1)
    matrix = matrix_of(flat, spec.dtype)
    if kind in ("ivf_pq", "rabitq"):
        index = _inverted_lists(kind, spec, matrix, check)
    effort = 1 if index is None else tune(flat, matrix, index, kind, spec.index.target_recall)
    return Built(numbers, flat, index, payloads, effort)


def _new_graph(spec: CollectionSpec) -> Any:
    m = spec.index.m or HNSW_M
    if spec.dtype == "float32":
        index = faiss.IndexHNSWFlat(spec.dimension, m, faiss.METRIC_INNER_PRODUCT)
    else:
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexHNSWSQ(spec.dimension, half, m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = spec.index.ef_construction or HNSW_EF_CONSTRUCTION
    return index


def _copied_graph(base: Segment, spec: CollectionSpec) -> Any:
    """The base's graph with vectors of its own, which can be added to."""
    graph = faiss.read_index(str(base.folder / "index.faiss"))
    storage = new_flat(spec.dimension, spec.dtype)
    for begin in range(0, len(base.numbers), _ADD):
        storage.add(
            np.ascontiguousarray(base.matrix.take(np.arange(begin, min(begin + _ADD, len(base.numbers)))), np.float32)
        )
    return with_storage(graph, storage)


def _inverted_lists(kind: str, spec: CollectionSpec, matrix: npt.NDArray[Any], check: Callable[[], None]) -> Any:
    n, dimension = matrix.shape
    lists = spec.index.n_lists or int(np.clip(2 ** round(np.log2(4 * np.sqrt(n))), 16, 65_536))
    lists = min(lists, max(1, n // 39))  # fewer points a list than that, and k-means complains
    halves = dimension // 2 if dimension % 2 == 0 else dimension
    code = f"PQ{halves}x4fs" if kind == "ivf_pq" else "RaBitQfs,Refine(SQ6)"
    index = faiss.index_factory(dimension, f"IVF{lists},{code}", faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).permutation(n)[: max(64 * lists, 65_536)])
    index.train(np.ascontiguousarray(matrix[sample], np.float32))
    for begin in range(0, n, _ADD):
        check()
        index.add(np.ascontiguousarray(matrix[begin : begin + _ADD], np.float32))
    return index


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
    for effort in EFFORTS[kind]:
        found = trial.search(queries, k, None, SearchParams(ef_search=effort, nprobe=effort)).places
        if recall(found, truth) >= target + (1 - target) / 2:  # of a sample: half way to perfect, to be safe
            return effort
    return EFFORTS[kind][-1]


def recall(found: Positions, truth: Positions) -> float:
    """The share of the true neighbours [q, k] that were found."""
    wanted = (truth >= 0).sum()
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, truth, strict=True))
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
            flags = faiss.IO_FLAG_SKIP_STORAGE if isinstance(built.index, faiss.IndexHNSW) else 0
            faiss.write_index(built.index, str(aside / "index.faiss"), flags)
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
