"""Tests of leak certificates: what they contain, and each way in which their verification fails."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.curate.test_leaks import changed, make_images
from tests.training.curate.vectors import around_centres
from training.curate.certificate import (
    CertificateError,
    make_certificate,
    set_digest,
    verify_certificate,
    write_certificate,
)
from training.curate.drops import Drop
from training.curate.leaks import Leaks, find_leaks
from training.curate.table import Images
from training.curate.views import Views


def sets() -> tuple[Images, Images, Images, Leaks]:
    """The kept images, the removed ones, the evaluation images, and what was found about them."""
    evaluation = make_images("val", around_centres(4), 1)
    images = changed(make_images("0", around_centres(9, seed=1), 2), pixels_sha256=(5, evaluation.pixels_sha256[2]))
    leaks = find_leaks(images, evaluation, Views.only_whole(evaluation), lambda pairs: pairs.score > 2, threshold=1)
    dropped = [drop.index for drop in leaks.drops]
    assert dropped == [5]
    return images.take(np.array([0, 1, 2, 3, 4, 6, 7, 8])), images.take(np.array(dropped)), evaluation, leaks


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Images, Images]:
    kept, removed, evaluation, leaks = sets()
    certificate = make_certificate(
        kept, evaluation, leaks, removed=removed, model="abc", threshold=0.7, settings={"hash_bits": 6}
    )
    write_certificate(tmp_path / "leaks.json", certificate)
    return tmp_path / "leaks.json", kept, evaluation


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_certificate_names_every_evaluation_image(written: tuple[Path, Images, Images]) -> None:
    path, kept, evaluation = written
    content = json.loads(path.read_text())
    assert content["result"] == "no leaks"
    assert content["model"] == "abc"
    assert content["threshold"] == 0.7
    assert content["settings"] == {"hash_bits": 6}
    assert content["dataset"]["images"] == 8
    assert content["dataset"]["digest"] == set_digest(kept)
    assert [entry["key"] for entry in content["evaluation"]["compared"]] == list(evaluation.key)
    assert [entry["sha256"] for entry in content["evaluation"]["compared"]] == [
        bytes(digest).hex() for digest in evaluation.sha256
    ]
    assert [entry["leaks_removed"] for entry in content["evaluation"]["compared"]] == [0, 0, 1, 0]
    assert [(entry["key"], entry["reason"]) for entry in content["removed"]] == [
        ("0/005.jpg", "same pixels as evaluation image val/002.jpg")
    ]


def test_the_same_images_are_verified(written: tuple[Path, Images, Images]) -> None:
    path, kept, evaluation = written
    content = verify_certificate(path, kept, evaluation=evaluation, model="abc", find=list)
    assert content["dataset"]["images"] == 8


def test_a_set_is_the_same_in_another_order_and_under_other_names() -> None:
    kept = sets()[0]
    renamed = make_images("7", kept.embedding, 9)
    renamed.sha256[:] = kept.sha256[::-1]
    assert set_digest(renamed) == set_digest(kept)
    renamed.sha256[0, 31] ^= 1
    assert set_digest(renamed) != set_digest(kept)


def test_a_changed_image_is_named(written: tuple[Path, Images, Images]) -> None:
    path, kept, _ = written
    images = changed(kept, sha256=(3, np.arange(32)))
    with pytest.raises(CertificateError, match=r"1 of 8 images were changed or added after .*: 0/003\.jpg\. Compare"):
        verify_certificate(path, images)


def test_an_added_image_is_named(written: tuple[Path, Images, Images]) -> None:
    path, kept, _ = written
    images = make_images("0", np.ones((13, 8)), 8)
    images.sha256[:8] = kept.sha256
    message = r"5 of 13 images were changed or added .*: 0/008\.jpg, 0/009\.jpg, 0/010\.jpg and 2 more\. Compare"
    with pytest.raises(CertificateError, match=message):
        verify_certificate(path, images)


def test_a_part_of_the_dataset_is_covered(written: tuple[Path, Images, Images]) -> None:
    path, kept, _ = written
    content = verify_certificate(path, kept.take(np.array([0, 3, 7])))
    assert content["dataset"]["images"] == 8


@pytest.mark.parametrize(
    ("keys", "row", "message"),
    [
        (["val/000.jpg", "val/001.jpg", "val/002.jpg", "val/new.jpg"], None, r"not compared: val/new\.jpg"),
        (["val/000.jpg", "val/001.jpg", "val/002.jpg"], None, r"missing: val/003\.jpg"),
        (["val/000.jpg", "val/001.jpg", "val/002.jpg", "val/003.jpg"], 1, r"changed: val/001\.jpg"),
    ],
)
def test_other_evaluation_images_are_named(
    written: tuple[Path, Images, Images], keys: list[str], row: int | None, message: str
) -> None:
    path, kept, evaluation = written
    other = make_images("val", np.ones((len(keys), 8)), 5)
    other = Images(**{**vars(other), "key": keys, "sha256": evaluation.sha256[: len(keys)].copy()})
    if row is not None:
        other.sha256[row] = 0
    with pytest.raises(CertificateError, match=message):
        verify_certificate(path, kept, evaluation=other)


def test_a_leak_with_the_same_bytes_gets_no_certificate() -> None:
    kept, removed, evaluation, leaks = sets()
    for source, message in (
        (evaluation, r"0/004\.jpg is a leak: it has the same bytes as the evaluation image val/000"),
        (removed, r"0/004\.jpg is a leak: it has the same bytes as the removed image 0/005"),
    ):
        with pytest.raises(CertificateError, match=message):
            make_certificate(
                changed(kept, sha256=(4, source.sha256[0])),
                evaluation,
                leaks,
                removed=removed,
                model="abc",
                threshold=0.7,
                settings={},
            )


def test_an_evaluation_image_in_the_dataset_is_named(written: tuple[Path, Images, Images]) -> None:
    path, kept, evaluation = written
    with pytest.raises(CertificateError, match=r"0/004\.jpg is a leak: it has the same bytes as .* val/001\.jpg"):
        verify_certificate(path, changed(kept, sha256=(4, evaluation.sha256[1])))


def test_a_repeated_comparison_that_finds_a_leak(written: tuple[Path, Images, Images]) -> None:
    path, kept, _ = written
    drops = [Drop(2, "leaks", "copy of evaluation image val/001.jpg"), Drop(3, "leaks", "another one")]
    message = r"0/002\.jpg is a leak: copy of evaluation image val/001\.jpg, and 1 more"
    with pytest.raises(CertificateError, match=message):
        verify_certificate(path, kept, find=lambda: drops)


def test_another_model(written: tuple[Path, Images, Images]) -> None:
    path, kept, _ = written
    with pytest.raises(CertificateError, match="the certificate is for the model abc, not for xyz"):
        verify_certificate(path, kept, model="xyz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a leak certificate"),
        ({"version": 2}, "has version 2; only version 1 can be verified"),
        ({"threshold": 0.1}, "was changed: its content does not fit its digest"),
        ({"removed": []}, "was changed: its content does not fit its digest"),
    ],
)
def test_a_changed_certificate(written: tuple[Path, Images, Images], changes: dict[str, Any], message: str) -> None:
    path, kept, _ = written
    rewritten(path, **changes)
    with pytest.raises(CertificateError, match=message):
        verify_certificate(path, kept)


def test_no_certificate(tmp_path: Path) -> None:
    path = tmp_path / "leaks.json"
    for content in (b"{", b"\xff", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(CertificateError, match=r"leaks\.json is not"):
            verify_certificate(path, sets()[0])
    with pytest.raises(FileNotFoundError):
        verify_certificate(tmp_path / "missing.json", sets()[0])
