"""The images of a run are listed before its settings are final: what is listed, how it is divided, what is refused."""

import io
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import training.data.sources
from tests.training.tiny import ALONE, QUIET
from tests.training.told import told
from training.data.listing import SourceSettings, check_apart, list_images
from training.data.progress import Tally
from training.data.sources import open_source


def save(path, color=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), color).save(path)
    return path


def fill(folder, **classes):
    """Write images into subfolders; `classes` maps names to numbers of images."""
    for name, n in classes.items():
        for i in range(n):
            save(folder / name / f"{i}.png")
    return folder


def names(source):
    return [source.name(i) for i in range(len(source))]


def listed(tmp_path, *data, share=0.3, console=QUIET, **settings):
    return list_images(SourceSettings(tuple(map(str, data)), tmp_path / "run", 0, share, **settings), ALONE, console)


def shown(tmp_path, *data, **settings):
    console = Console(file=io.StringIO(), width=80)
    return listed(tmp_path, *data, console=console, **settings), told(console)


@pytest.fixture
def two(tmp_path):
    """A folder with its own division, and one without."""
    own = fill(tmp_path / "own", **{"train/cats": 4, "train/dogs": 3, "val/cats": 2, "test/dogs": 1})
    return own, fill(tmp_path / "plain", cats=6, birds=4)


# Excluded images


def test_excluded_images_are_neither_trained_on_nor_held_out(tmp_path):
    plain, own = fill(tmp_path / "plain", a=6, b=4), fill(tmp_path / "own", **{"train/c": 3, "val/c": 2})
    out = [plain / "a" / "0.png", plain / "b" / "3.png", own / "train" / "c" / "1.png", own / "val" / "c" / "0.png"]
    (tmp_path / "out.txt").write_text("\n".join(map(str, out)) + "\n")
    before = listed(tmp_path, plain, own)
    after = listed(tmp_path, plain, own, exclude=str(tmp_path / "out.txt"))
    gone = {"1/a/0.png", "1/b/3.png", "2/train/c/1.png", "2/val/c/0.png"}
    assert names(after.train) == [name for name in names(before.train) if name not in gone]
    assert names(after.held_out) == [name for name in names(before.held_out) if name not in gone]
    assert len(after.train) + len(after.held_out) == len(before.train) + len(before.held_out) - len(gone)
    assert len(after.train_classes.numbers) == len(after.train)


@pytest.mark.parametrize("text", ["{folder}/a/9.png", "{folder}/a/0.png\na/0.png", None])
def test_a_list_of_excluded_images_that_does_not_fit_is_refused(tmp_path, text):
    folder, file = fill(tmp_path / "images", a=4), tmp_path / "out.txt"
    if text is not None:
        file.write_text(text.format(folder=folder))
    message = "1 of . paths are not images" if text else "cannot be read"
    with pytest.raises(ValueError, match=rf"exclude={file}.*{message}"):
        listed(tmp_path, folder, exclude=str(file))


# One source


def test_images_are_listed_and_divided_without_a_batch_size(tmp_path):
    data = fill(tmp_path / "images", a=10)
    (data / "notes.txt").write_text("no image")
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = listed(tmp_path, data)
    assert (len(listing.train), len(listing.held_out)) == (7, 3)
    assert sorted(names(listing.train) + names(listing.held_out)) == names(listing.source)
    assert listing.ignored == {".txt": 1}
    assert [item.name for item in listing.skipped] == ["gone.png"]
    assert listing.mixture is None


def test_classes_and_images_without_a_class_are_counted(tmp_path):
    data = fill(tmp_path / "images", a=5, b=5)
    save(data / "top.png")
    listing = listed(tmp_path, data)
    assert (listing.n_classes, listing.n_unlabelled) == (2, 1)
    flat = listed(tmp_path, fill(tmp_path / "flat", train=3, val=2))
    assert (flat.n_classes, flat.n_unlabelled) == (0, 5)  # `train` and `val` are no classes


# Several sources


