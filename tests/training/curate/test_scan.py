"""Tests of the scan: what it finds out, and that it continues after a kill and takes over what is known."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.artifact import bundled_artifact
from tests.training.curate.small_images import fill_folder, picture
from training.curate import scan as scan_module
from training.curate.listing import Reader
from training.curate.progress import in_lines
from training.curate.rows import COLUMNS, EMBEDDING, PROBLEMS, read_problems
from training.curate.scan import Scanned, ScanSettings, scan
from training.curate.workers import Workers

TRACK = in_lines(lambda line: None)
ONE = Workers(1)


def run(source: Path | list[Path], folder: Path, run_all=ONE) -> Scanned:
    addresses = tuple(map(str, source if isinstance(source, list) else [source]))
    return scan(ScanSettings(addresses, folder, bundled_artifact(), "cls", 8), run_all, TRACK, "scan")


def contents(scanned: Scanned) -> dict[str, bytes]:
    return {name: (scanned.folder / name).read_bytes() for name in (COLUMNS, EMBEDDING, PROBLEMS)}


class Killed(BaseException):
    """Stands for kill -9: nothing that follows is executed."""


class KilledAfter(Workers):
    """A worker that is killed after some parts."""

    def __init__(self, parts: int) -> None:
        super().__init__(1)
        self.parts = parts

    def __call__(self, make, items):
        for done, result in enumerate(super().__call__(make, items)):
            if done == self.parts:
                raise Killed
            yield result


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The keys of the images that are read."""
    keys, encoded = [], Reader.encoded

    def counted(self, location):
        keys.append(location.key)
        return encoded(self, location)

    monkeypatch.setattr(Reader, "encoded", counted)
    return keys


def test_a_row_has_what_the_stages_need(tmp_path: Path, embedder) -> None:
    source = fill_folder(tmp_path / "in", 5)
    turned = picture(9, (60, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(source / "turned.png", exif=exif)
    images = run(source, tmp_path / "work").images
    assert list(images.key) == [
        *(f"1/a/{i:03d}.png" for i in (0, 2, 4)),
        *(f"1/b/{i:03d}.png" for i in (1, 3)),
        "1/turned.png",
    ]
    assert images.label == ["a", "a", "a", "b", "b", None]
    data = (source / "a" / "002.png").read_bytes()
    assert images.sha256[1].tobytes() == hashlib.sha256(data).digest()
    assert images.n_bytes[1] == len(data)
    pixels = np.asarray(picture(2))
    hashed = np.array([40, 48], "<u4").tobytes() + pixels.tobytes()
    assert images.pixels_sha256[1].tobytes() == hashlib.sha256(hashed).digest()
    assert (images.width[5], images.height[5]) == (20, 60)  # upright
    assert len(set(images.phash.tolist())) == 6
    assert np.allclose(np.linalg.norm(images.embedding, axis=1), 1)
    assert isinstance(images.embedding.base, np.memmap)


def test_images_that_cannot_be_used_are_listed_with_the_reason(tmp_path: Path, embedder) -> None:
    source = fill_folder(tmp_path / "in", 3)
    (source / "empty.jpg").write_bytes(b"")
    (source / "cut.png").write_bytes((source / "a" / "000.png").read_bytes()[:200])
    picture(1, (100, 7)).save(source / "thin.png")
    problems = dict(read_problems(run(source, tmp_path / "work").folder))
    assert problems.keys() == {"1/empty.jpg", "1/cut.png", "1/thin.png"}
    assert "empty" in problems["1/empty.jpg"]
    assert "damaged or cut off" in problems["1/cut.png"]
    assert problems["1/thin.png"] == "the image is 100 x 7: its shorter side must have at least 8 pixels"


def test_a_source_without_any_usable_image_is_refused(tmp_path: Path, embedder) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 1 images can be used; the first: 1/bad.jpg: not a known image"):
        run(tmp_path / "in", tmp_path / "work")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_scan_continues_with_the_missing_parts(tmp_path: Path, embedder, reads, after: int) -> None:
    source = fill_folder(tmp_path / "in", 10)
    whole = contents(run(source, tmp_path / "whole"))
    reads.clear()
    with pytest.raises(Killed):
        run(source, tmp_path / "work", KilledAfter(after))
    n_before = len(reads)
    resumed = run(source, tmp_path / "work")
    assert contents(resumed) == whole
    assert resumed.n_read == 10 - 4 * after
    assert len(reads) - n_before == resumed.n_read
    again = run(source, tmp_path / "work")
    assert (again.is_new, again.n_read, again.folder) == (False, 0, resumed.folder)


def test_a_scan_killed_while_it_stores_the_table_continues(tmp_path: Path, embedder, monkeypatch) -> None:
    source = fill_folder(tmp_path / "in", 6)
    whole = contents(run(source, tmp_path / "whole"))

    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("training.curate.rows.publish", killed)
        with pytest.raises(Killed):
            run(source, tmp_path / "work")
    resumed = run(source, tmp_path / "work")
    assert contents(resumed) == whole
    assert resumed.n_read == 0
    assert not list((tmp_path / "work").glob(".table*"))


def test_added_images_are_the_only_ones_that_are_read(tmp_path: Path, embedder, reads) -> None:
    source = fill_folder(tmp_path / "in", 10)
    run(source, tmp_path / "work")
    fill_folder(source, 2, first=20)
    (source / "a" / "000.png").unlink()
    reads.clear()
    n_embedded = embedder.images
    more = run(source, tmp_path / "work")
    assert sorted(reads) == ["1/a/020.png", "1/b/021.png"]
    assert more.n_read == embedder.images - n_embedded == 2
    assert contents(more) == contents(run(source, tmp_path / "scratch"))
    assert len(list((tmp_path / "work").glob("*table*"))) == 1
    assert len(list((tmp_path / "work" / "parts").iterdir())) == 3


class Unused(Workers):
    """Workers that must not be started."""

    def __call__(self, make, items):
        raise AssertionError("other processes were started")


def test_few_added_images_are_scanned_without_other_processes(tmp_path: Path, embedder, monkeypatch) -> None:
    source = fill_folder(tmp_path / "in", 6)
    with pytest.raises(AssertionError, match="processes were started"):
        run(source, tmp_path / "work", Unused(2))
    run(source, tmp_path / "work")
    fill_folder(source, 2, first=20)
    assert contents(run(source, tmp_path / "work", Unused(2))) == contents(run(source, tmp_path / "scratch"))
    monkeypatch.setattr(scan_module, "FEW", 2)
    fill_folder(source, 3, first=30)
    with pytest.raises(AssertionError, match="processes were started"):
        run(source, tmp_path / "work", Unused(2))


def test_moved_images_are_read_but_not_decoded_again(tmp_path: Path, embedder, monkeypatch) -> None:
    source = fill_folder(tmp_path / "in", 4)
    run(source, tmp_path / "work")
    shutil.move(source / "a" / "000.png", source / "b" / "moved.png")
    monkeypatch.setattr(scan_module, "decode_stored", None)  # would fail
    moved = run(source, tmp_path / "work")
    assert moved.n_read == 1
    assert moved.images.label == ["a", "b", "b", "b"]
    monkeypatch.undo()


def test_a_file_that_was_written_again_is_read(tmp_path: Path, embedder) -> None:
    source = fill_folder(tmp_path / "in", 4)
    before = run(source, tmp_path / "work").images
    path = source / "a" / "000.png"
    n_bytes = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"\0" * n_bytes)[:n_bytes][:-1] + b"x")  # as long as before
    os.utime(path, ns=(0, 10**18))
    after = run(source, tmp_path / "work").images
    assert before.sha256[0].tobytes() != after.sha256[0].tobytes()


