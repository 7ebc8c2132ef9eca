"""Tars that are small and stand for gigabytes are reported, need little memory, and do not stop a run."""

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.folder import Account
from service.ingest import archives, unpacking
from service.ingest.folders import Photo, Problem
from service.ingest.sources import find_photos
from tests.service.ingest import bombs

MIB = 2**20


def read(*sources: Path, account: Account | None = None) -> tuple[list[str], list[str], int]:
    """Return the ids of the images, the problems, and the highest number of bytes in memory."""
    ids: list[str] = []
    problems: list[str] = []
    tracemalloc.start()
    try:
        for found in find_photos([str(source) for source in sources], account=account):
            if isinstance(found, Photo):
                ids.append(found.id)
            else:
                problems.append(found.reason)
        return ids, problems, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """An image that is indexed after the bomb."""
    (tmp_path / "good.jpg").write_bytes(b"good")
    return tmp_path / "good.jpg"


@pytest.mark.parametrize(
    ("suffix", "parts"),
    [
        ("gz", bombs.many_images),
        ("gz", bombs.one_sample),
        ("gz", bombs.ignored_member),
        ("bz2", bombs.ignored_member),
        ("xz", bombs.ignored_member),
    ],
)
def test_a_tar_that_unpacks_to_gigabytes_is_left(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, parts: Callable[[], Iterator[bytes]]
) -> None:
    monkeypatch.setattr(unpacking, "FREE_BYTES", 16 * MIB)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 20)
    monkeypatch.setattr(archives, "_MAX_SAMPLE_BYTES", 4 * MIB)
    bomb = bombs.write(tmp_path / f"x.tar.{suffix}", parts())
    ids, problems, peak = read(bomb, good)
    assert problems == ["the rest of the tar was not read: it unpacks to more than 20 times its size"]
    assert ids[-1] == "good.jpg"
    assert len(ids) < 100
    assert peak < 14 * MIB


@pytest.mark.parametrize("parts", [bombs.long_name, bombs.long_attributes])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_header_of_64_megabytes_is_not_read(
    tmp_path: Path, good: Path, parts: Callable[[], Iterator[bytes]], suffix: str
) -> None:
    ids, problems, peak = read(bombs.write(tmp_path / f"x.{suffix}", parts()), good)
    assert (ids, problems) == (
        ["good.jpg"],
        ["the rest of the tar was not read: a header has more than 1048576 bytes"],
    )
    assert peak < 8 * MIB


def test_a_member_of_negative_size_does_not_end_in_a_circle(tmp_path: Path, good: Path) -> None:
    for suffix in ("tar", "tar.gz"):
        ids, problems, _ = read(bombs.write(tmp_path / f"x.{suffix}", bombs.backwards()), good)
        assert ids == ["a.jpg", "good.jpg"]
        assert problems == [
            "not a plain file",
            "the rest of the tar was not read: a member begins before the end of the one before it",
        ]


def test_a_chain_of_headers_does_not_exhaust_the_stack(tmp_path: Path, good: Path) -> None:
    ids, problems, _ = read(bombs.write(tmp_path / "x.tar", bombs.nested_headers()), good)
    assert ids == ["good.jpg"]
    assert "recursion" in problems[0] or "header has more than" in problems[0]


def test_a_dictionary_that_needs_gigabytes_is_refused(tmp_path: Path, good: Path) -> None:
    ids, problems, _ = read(bombs.huge_dictionary(tmp_path / "x.tar.xz"), good)
    assert ids == ["good.jpg"]
    assert "Memory usage limit exceeded" in problems[0]


def test_a_tar_with_too_many_members_is_left(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    ids, problems, _ = read(bombs.write(tmp_path / "x.tar", bombs.many_images()), good)
    assert ids == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "good.jpg"]
    assert problems == ["the rest of the tar was not read: it has more than 5 members"]


def test_names_and_kinds_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_MAX_KINDS", 3)
    long = [bombs.header("x", 5004, b"L") + b"y" * 5000 + b".jpg" + bytes(116), bombs.header("x", 0)]
    names = [bombs.header(f"a.kind{index}", 0) for index in range(10)]
    account = Account()
    _, problems, _ = read(bombs.write(tmp_path / "x.tar", iter([*long, *names, bytes(1024)])), account=account)
    assert problems == ["the name has 5004 characters; the limit is 4096"]
    assert account.ignored == {".kind0": 1, ".kind1": 1, ".kind2": 1, "of other kinds": 7}


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz", "tar"])
def test_the_content_says_how_a_tar_is_compressed(tmp_path: Path, suffix: str) -> None:
    parts = [bombs.header("a.jpg", 1), b"A" + bytes(511), bytes(1024)]
    for kind in ("gz", "bz2", "xz", "tar"):
        path = bombs.write(tmp_path / f"made.{kind}", iter(parts)).rename(tmp_path / f"{kind}.{suffix}")
        [found] = find_photos([str(path)])
        assert not isinstance(found, Problem)
        assert found.load().data == b"A"
        assert found.held_bytes == (0 if kind == "tar" else 1)