def test_several_sources_are_used_together(tmp_path, two):
    listing = listed(tmp_path, *two)
    assert len(listing.source) == 20
    assert [n for n in names(listing.train) if n.startswith("1/")] == names_in(two[0], 1, "train")
    assert [n for n in names(listing.held_out) if n.startswith("1/")] == names_in(two[0], 1, "val")
    plain = [n for n in names(listing.train) + names(listing.held_out) if n.startswith("2/")]
    assert sorted(plain) == names_in(two[1], 2)
    assert len(listing.held_out) == 2 + 3
    assert len(set(names(listing.source))) == 20
    assert (listing.n_classes, listing.n_unlabelled) == (3, 0)  # cats of both sources are one class
    assert listing.train.encoded(0) == (two[0] / "train" / "cats" / "0.png").read_bytes()
    assert listing.train.label(7) == listing.train_classes.names[listing.train_classes.numbers[7]]


def names_in(folder, number, part=""):
    paths = sorted((folder / part).rglob("*.png"), key=lambda path: path.relative_to(folder).parts)
    return [f"{number}/{path.relative_to(folder).as_posix()}" for path in paths]


def test_a_source_holds_out_the_same_images_alone_and_with_others(tmp_path, two):
    alone, together = listed(tmp_path, two[1]), listed(tmp_path, *two)
    assert [f"2/{name}" for name in names(alone.held_out)] == [n for n in names(together.held_out) if n[0] == "2"]


