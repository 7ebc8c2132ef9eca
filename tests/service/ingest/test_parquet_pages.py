"""Parquet files that are small and stand for gigabytes are reported, and rows with large values are read singly."""

import random
from contextlib import suppress
from pathlib import Path

import pytest

from service.ingest import parquet_images, parquet_pages
from service.ingest.folders import Photo, Problem
from service.ingest.parquet_pages import RowGroup
from service.ingest.sources import find_photos

pa = pytest.importorskip("pyarrow", reason="the extra `parquet`")
import pyarrow.parquet as pq  # noqa: E402

MIB = 2**20


def write(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **{"compression": "zstd", "dictionary_pagesize_limit": 2**30} | options)
    return path


def problems(path: Path) -> list[str]:
    """The reasons why images of a file cannot be read."""
    found = list(find_photos([str(path)]))
    return [one.reason for one in found if isinstance(one, Problem)]


def group_of(path: Path, names: set[str]) -> RowGroup:
    with path.open("rb") as file, pq.ParquetFile(path) as table:
        return RowGroup(table, file, 0, names)


def test_a_page_out_of_proportion_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "FREE_PAGE_BYTES", MIB)
    path = write(tmp_path / "x.parquet", {"image": [bytes(MIB)] * 8}, use_dictionary=False)
    [reason] = problems(path)
    assert reason.startswith("the rest of the Parquet file was not read: a page of column image unpacks from")
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_RATIO", 10**6)
    assert problems(path) == []
    monkeypatch.setattr(parquet_pages, "MAX_OPEN_BYTES", 8 * MIB)
    assert "bytes in row group 0; the limit is 8,388,608" in problems(path)[0]


def test_values_that_all_rows_repeat_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "BATCH_BYTES", 8 * MIB)
    path = write(tmp_path / "x.parquet", {"image": [bytes(MIB)] * 100, "text": ["y" * MIB] * 100})
    assert path.stat().st_size < 2000
    group = group_of(path, {"image", "text"})
    assert [column.longest for columns in group.columns.values() for column in columns] == [MIB, MIB]
    assert group.rows_at_once(["image"], (16, 4, 1)) == 4
    assert group.rows_at_once(["image", "text"], (256, 64, 16, 4, 1)) == 1
    found = [one for one in find_photos([str(path)]) if isinstance(one, Photo)]
    assert len(found) == 0  # the text is too large for metadata
    path = write(tmp_path / "y.parquet", {"image": [bytes(MIB)] * 100})
    assert [len(one.load().data) for one in find_photos([str(path)]) if isinstance(one, Photo)] == [MIB] * 100


def test_a_row_whose_metadata_is_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": [b"A", b"B", b"C"], "text": ["a", "b" * 2 * MIB, "c"]})
    found = list(find_photos([str(path)]))
    assert [one.load() for one in found if isinstance(one, Photo)] == [(b"A", {"text": "a"}), (b"C", {"text": "c"})]
    assert [(one.source, one.reason) for one in found if isinstance(one, Problem)] == [
        (f"{path}#1", "the metadata of the row has more than 1048576 bytes")
    ]


def test_a_row_with_a_list_of_everything_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_LIST_BYTES", 8 * MIB)
    tags = [["y" * MIB] * 20, []]
    [reason] = problems(write(tmp_path / "x.parquet", {"image": [b"A", b"B"], "tags": tags}))
    assert "the lists in column tags.list.element can need" in reason
    boxes = [[{"box": [1.0, 2.0, 3.0, 4.0], "name": "milk"}] * 5] * 1000
    assert problems(write(tmp_path / "y.parquet", {"image": [bytes([i % 9]) for i in range(1000)], "b": boxes})) == []
    nothing = pa.array([[None] * 2_000_000], pa.list_(pa.int8()))
    assert len(problems(write(tmp_path / "z.parquet", {"image": [b"A"], "none": nothing}))) == 1


def test_a_file_with_more_rows_than_bytes_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": pa.array([None] * 5000, pa.binary())})
    size = path.stat().st_size
    assert problems(path) == [f"the Parquet file cannot be read: it has more than {size:,} rows"]
    monkeypatch.setattr(parquet_images, "MAX_MEMBERS", 7)
    assert problems(path) == ["the Parquet file cannot be read: it has more than 7 rows"]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_codec_and_version_is_understood(tmp_path: Path, codec: str, version: str) -> None:
    path = write(
        tmp_path / "x.parquet",
        {"image": [b"%d" % (i % 7) * 9 for i in range(50)], "name": [f"n{i % 3}" for i in range(50)]},
        compression=codec,
        data_page_version=version,
    )
    columns = group_of(path, {"image", "name"}).columns
    assert [(c.longest, c.values, c.is_nested) for name in ("image", "name") for c in columns[name]] == [
        (9, 50, False),
        (2, 50, False),
    ]
    assert problems(path) == []


def test_values_that_share_their_beginnings_count_as_long_as_their_page(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet",
        {"image": [bytes(1000)] * 200},
        use_dictionary=False,
        column_encoding={"image": "DELTA_BYTE_ARRAY"},
    )
    [column] = group_of(path, {"image"}).columns["image"]
    assert column.longest == column.largest >= 1000
    assert problems(path) == []


def test_damaged_headers_of_pages_cause_no_other_error(tmp_path: Path) -> None:
    dice = random.Random(1)
    for _ in range(3000):
        with suppress(ValueError):
            parquet_pages._parse(dice.randbytes(dice.randrange(1, 60)))
    path = write(tmp_path / "x.parquet", {"image": [b"%d" % i for i in range(50)]}, use_dictionary=False)
    whole = path.read_bytes()
    for _ in range(100):
        broken = bytearray(whole)
        broken[dice.randrange(4, 40)] = dice.randrange(256)  # in the header of the first page
        path.write_bytes(broken)
        with path.open("rb") as file, pq.ParquetFile(path) as table, suppress(ValueError):
            RowGroup(table, file, 0, {"image"})
