"""Opens segments: verifies the checksum of every file and maps the files into memory.

Because the files are memory-mapped (`IO_FLAG_MMAP_IFC`), opening a segment takes little longer than computing the
checksums, and all processes of a host share one copy in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import faiss
import numpy as np
import xxhash

from service.errors import StorageFailed
from service.search.database import Chunk, SegmentRow
from service.search.indexes import structure_of
from service.search.kinds import EXACT, kind_named
from service.search.segments import Mapped, OnDisk, Payloads, Segment, matrix_of, new_flat

_CHUNK: Final = 2**20


def checksum(path: Path) -> str:
    """Return the xxh3 checksum of a file, in hex. The algorithm is fast enough to check every byte each time a segment
    is opened."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def open_segment(root: Path, row: SegmentRow, dtype: str) -> Segment:
    """Verify the files of a segment, map them into memory, and return the open segment.

    Raises:
        StorageFailed: a file is missing or damaged.
        ValueError: this version does not know the segment's kind.
    """
    folder, kind = root / row.folder, kind_named(row.kind)
    for name, (size, digest) in row.files.items():
        try:
            whole = (folder / name).stat().st_size == size and checksum(folder / name) == digest
        except OSError as error:
            raise StorageFailed(f"segment {row.folder}: {name}: {error.strerror}") from error
        if not whole:
            raise StorageFailed(f"segment {row.folder}: {name} is damaged")
    # A plain array, because a memmap is slow to index.
    numbers = np.asarray(np.load(folder / "numbers.npy", mmap_mode="r", allow_pickle=False))
    flat = faiss.read_index(str(folder / "vectors.faiss"), faiss.IO_FLAG_MMAP_IFC)
    index = structure_of(kind).open(folder, flat)
    matrix: Mapped | OnDisk = Mapped(matrix_of(flat, dtype))
    if kind.on_disk:
        matrix = OnDisk(folder / "vectors.faiss", flat.d, dtype, len(numbers))
    return Segment(row, folder, numbers, flat, matrix, index, Payloads.opened(folder, on_disk=kind.on_disk))


def in_memory(row: SegmentRow, chunks: Sequence[Chunk], dimension: int, dtype: str) -> Segment:
    """Return a replacement for a damaged segment. The replacement contains the items in `chunks`, which were read from
    the database. It is stored in memory and has no index, so it is searched exactly."""
    flat = new_flat(dimension, dtype)
    for chunk in chunks:
        flat.add(chunk.vectors)
    numbers = np.concatenate([np.empty(0, np.int64), *(chunk.numbers for chunk in chunks)])
    payloads = Payloads.of([payload for chunk in chunks for payload in chunk.payloads])
    matrix = Mapped(matrix_of(flat, dtype))
    return Segment(replace(row, kind=EXACT.name), Path(), numbers, flat, matrix, None, payloads, whole=False)
