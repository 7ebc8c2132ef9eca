"""What the scan finds out about an image, and the Parquet parts and the table in which it is stored.

The scan writes a part as soon as its images are scanned. When all parts exist, they are merged into a table, which is a
folder: `columns.parquet` has all columns but the embeddings, which are in `embedding.npy`, because a NumPy file can be
mapped into memory. `problems.parquet` lists the images that could not be used, and `table.json` has the digests.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from model.files import publish, write_text
from training.curate.listing import Listing, digest_of
from training.curate.quality import MEASURES
from training.curate.table import Images

COLUMNS, EMBEDDING, PROBLEMS, FACTS = "columns.parquet", "embedding.npy", "problems.parquet", "table.json"
MEASURE: Final = "measure."
"""The start of the names of the columns with measures."""


@dataclass(frozen=True)
class Found:
    """What the scan finds out about one readable image. The fields are those of `Images`."""

    sha256: bytes
    pixels_sha256: bytes
    phash: int
    width: int
    height: int
    n_bytes: int
    measures: Mapping[str, float]
    embedding: npt.NDArray[np.float32]  # [D]


@dataclass(frozen=True)
class Row:
    """An image with what the scan found out about it, or with the problem that keeps it from being used."""

    key: str
    version: str
    found: Found | None
    problem: str | None = None


def found_in(images: Images, row: int) -> Found:
    """Return what a table knows about the image in a row."""
    return Found(
        sha256=images.sha256[row].tobytes(),
        pixels_sha256=images.pixels_sha256[row].tobytes(),
        phash=int(images.phash[row]),
        width=int(images.width[row]),
        height=int(images.height[row]),
        n_bytes=int(images.n_bytes[row]),
        measures={name: float(values[row]) for name, values in images.measures.items()},
        embedding=np.asarray(images.embedding[row]),
    )


# Parts


def _numbers(rows: Sequence[Row], dim: int) -> dict[str, pa.Array]:
    """Return the columns with what was found. They have nulls for images with a problem."""
    found = [row.found for row in rows]
    columns = {
        name: pa.array([None if f is None else getattr(f, name) for f in found], kind)
        for name, kind in (
            ("sha256", pa.binary(32)),
            ("pixels_sha256", pa.binary(32)),
            ("phash", pa.uint64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("n_bytes", pa.int64()),
        )
    }
    for name in MEASURES:
        columns[MEASURE + name] = pa.array([None if f is None else f.measures[name] for f in found], pa.float32())
    columns["embedding"] = pa.array([None if f is None else f.embedding for f in found], pa.list_(pa.float32(), dim))
    return columns


def part_bytes(rows: Sequence[Row]) -> bytes:
    """Return rows as a Parquet file."""
    dim = next((len(row.found.embedding) for row in rows if row.found is not None), 0)
    columns = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "version": pa.array([row.version for row in rows], pa.string()),
        "problem": pa.array([row.problem for row in rows], pa.string()),
        **_numbers(rows, dim),
    }
    return _bytes_of(pa.table(columns))


def _bytes_of(table: pa.Table) -> bytes:
    """Return a table as a Parquet file. It is made in memory, so that a full disk is met by our own writing only."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


# The table


