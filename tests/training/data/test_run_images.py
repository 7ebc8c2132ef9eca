"""The images of a run: what its loader, its k-NN and its account get from one source, several, and mixed ones."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.training.tiny import ALONE, QUIET, TINY
from tests.training.told import told
from training import train as loop
from training.config import TrainConfig
from training.data import run_images
from training.data.batches import Reading
from training.data.dataset import Classes, batch_indices
from training.data.listing import SourceSettings, list_images
from training.data.run_images import ImageSettings, open_data, sample_of_classes
from training.distributed import World


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.random.default_rng(len(list(path.parent.iterdir()))).integers(0, 256, 3)
    Image.new("RGB", (20, 10), tuple(color.tolist())).save(path)
    return path


def fill(folder, **classes):
    for name, n in classes.items():
        for i in range(n):
            save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def two(tmp_path):
    return fill(tmp_path / "own", **{"train/cats": 20, "train/dogs": 4, "val/cats": 5}), fill(
        tmp_path / "plain", cats=3, birds=9
    )


@pytest.fixture
def mixed(tmp_path):
    """A tar of images, most of which have a class."""
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        for folder, n in (("apples/", 9), ("pears/", 9), ("", 4)):
            for i in range(n):
                path = save(tmp_path / "made" / folder / f"{i}.png")
                tar.add(path, f"{folder}{i}.png")
    return tmp_path / "mixed.tar"


def listed(tmp_path, *data, share=0.25, **settings):
    return list_images(SourceSettings(tuple(map(str, data)), tmp_path / "run", 3, share, **settings), ALONE, QUIET)


def opened(listing, world=ALONE, console=QUIET, batch_size=4, cache_bytes=2**30, **reading):
    settings = ImageSettings(batch_size, {}, 8, cache_bytes, Reading(workers=1, **reading))
    return open_data(listing, settings, world, console)


def drawn(data, steps=range(27)):
    return [name for step in steps for name in data.loader.batch(step).names]


# The order


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_without_weights_and_balance_the_order_is_that_of_earlier_releases(tmp_path, two, cache_bytes):
    for data in (two[:1], two):
        listing = listed(tmp_path, *data)
        with opened(listing, cache_bytes=cache_bytes) as images:
            n = len(images.loader)
            expected = torch.cat([batch_indices(n, 4, step, 3) for step in range(9)]).tolist()
            assert drawn(images, range(9)) == [listing.train.name(i) for i in expected]


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_weights_and_classes_decide_how_often_images_are_drawn(tmp_path, two, cache_bytes):
    listing = listed(tmp_path, *two, share=0.0, weights=(1.0, 2.0), sampling="balanced")
    with opened(listing, cache_bytes=cache_bytes) as images:
        names = drawn(images)  # 36 images, three epochs of 9 batches
    counts = Counter(name.rpartition("/")[0] for name in names)
    assert counts == pytest.approx({"1/train/cats": 18, "1/train/dogs": 18, "2/cats": 36, "2/birds": 36}, abs=1)


def test_broken_images_do_not_change_the_shares(tmp_path, two):
    for i in range(3, 15):
        (two[0] / "train" / "cats" / f"{i}.png").write_bytes(b"broken")
    listing = listed(tmp_path, *two, share=0.0, sampling="balanced")
    with opened(listing) as images:
        names = drawn(images, range(18))  # 24 readable images: three epochs of 6 batches
    assert not any(f"1/train/cats/{i}.png" in names for i in range(3, 15))
    counts = Counter(name.split("/")[-2] for name in names)
    assert counts == pytest.approx({"cats": 24, "dogs": 24, "birds": 24}, abs=1)


def test_ranks_share_each_batch(tmp_path, two):
    listing = listed(tmp_path, *two, sampling="balanced")
    with opened(listing) as images:
        whole = drawn(images, range(10))
    plans = [run_images.make_plan(listing, 4, World(rank, 2, torch.device("cpu")), per_rank=2) for rank in (0, 1)]
    n = len(listing.train)
    indices = torch.cat([plan(n, step) for step in range(10) for plan in plans]).tolist()
    assert [listing.train.name(i) for i in indices] == whole


# Resuming


def test_what_a_resumed_run_must_have_in_common_is_in_the_digest(tmp_path, two):
    def digest(*data, **settings):
        with opened(listed(tmp_path, *data, **settings)) as images:
            return images.digest

    variants = [
        digest(*two),
        digest(*reversed(two)),
        digest(two[0]),
        digest(*two, weights=(1.0, 2.0)),
        digest(*two, weights=(1.0, 3.0)),
        digest(*two, sampling="balanced"),
        digest(*two, weights=(1.0, 2.0), sampling="balanced"),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(*two) == variants[0]
    assert digest(*two, weights=(1.0, 2.0)) == variants[3]
    save(two[1] / "cats" / "new.png")
    assert digest(*two) != variants[0]


def test_the_labels_are_in_the_digest_if_they_decide_the_order(tmp_path):
    fill(tmp_path, made=8)

    def digest(label, sampling):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for i in range(8):
                tar.add(tmp_path / "made" / f"{i}.png", f"{i}.png")
                (tmp_path / "label").write_text(label if i == 7 else "ab"[i % 2])
                tar.add(tmp_path / "label", f"{i}.cls")
        with opened(listed(tmp_path, tmp_path / "a.tar", share=0.0, sampling=sampling)) as images:
            return images.digest

    assert digest("a", "balanced") != digest("b", "balanced")
    assert digest("a", "uniform") == digest("b", "uniform")


def test_an_error_about_other_images_says_how_to_continue(tmp_path, two):
    with (
        opened(listed(tmp_path, *two)) as images,
        pytest.raises(ValueError, match="differ from those that this run started with") as caught,
    ):
        images.check_same("another")
    assert f"choose another out folder and add init={tmp_path / 'run'}" in str(caught.value)
    assert all(str(folder) in str(caught.value) for folder in two)


# Classes


def test_only_images_with_a_class_go_to_knn_and_all_are_trained(tmp_path, mixed):
    with opened(listed(tmp_path, mixed, share=0.5)) as images:
        assert images.has_classes
        for sample, labelled in (
            (images.train_sample, images.labelled_train_sample),
            (images.held_out, images.labelled_held_out),
        ):
            assert len(sample) == 11
            assert {photo.label for photo in sample} == {"apples", "pears", None}
            assert [photo.name for photo in labelled] == [photo.name for photo in sample if photo.label is not None]
        assert sum("/" not in name.removeprefix("mixed.tar/") for name in drawn(images, range(2))) > 0


def test_images_directly_in_a_data_folder_have_no_class(tmp_path):
    """Two folders without subfolders are no two classes."""
    for name in ("one", "other"):
        fill(tmp_path, **{name: 8})
    with opened(listed(tmp_path, tmp_path / "one", tmp_path / "other")) as images:
        assert images.why_no_classes == "the training images have no classes"
        assert images.labelled_train_sample == images.labelled_held_out == []
        assert len(images.held_out) == 4


def test_classes_stay_with_their_images_behind_broken_ones(tmp_path, mixed, two):
    (two[0] / "train" / "cats" / "0.png").write_bytes(b"broken")
    with opened(listed(tmp_path, two[0], mixed, share=0.0)) as images:
        photos = images.labelled_train_sample
        assert len(photos) == 23 + 18
        assert all(photo.label in photo.name for photo in photos)


def labelled(*counts):
    """Classes of images, one class after the other; the images of the first class have none."""
    numbers = np.repeat(np.arange(len(counts)) - 1, counts).astype(np.int32)
    return Classes(numbers, [str(i) for i in range(len(counts) - 1)])


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ((2, 3, 4), 7, [3, 4]),
        ((2, 3, 4), 6, [2, 2]),
        ((0, 100, 3, 1), 20, [17, 1, 1]),  # every sixth
        ((0, 100, 3, 1), 3, [1, 1, 1]),
        ((0, 6, 2, 2), 2, [2, 0, 0]),  # more classes than images to choose
        ((5,), 3, []),
        ((1, 0, 4), 9, [0, 4]),
    ],
)
def test_a_sample_of_many_images_keeps_classes_of_few(counts, most, expected):
    classes = labelled(*counts)
    chosen = [photo.index for photo in sample_of_classes(None, classes, most)]
    assert len(chosen) <= most
    assert chosen == sorted(set(chosen))
    assert np.bincount(classes.numbers[chosen], minlength=len(expected)).tolist() == expected


# The end of a run


def test_a_run_with_images_without_a_class_ends_with_knn_and_a_report(tmp_path, mixed):
    config = TrainConfig.model_validate(
        {"data": mixed, "out": tmp_path / "run", **TINY, "epochs": 1, "held_out_share": 0.4, "eval_every_epochs": 1}
    )
    for _ in range(2):  # the second time it resumes
        loop.train(config, QUIET)
        assert 0 <= json.loads((tmp_path / "run" / "knn.json").read_text())["cls"]["10"] <= 1
        assert (tmp_path / "run" / "report.html").exists()


def test_a_run_that_would_write_to_a_url_does_not_start(tmp_path, mixed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config = TrainConfig.model_validate({"data": mixed, "out": "s3://bucket/run", **TINY, "epochs": 1})
    with pytest.raises(ValueError, match="out=s3:/bucket/run is a URL; out must be a local or mounted folder"):
        loop.train(config, QUIET)
    assert sorted(tmp_path.rglob("*")) == before


def test_held_out_images_count_as_used_when_they_were_read(tmp_path, mixed):
    def account(read):
        console = Console(file=io.StringIO(), width=200)
        with opened(listed(tmp_path, mixed, share=0.5), console=console) as images:
            for photo in images.held_out[:read]:
                photo.read()
            for photo in images.labelled_held_out[:1]:
                photo.read()  # it may have been read before
        return told(console)[-1]

    assert account(0) == "22 files: 12 used, 10 ignored (10 held out but not read), 0 failed"
    assert account(11) == "22 files: 22 used, 0 ignored, 0 failed"


def test_a_broken_held_out_image_is_counted_once_also_when_a_run_resumes(tmp_path):
    data = fill(tmp_path / "data", **{"train/a": 8, "val/a": 3})
    (data / "val" / "a" / "1.png").write_bytes(b"broken")
    for read in (3, 0, 2):
        console = Console(file=io.StringIO(), width=200)
        with opened(listed(tmp_path, data), console=console) as images:
            for photo in images.held_out[:read]:
                if photo.name.endswith("1.png"):
                    with pytest.raises(ValueError, match="not a known image"):
                        photo.read()
                else:
                    photo.read()
        last = told(console)[-1]
        n_read = {3: 2, 0: 0, 2: 1}[read]
        ignored = f"{2 - n_read} ignored ({2 - n_read} held out but not read)" if n_read < 2 else "0 ignored"
        assert last == f"11 files: {8 + n_read} used, {ignored}, 1 failed (val/a/1.png)"


def test_decoding_is_told_if_it_is_slow(tmp_path, two, monkeypatch):
    monkeypatch.setattr("training.data.progress.WORTH_A_LINE_S", 0.0)
    console = Console(file=io.StringIO(), width=20)
    with opened(listed(tmp_path, *two), console=console):
        pass
    lines = told(console)
    assert [line.rpartition(",")[0] for line in lines[:2]] == [
        "decoding 33 images",
        "computing the checksum of 33 images",
    ]
