"""Tests of the int8 gate: its k-NN agrees with the definition in training, and it allows only the documented losses."""

from pathlib import Path

import numpy as np
import pytest

from model.engines import parity
from model.engines.knn_gate import (
    ClassTokens,
    LabelledImages,
    class_tokens,
    find_labelled,
    knn_gate,
    knn_hits,
    knn_right,
)
from model.preprocess import PreprocessSpec, preprocess

SPEC = PreprocessSpec(resize=80, crop=70)


def clusters(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    centres = np.random.default_rng(0).normal(size=(5, 16))
    return (centres[labels] + rng.normal(size=(n, 16))).astype(np.float32), labels


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_is_what_training_measures(leave_one_out: bool, k: int) -> None:
    torch = pytest.importorskip("torch")
    from training.evaluate.knn import knn_accuracy

    train, labels = clusters(120, seed=1)
    test, test_labels = (train, labels) if leave_one_out else clusters(90, seed=2)
    arrays = (train, labels, test, test_labels)
    theirs = knn_accuracy(*(torch.from_numpy(a) for a in arrays), [k], leave_one_out=leave_one_out)[k]
    assert knn_right(*arrays, k, leave_one_out=leave_one_out) == round(theirs * len(test))
    assert theirs > 0.5 if k < 1000 else theirs > 0


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_several_values_of_k_share_one_search(leave_one_out: bool) -> None:
    train, labels = clusters(120, seed=1)
    test, test_labels = (train, labels) if leave_one_out else clusters(90, seed=2)
    ks = (1, 3, 20, 1000)
    hits = knn_hits(train, labels, test, test_labels, ks, leave_one_out=leave_one_out)
    alone = [knn_right(train, labels, test, test_labels, k, leave_one_out=leave_one_out) for k in ks]
    assert hits.sum(axis=0).tolist() == alone
    assert len(set(alone)) > 1


def test_no_image_of_a_later_block_is_its_own_neighbour() -> None:
    images = np.eye(2, dtype=np.float32)[np.zeros(1030, int)]  # all alike: only the label tells which one votes
    images[-1] = [0, 1]
    labels = np.arange(1030) == 1029  # the only one of its class: its nearest neighbour is of the other
    assert knn_right(images, labels.astype(int), images, labels.astype(int), 1, leave_one_out=True) == 1029


def tokens(val_wrong: int, train_wrong: int, *, n_val: int = 240, n_train: int = 1000) -> ClassTokens:
    """Return tokens of two classes that are far apart, with the given number of images in each part near the wrong
    class.
    """

    def of(n: int, wrong: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n) % 2
        sides = labels.copy()
        sides[:wrong] = 1 - sides[:wrong]
        return np.eye(2, dtype=np.float32)[sides], labels

    return ClassTokens(*of(n_train, train_wrong), *of(n_val, val_wrong))


@pytest.mark.parametrize(
    ("val", "train", "status"), [(0, 0, "passed"), (2, 5, "passed"), (3, 0, "failed"), (0, 6, "failed")]
)
def test_what_int8_may_lose(val: int, train: int, status: str) -> None:
    gate = knn_gate(tokens(1, 10), tokens(1 + val, 10 + train))
    assert gate.status == status
    assert gate.val_right == (239, 239 - val)
    assert gate.train_right == (990, 990 - train)
    assert f"val 239 -> {239 - val} of 240 images (may fall by 2)" in gate.reason
    assert f"train 99.00 -> {99 - train / 10:.2f} % (may fall by 0.5 points)" in gate.reason


def test_more_right_than_float32_passes_and_nan_does_not() -> None:
    assert knn_gate(tokens(5, 50), tokens(0, 0)).status == "passed"
    broken = tokens(0, 0)
    broken.train[3] = np.nan
    assert knn_gate(tokens(0, 0), broken).status == "failed"
    broken = tokens(0, 0)
    broken.val[:2] = np.nan  # two images may be lost, but not to NaN
    assert knn_gate(tokens(0, 0), broken).status == "failed"


@pytest.mark.parametrize(("n_val", "n_train"), [(199, 1000), (200, 499)])
def test_few_photos_let_nothing_pass(n_val: int, n_train: int) -> None:
    few = {"n_val": n_val, "n_train": n_train}
    gate = knn_gate(tokens(0, 0, **few), tokens(0, 0, **few))
    assert gate.status == "not measured"
    start = "too few images (at least 500 in train and 200 in val are needed): k-NN (k=20) on val "
    assert gate.reason.startswith(start)
    assert knn_gate(tokens(0, 0, **few), tokens(3, 0, **few)).status == "failed"
    assert knn_gate(*[tokens(0, 0, n_val=200, n_train=500)] * 2).status == "passed"


@pytest.mark.parametrize("held_out", ["val", "Validation", "test"])
def test_labelled_folders(tmp_path: Path, held_out: str) -> None:
    assert find_labelled(tmp_path, lambda path: None) is None
    for name in ("train/pear/1.jpg", "train/apple/x/2.jpg", f"{held_out}/pear/3.jpg", "train/.x/4.jpg", "train/5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "train" / "pear" / "notes.txt").touch()
    found = find_labelled(tmp_path, lambda path: None)
    assert found is not None
    assert [(path.name, label) for path, label in found.train] == [("2.jpg", "apple"), ("1.jpg", "pear")]
    assert [label for _, label in found.val] == ["pear"]


class Mean:
    name, precision, device = "mean", "fp32", "cpu"

    def run(self, pixels: np.ndarray) -> parity.Features:
        means = pixels.mean(axis=(2, 3))
        return parity.Features(means, means[:, None], means[:, :0, None])

    def close(self) -> None:
        pass


def test_class_tokens_leave_out_what_is_no_photo() -> None:
    photos = {Path(f"{i}.jpg"): photo for i, photo in enumerate(parity.sample_photos(6))}
    names = [(path, "ab"[i % 2]) for i, path in enumerate(photos)]
    broken = [(Path("train/a/no.jpg"), "c"), *names]
    found = class_tokens(Mean(), LabelledImages(broken, names[:2], photos.get), SPEC, (70, 70))
    assert found.train.shape == (6, 3)
    assert found.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.val_labels.tolist() == [0, 1]
    expected = preprocess(photos[Path("4.jpg")], SPEC).mean(axis=(1, 2))
    np.testing.assert_allclose(found.train[4], expected, atol=1e-6)
    with pytest.raises(ValueError, match="none of the 1 files can be read"):
        class_tokens(Mean(), LabelledImages(broken[:1], names, photos.get), SPEC, (70, 70))