def test_a_source_that_fails_in_the_middle_loses_nothing(tmp_path: Path, embedder, monkeypatch) -> None:
    source = fill_folder(tmp_path / "in", 10)
    encoded = Reader.encoded

    def failing(self, location):
        if location.key == "1/b/003.png":
            raise OSError("1/b/003.png cannot be read: the network is down")
        return encoded(self, location)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "encoded", failing)
        with pytest.raises(OSError, match=r"b/003.png cannot be read: the network is down"):
            run(source, tmp_path / "work")
    assert run(source, tmp_path / "work").n_read == 6


def test_a_full_disk_keeps_the_finished_parts(tmp_path: Path, embedder, monkeypatch) -> None:
    source = fill_folder(tmp_path / "in", 10)
    stored = scan_module.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name.startswith("000001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        stored(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            run(source, tmp_path / "work")
    assert run(source, tmp_path / "work").n_read == 6


def test_images_that_change_after_the_scan_are_refused(tmp_path: Path, embedder) -> None:
    source = fill_folder(tmp_path / "in", 2)
    scanned = run(source, tmp_path / "work")
    assert np.array_equal(scanned.pixels(0), np.asarray(picture(0)))
    picture(7).save(source / "a" / "000.png")
    with pytest.raises(OSError, match=r"1/a/000.png has changed since it was scanned; start the command again"):
        scanned.encoded(0)
    (source / "a" / "000.png").unlink()
    with pytest.raises(OSError, match=r"1/a/000.png cannot be read any more: .*; if it was removed or replaced, start"):
        scanned.encoded(0)


def test_equal_names_in_two_sources_are_two_images(tmp_path: Path, embedder) -> None:
    sources = [fill_folder(tmp_path / "x", 2), fill_folder(tmp_path / "y", 2, first=0)]
    images = run(sources, tmp_path / "work").images
    assert list(images.key) == ["1/a/000.png", "1/b/001.png", "2/a/000.png", "2/b/001.png"]
