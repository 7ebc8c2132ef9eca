"""Tests of the stored comparisons of pairs of images."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.curate.small_images import fill_folder
from tests.training.curate.test_scan import TRACK, run
from training.curate import pair_cache
from training.curate.copies.groups import detail_grade
from training.curate.copies.verify import PairComparison
from training.curate.pair_cache import NumberStore, PairStore, PairWorker, StoredComparison, StoredGrades
from training.curate.scan import Scanned
from training.curate.workers import Workers

FIRST, SECOND = np.array([2, 0, 1]), np.array([3, 1, 3])


@pytest.fixture
def scanned(tmp_path: Path, embedder) -> Scanned:
    return run(fill_folder(tmp_path / "in", 5), tmp_path / "work")


@pytest.fixture
def compared(monkeypatch) -> list[int]:
    """The numbers of pairs of all chunks that are compared."""
    numbers, compare = [], PairWorker.__call__

    def counted(self, chunk):
        numbers.append(len(chunk.first))
        return compare(self, chunk)

    monkeypatch.setattr(PairWorker, "__call__", counted)
    return numbers


def comparison(folder: Path, scanned: Scanned, other: Scanned | None = None, workers: int = 1) -> StoredComparison:
    rows = np.arange(len(scanned.images))
    second = None if other is None else (other, np.arange(len(other.images)))
    return StoredComparison(PairStore(folder), Workers(workers), TRACK, "pairs", (scanned, rows), second)


def test_the_similarities_are_those_of_a_plain_comparison(tmp_path: Path, scanned: Scanned) -> None:
    plain = PairComparison(scanned.pixels)(FIRST, SECOND)
    assert comparison(tmp_path, scanned)(FIRST, SECOND).tolist() == plain.tolist()


def test_a_pair_is_compared_once(tmp_path: Path, scanned: Scanned, compared: list[int]) -> None:
    first = comparison(tmp_path, scanned)(FIRST, SECOND)
    assert compared == [3]
    again = comparison(tmp_path, scanned)(np.append(FIRST, 0), np.append(SECOND, 4))
    assert compared == [3, 1]
    assert again[:3].tolist() == first.tolist()


def test_rows_of_the_scan_are_used_for_a_part_of_its_images(tmp_path: Path, scanned: Scanned) -> None:
    part = StoredComparison(PairStore(tmp_path), Workers(1), TRACK, "pairs", (scanned, np.array([1, 3])))
    assert part(np.array([0]), np.array([1])) == PairComparison(scanned.pixels)(np.array([1]), np.array([3]))


def test_a_record_that_was_cut_off_is_compared_again(tmp_path: Path, scanned: Scanned, compared: list[int]) -> None:
    whole = comparison(tmp_path, scanned)(FIRST, SECOND)
    (file,) = tmp_path.glob("pairs-*.bin")
    file.write_bytes(file.read_bytes()[:-7])
    assert comparison(tmp_path, scanned)(FIRST, SECOND).tolist() == whole.tolist()
    assert compared == [3, 1]
    assert comparison(tmp_path, scanned)(FIRST, SECOND).tolist() == whole.tolist()
    assert compared == [3, 1]


def test_pairs_of_two_scans(tmp_path: Path, scanned: Scanned, embedder) -> None:
    other = run(fill_folder(tmp_path / "other", 3, first=3), tmp_path / "other-work")
    found = comparison(tmp_path, scanned, other)(np.array([4, 3]), np.array([1, 2]))
    # Both folders have the pictures 3 and 4: as rows 4 and 2 of the first, and as rows 1 and 0 of the second.
    assert found[0] > 0.99
    assert found[0] > found[1]


def test_processes_give_the_same(tmp_path: Path, scanned: Scanned, monkeypatch) -> None:
    alone = comparison(tmp_path / "a", scanned)(FIRST, SECOND)
    monkeypatch.setattr(pair_cache, "FEW", 0)
    monkeypatch.setattr(pair_cache, "CHUNK", 1)
    assert comparison(tmp_path / "b", scanned, workers=2)(FIRST, SECOND).tolist() == alone.tolist()


def test_threads_give_the_same(tmp_path: Path, scanned: Scanned, monkeypatch, compared: list[int]) -> None:
    alone = comparison(tmp_path / "a", scanned)(FIRST, SECOND)
    monkeypatch.setattr(pair_cache, "SMALL_CHUNK", 1)
    assert comparison(tmp_path / "b", scanned, workers=2)(FIRST, SECOND).tolist() == alone.tolist()
    assert compared == [3, 1, 1, 1]


def test_an_image_is_graded_once(tmp_path: Path, scanned: Scanned, monkeypatch) -> None:
    graded = []

    def counted(pixels: np.ndarray) -> int:
        graded.append(pixels.shape)
        return detail_grade(pixels)

    monkeypatch.setattr(pair_cache, "detail_grade", counted)
    rows = np.array([1, 2, 4])
    expected = [float(detail_grade(scanned.pixels(row))) for row in (4, 1)]
    for n in (2, 2, 3):
        grade = StoredGrades(NumberStore(tmp_path, "detail"), 2, scanned, rows)
        assert grade(np.array([2, 0, 1])[:n])[:2].tolist() == expected
        assert len(graded) == n
    assert StoredGrades(NumberStore(tmp_path, "detail"), 1, scanned, rows)(np.array([], np.int64)).tolist() == []