def write_table(folder: Path, parts: Iterable[Path], listing: Listing, facts: Mapping[str, str]) -> None:
    """Merge parts into a table, which appears at `folder` when it is complete.

    Args:
        folder: the folder of the table. It does not exist.
        parts: the files of the parts, in the order of the listing.
        listing: the images.
        facts: entries for `table.json`.

    Raises:
        OSError: a file cannot be read or written.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tables, problems = [], [pa.table({"key": pa.array([], pa.string()), "problem": pa.array([], pa.string())})]
    start, dim, n = 0, 0, 0
    with (temporary / EMBEDDING).open("wb") as file:
        file.write(b"\0" * 128)  # for the header, whose numbers are known at the end
        for path in parts:
            part = pq.read_table(path)
            part = part.append_column("label", pa.array(listing.label[start : start + len(part)], pa.string()))
            start += len(part)
            is_read = pa.compute.is_null(part["problem"])
            read, unread = part.filter(is_read), part.filter(pa.compute.invert(is_read))
            problems.append(unread.select(["key", "problem"]))
            if len(read):
                vectors = read["embedding"].combine_chunks()
                dim, n = vectors.type.list_size, n + len(read)
                file.write(vectors.flatten().to_numpy().astype("<f4").tobytes())
            tables.append(read.drop_columns(["embedding", "problem"]))
        file.seek(0)
        file.write(_npy_header(n, dim))
    columns = pa.concat_tables(tables)
    (temporary / COLUMNS).write_bytes(_bytes_of(columns))
    unlisted = {"key": [key for key, _ in listing.unlisted], "problem": [reason for _, reason in listing.unlisted]}
    listed = pa.concat_tables([*problems, pa.table(unlisted, problems[0].schema)]).sort_by("key")
    (temporary / PROBLEMS).write_bytes(_bytes_of(listed))
    digest = _digest(columns, listed, temporary / EMBEDDING)
    write_text(temporary / FACTS, json.dumps({**facts, "digest": digest, "images": n, "problems": len(listed)}))
    publish(temporary, folder)


def _npy_header(n: int, dim: int) -> bytes:
    """Return the header of a NumPy file with a float32 array [n, dim], 128 bytes long."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (n, dim)})
    assert header.tell() == 128, header.tell()
    return header.getvalue()


def _digest(columns: pa.Table, problems: pa.Table, embedding: Path) -> str:
    """Return a sha256 of a table's content, without the versions of its files."""
    digest = hashlib.sha256()
    for table in (columns.drop_columns(["version"]), problems):
        for name in sorted(table.column_names):
            digest.update(f"{name}\n".encode())
            column = table[name]
            if pa.types.is_primitive(column.type):
                digest.update(column.to_numpy().tobytes())
            else:
                digest.update(digest_of(*column.to_pylist()).encode())
    with embedding.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the digests and counts of a table, from its `table.json`."""
    facts = json.loads((folder / FACTS).read_text())
    assert isinstance(facts, dict)
    return facts


def read_images(folder: Path) -> Images:
    """Return the images of a table. The embeddings are mapped into memory."""
    columns = pq.read_table(folder / COLUMNS)

    def digests(name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(b"".join(columns[name].to_pylist()), np.uint8).reshape(-1, 32)

    return Images(
        key=columns["key"].to_pylist(),
        sha256=digests("sha256"),
        pixels_sha256=digests("pixels_sha256"),
        **{name: columns[name].to_numpy() for name in ("phash", "width", "height", "n_bytes")},
        label=columns["label"].to_pylist(),
        measures={name: columns[MEASURE + name].to_numpy() for name in MEASURES},
        embedding=_mapped(folder / EMBEDDING) if len(columns) else np.zeros((0, 0), np.float32),
    )


def read_problems(folder: Path) -> list[tuple[str, str]]:
    """Return the key of each image of a table that could not be used, with the reason."""
    rows = pq.read_table(folder / PROBLEMS)
    return list(zip(rows["key"].to_pylist(), rows["problem"].to_pylist(), strict=True))


def read_versions(folder: Path) -> dict[str, tuple[str, int]]:
    """Return, by key, the version of the file of each image of a table, and the number of the image's row."""
    columns = pq.read_table(folder / COLUMNS, columns=["key", "version"])
    versions = zip(columns["key"].to_pylist(), columns["version"].to_pylist(), strict=True)
    return {key: (version, row) for row, (key, version) in enumerate(versions)}


def remaining(images: Images, indices: npt.NDArray[np.int64], file: Path) -> Images:
    """Return the images with the numbers `indices`, in ascending order, as a table of their own.

    The embeddings are copied to `file`, which is mapped into memory.
    """
    if len(indices) == len(images):
        return images
    file.unlink(missing_ok=True)  # an earlier mapping of it stays valid
    with file.open("wb") as opened:
        opened.write(_npy_header(len(indices), images.embedding.shape[1]))
        for start in range(0, len(indices), 2**14):
            opened.write(np.ascontiguousarray(images.embedding[indices[start : start + 2**14]], "<f4").tobytes())
    return images.take(indices, _mapped(file) if len(indices) else images.embedding[:0])


def _mapped(file: Path) -> npt.NDArray[np.float32]:
    mapped = np.load(file, mmap_mode="r")
    assert mapped.dtype == np.float32, mapped.dtype
    return np.asarray(mapped)