def test_a_folder_and_a_tar_are_used_together_and_what_they_skip_is_told_apart(tmp_path, two):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("cats/0.png", "fish/1.png", "2.png"):
            tar.add(save(tmp_path / "more" / name), name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "2.png"
        tar.addfile(link)
    (two[1] / "notes.txt").write_text("no image")
    listing = listed(tmp_path, two[1], tmp_path / "a.tar")
    assert [name for name in names(listing.source) if name.startswith("2/")] == [
        f"2/a.tar/{name}" for name in ("cats/0.png", "fish/1.png", "2.png")
    ]
    assert (listing.n_classes, listing.n_unlabelled) == (3, 1)
    assert [item.name for item in listing.skipped] == ["2/a.tar/link.png"]
    assert listing.ignored == {".txt": 1}


def test_weights_and_balanced_sampling_are_told(tmp_path, two):
    save(two[1] / "top.png")
    listing, lines = shown(tmp_path, *two, share=0.0, weights=(3.0, 1.0), sampling="balanced")
    assert lines == [
        f"shares of the samples: 75 % from {two[0]} (7 images, each 1.9 times per epoch), 25 % from {two[1]} "
        "(11 images, each 0.41 times per epoch)",
        "sampling=balanced: 3 classes; all classes of a source are drawn equally often, an image of the smallest class "
        "about 2.2 times per epoch; images without a class (1) count as one class",
    ]
    assert listing.mixture is not None
    assert shown(tmp_path, *two)[1] == []


def test_weights_of_one_source_change_nothing(tmp_path, two):
    assert listed(tmp_path, two[1], weights=(2.0,)).mixture is None


# Refusals


@pytest.mark.parametrize("number", [0, 1])
def test_a_source_that_cannot_be_used_is_named(tmp_path, two, number):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_dict.json").write_text("{}")
    for bad, message in (
        (tmp_path / "missing", "missing does not exist; data must be a folder, a .tar or a URL"),
        (tmp_path / "empty", "nothing to train on in .*empty"),
        (tmp_path / "broken", "broken"),
        ("s3://bucket/{0..3}.tar", r"s3://bucket/0\.tar needs a package that is not installed: Install s3fs"),
        ("http://[::/a.tar", "Invalid"),
    ):
        data = [two[1], bad] if number else [bad, two[1]]
        with pytest.raises(ValueError, match=message) as caught:
            listed(tmp_path, *data)
        assert str(bad) in str(caught.value) or "s3://bucket" in str(caught.value)


def test_an_empty_source_is_an_error_though_others_have_images(tmp_path, two):
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"no images in .*none\.tar"):
        listed(tmp_path, two[0], tmp_path / "none.tar")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), r"data_weights has 1 numbers for 2 sources \(A, B\)"),
        ((1.0, 2.0, 3.0), "data_weights has 3 numbers for 2 sources"),
        ((1.0, 0.0), "data_weights: 0 for B must be a positive, finite number"),
        ((-1.0, 1.0), "data_weights: -1 for A must be"),
        ((math.inf, 1.0), "data_weights: inf for A must be"),
        ((1.0, math.nan), "data_weights: nan for B must be"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        SourceSettings(("A", "B"), Path("run"), 0, 0.1, weights)


def test_other_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sampling='even' must be one of uniform, balanced"):
        SourceSettings(("A",), Path("run"), 0, 0.1, sampling="even")
    with pytest.raises(ValueError, match="data names no images"):
        SourceSettings((), Path("run"), 0, 0.1)


def test_a_source_is_not_given_twice(tmp_path, two, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.tar").touch()
    for pair in (("a.tar", "a.tar"), ("b.tar", "own/../b.tar"), ("own", str(two[0])), (f"file://{two[0]}", "own")):
        with pytest.raises(ValueError, match="is given twice; to draw its images more often, set data_weights"):
            SourceSettings(pair, Path("run"), 0, 0.1)
    for pair in (("own/train", "own"), ("own", "own/train")):
        with pytest.raises(ValueError, match="data=own/train is inside data=own: its images would be used twice"):
            SourceSettings(pair, Path("run"), 0, 0.1)
    SourceSettings(("own/train", "own/val"), Path("run"), 0, 0.1)


@pytest.mark.parametrize("classes", [{}, {"a": 4}])
def test_balanced_sampling_needs_classes(tmp_path, classes):
    data = fill(tmp_path / "flat", **classes)
    if not classes:
        save(data / "top.png")
    with pytest.raises(ValueError, match=f"training images in .*flat have {'1 class;' if classes else 'no classes;'}"):
        listed(tmp_path, data, sampling="balanced")


@pytest.mark.parametrize("out", ["s3://bucket/run", "gs://bucket", "file:///tmp/run", "HTTPS://host/run"])
def test_a_run_is_not_written_to_a_url(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for given in (Path(out), out):  # `Path` removes one of the slashes
        with pytest.raises(ValueError, match="is a URL; out must be a local or mounted folder"):
            check_apart((), given)
    assert list(tmp_path.iterdir()) == []
    check_apart((), Path("my:run/s3:/1"))


def test_a_run_is_not_written_into_any_of_its_sources(tmp_path, two):
    data = tuple(map(str, two))
    for out in (two[1] / "run", two[0]):
        with pytest.raises(ValueError, match=f"is inside data={two[0] if out == two[0] else two[1]}: the run would"):
            check_apart(data, out)
    check_apart((*data, "https://host/a.tar?signature=" + 500 * "x"), tmp_path / "run")


# Progress


def test_a_slow_listing_is_told_and_a_fast_one_is_not(tmp_path, two, monkeypatch):
    assert shown(tmp_path, *two)[1] == []
    walk = training.data.sources.walk_folder

    def slow(folder):
        for entry in walk(folder):
            time.sleep(0.02)
            yield entry

    monkeypatch.setattr(training.data.sources, "walk_folder", slow)
    monkeypatch.setattr("training.data.progress.WORTH_A_LINE_S", 0.1)
    monkeypatch.setattr("training.data.progress.EVERY_S", 0.05)
    lines = shown(tmp_path, *two)[1]
    counts = [int(line.removeprefix("listing images: ").removesuffix(" so far")) for line in lines]
    assert len(counts) >= 2
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] <= 20


def test_shards_are_told_by_number(tmp_path):
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(save(tmp_path / "more" / "0.png"), "0.png")
    tally = Tally()
    open_source(tmp_path / "{0..2}.tar", tmp_path / "index", tally)
    assert str(tally) == "3 so far (3 of 3 shards)"
    open_source(tmp_path / "more", tmp_path / "index", tally)
    assert str(tally) == "4 so far (3 of 3 shards)"


def test_a_mixture_knows_the_source_of_each_training_image(tmp_path, two):
    listing = listed(tmp_path, *two, weights=(1.0, 1.0))
    assert listing.mixture.sources.tolist() == [int(name[0]) - 1 for name in names(listing.train)]
    assert np.array_equal(listing.mixture.classes, listing.train_classes.numbers)
