"""Photos: what is decoded and what refused, folders and their splits, and the order of a run."""

import os
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

import model.decode
import training.data.dataset
from model.decode import DecodeLimits
from training.data.batches import Reading, shuffled
from training.data.dataset import (
    Photo,
    Subset,
    batch_indices,
    decode,
    decode_square,
    find_images,
    label_of,
    read_photo,
    split_indices,
    split_source,
    squash,
)
from training.data.loader import open_loader
from training.data.run_images import Data, sample
from training.data.sources import FolderSource


def save(path, size=(20, 10), color=(200, 10, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def load(folder):
    return open_loader(FolderSource(folder), 16, shuffled(1, seed=0), reading=Reading(max_broken_share=1))


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_images_are_found_at_any_depth_and_other_files_ignored(tmp_path):
    expected = [save(tmp_path / "a.png"), save(tmp_path / "x" / "y" / "z" / "b.JPG", format="jpeg")]
    (tmp_path / "notes.txt").write_text("no image")
    assert find_images(tmp_path) == sorted(expected)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_images_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=name):
        find_images(tmp_path / name)


def test_broken_files_are_skipped_and_listed(tmp_path):
    good = save(tmp_path / "good.jpg")
    whole = save(tmp_path / "whole.png", size=(300, 300)).read_bytes()
    bad = {
        "empty.jpg": b"",
        "text.png": b"hello",
        "cut.png": whole[: len(whole) // 2],
        "half.jpg": good.read_bytes()[:90],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.jpg").mkdir()
    cache = load(tmp_path)
    assert names(cache.source) == ["good.jpg", "whole.png"]
    assert {s.name for s in cache.skipped} == set(bad)
    assert all(s.reason for s in cache.skipped)


def test_only_broken_files_is_an_error(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        load(tmp_path)


def test_photos_are_upright_rgb_squares_with_their_aspect(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    save(tmp_path / "turned.jpg", size=(40, 10), exif=exif)
    Image.new("L", (30, 10), 7).save(tmp_path / "gray.png")
    cache = load(tmp_path)
    assert cache.pixels.shape == (2, 3, 16, 16)
    assert cache.pixels.dtype == torch.uint8
    assert cache.aspect.tolist() == [3.0, 0.25]
    assert (cache.pixels[0] == 7).all()
    assert read_photo(tmp_path / "turned.jpg").shape == (40, 10, 3)


@pytest.mark.parametrize("held_out", ["val", "validation", "valid", "test", "Val", "TEST"])
@pytest.mark.parametrize("train", ["train", "Train"])
def test_a_folder_with_train_and_held_out_images_is_taken_at_its_word(tmp_path, train, held_out):
    save(tmp_path / train / "a" / "1.png")
    save(tmp_path / held_out / "a" / "2.png")
    source = FolderSource(tmp_path)
    assert [names(part) for part in split_source(source, 0.1, seed=0)] == [
        [f"{train}/a/1.png"],
        [f"{held_out}/a/2.png"],
    ]


def test_of_several_held_out_folders_the_first_is_used_and_the_others_are_in_no_part(tmp_path):
    for name in ("train", "test", "val", "VAL", "extra"):
        save(tmp_path / name / "a" / "1.png")
    source = FolderSource(tmp_path)
    assert {part: source.name(int(*items)) for part, items in source.parts.items()} == {
        "train": "train/a/1.png",
        "val": "val/a/1.png",
    }


def test_otherwise_a_share_is_held_out_by_seed(tmp_path):
    for i in range(20):
        save(tmp_path / "a" / f"{i}.png")
    source = FolderSource(tmp_path)
    train, held_out = (names(part) for part in split_source(source, 0.25, seed=0))
    by_digest = sorted(names(source), key=lambda name: xxhash.xxh3_64_intdigest(f"0/{name}".encode()))
    assert held_out == [name for name in names(source) if name in by_digest[:5]]
    assert sorted(train + held_out) == names(source)
    assert held_out != names(split_source(source, 0.25, seed=1)[1])


def test_an_epoch_shows_every_photo_once_and_the_next_in_another_order():
    def epoch(number):
        return torch.cat([batch_indices(12, 4, step, seed=3) for step in range(3 * number, 3 * number + 3)])

    assert sorted(epoch(0).tolist()) == list(range(12))
    assert sorted(epoch(1).tolist()) == list(range(12))
    assert epoch(0).tolist() != epoch(1).tolist()
    assert np.array_equal(batch_indices(12, 4, 4, seed=3), epoch(1)[4:8])


def test_a_photo_too_thin_for_the_evaluation_is_skipped_at_loading(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "thin.png", size=(300, 2))
    cache = load(tmp_path)
    assert names(cache.source) == ["good.png"]
    assert [s.name for s in cache.skipped] == ["thin.png"]


def encoded(size, **options):
    """A smooth image with some noise, which a JPEG encoder treats like a natural one."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (size[1], size[0], 1))
    file = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, **({"format": "jpeg", "quality": 90} | options))
    return file.getvalue()


@pytest.mark.parametrize("size", [(100, 60), (127, 64), (64, 64)])
def test_a_square_of_a_photo_not_much_larger_is_the_plain_one(size):
    data = encoded(size)
    pixels, aspect = decode_square(data, 32)
    plain, plain_aspect = squash(decode(data), 32)
    assert np.array_equal(pixels, plain)
    assert aspect == plain_aspect == size[0] / size[1]


def test_a_large_jpeg_is_decoded_at_a_fraction_and_hardly_differs():
    data = encoded((801, 603))
    pixels, aspect = decode_square(data, 64)
    plain, _ = squash(decode(data), 64)
    difference = np.abs(pixels.astype(int) - plain)
    assert 0 < difference.mean() < 1  # not zero: the fraction was taken; of 255
    assert difference.max() <= 8
    assert aspect == 801 / 603  # not the fraction's 401 / 302
    png = encoded((801, 603), format="png")
    assert np.array_equal(decode_square(png, 64)[0], squash(decode(png), 64)[0])


def test_a_turned_large_jpeg_keeps_the_shape_of_the_upright_photo():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded((801, 603), exif=exif)
    pixels, aspect = decode_square(data, 64)
    plain, plain_aspect = squash(decode(data), 64)
    assert aspect == plain_aspect == 603 / 801
    assert np.abs(pixels.astype(int) - plain).mean() < 1


def test_reasons_name_no_address_in_memory(tmp_path):
    for data, reason in ((b"hello, I am text", "starts with 68 65 6c 6c"), (b"", "is empty")):
        with pytest.raises(ValueError, match=reason) as caught:
            decode(data)
        assert "0x" not in str(caught.value)


def test_a_decompression_bomb_and_an_oversized_file_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="more pixels than the limit"):
        decode_square(encoded((80, 80)), 16)
    monkeypatch.setattr(training.data.dataset, "MAX_BYTES", 100)
    monkeypatch.setattr(training.data.dataset, "LIMITS", DecodeLimits(max_bytes=100))
    path = save(tmp_path / "a.png", size=(300, 300))
    with pytest.raises(ValueError, match="more than the limit of 100 for an image"):
        read_photo(path)
    with pytest.raises(ValueError, match="the limit is 100"):
        decode(path.read_bytes())


def test_any_error_of_the_decoder_is_a_broken_photo(monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("tag 7")

    monkeypatch.setattr(model.decode, "_to_rgb", broken)
    with pytest.raises(ValueError, match="the JPEG is damaged or cut off: 'tag 7'"):
        decode(encoded((8, 8)))


def test_a_pipe_named_like_a_photo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="no images"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_photo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="FileNotFoundError"):
        read_photo(tmp_path / "gone.jpg")


def test_links_are_followed_once_and_loops_are_not(tmp_path):
    elsewhere = save(tmp_path / "elsewhere" / "far.png").parent
    data = save(tmp_path / "data" / "a" / "near.png").parent.parent
    (data / "b").symlink_to(elsewhere)
    (data / "a" / "loop").symlink_to(data)
    (data / "a" / "up").symlink_to(tmp_path)  # holds the folder itself
    (data / "self.png").symlink_to(data / "self.png")
    (data / "nowhere").symlink_to(tmp_path / "nothing")
    assert find_images(data) == [data / "a" / "near.png", data / "b" / "far.png"]


def test_a_folder_is_listed_by_one_rule(tmp_path):
    image = save(tmp_path / "a.png").read_bytes()
    for name in ("b.jfif", "scan", "c.backup", "._a.png", ".ipynb_checkpoints/a.png", "thumb.dng", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image)
    (tmp_path / "README").write_text("no image")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "b.jfif", "c.backup", "scan"]
    assert source.ignored == {
        "hidden": 1,
        "hidden folders": 1,
        ".dng": 1,
        ".txt": 1,
        "without suffix": 1,
        "pipes and devices": 1,
    }
    assert [(s.name, s.reason) for s in source.skipped] == [("gone.png", "No such file or directory")]


def test_the_order_is_that_of_sorted_paths_whatever_the_names(tmp_path):
    names = ["a/z.png", "a-b/y.png", "a.png", "a b/ü ñ.png", "日本/ä.PNG", "B/x.png"]
    for name in names:
        save(tmp_path / name)
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)


def test_a_photo_of_a_source_stands_for_a_path(tmp_path):
    path = save(tmp_path / "cats" / "1.png")
    photo = Photo(Subset(FolderSource(tmp_path), np.array([0])), 0)
    assert photo.name == "cats/1.png"
    assert label_of(photo) == label_of(path) == "cats"
    assert np.array_equal(read_photo(photo), read_photo(path))


def test_an_order_is_the_permutation_of_its_epoch_and_made_once(monkeypatch):
    expected = np.random.default_rng((5, 2)).permutation(1000)
    made = []
    real = np.random.default_rng
    monkeypatch.setattr(training.data.dataset.np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    training.data.dataset._epoch_order.cache_clear()
    got = torch.cat([batch_indices(1000, 10, 200 + i, seed=5) for i in range(100)])
    assert np.array_equal(got, expected)
    assert got.dtype == torch.int64
    assert made == [(5, 2)]


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_the_photos_do_not_fill_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be 1 to 10"):
        batch_indices(10, batch_size, 0, seed=0)


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_formats_that_are_read(name):
    assert decode(encoded((20, 10), format=name)).shape == (10, 20, 3)


@pytest.mark.parametrize("name", ["eps", "ppm", "ico"])
def test_formats_that_are_not_whatever_the_file_is_called(name):
    with pytest.raises(ValueError, match=r"not a known image; it starts with .*JPEG, PNG, WEBP"):
        decode(encoded((20, 10), format=name))


def labelled(*labels):
    """Items that have nothing but a label."""
    return [SimpleNamespace(label=label) for label in labels]


@pytest.mark.parametrize(
    ("known", "held_out", "reason"),
    [
        (("a", "b"), ("a",), None),
        (("a", None, "b"), ("a", None), None),
        (("a", "b"), (), "no images are held out"),
        (("a", "a"), ("a",), "the training images have one class"),
        (("a", None), ("a",), "the training images have one class"),  # no label is no class
        ((None, None), (None,), "the training images have no classes"),
        (("a", "b"), (None,), "the held-out images have no classes"),
        (("a", "b"), ("c",), "the held-out images and the training images have no class in common"),
    ],
)
def test_there_is_something_to_classify(known, held_out, reason):
    known, held_out = labelled(*known), labelled(*held_out)
    with_class = [[photo for photo in photos if photo.label is not None] for photos in (known, held_out)]
    data = Data(None, known, held_out, *with_class, "digest", "folder", "run")
    assert data.has_classes is (reason is None)
    assert data.why_no_classes == reason


@pytest.mark.parametrize(("most", "expected"), [(10, range(10)), (99, range(10)), (4, (0, 3, 6, 9)), (3, (0, 4, 8))])
def test_a_sample_is_taken_evenly_and_is_no_larger_than_asked(most, expected):
    assert [photo.index for photo in sample([None] * 10, most)] == list(expected)


class Named:
    """A source of names."""

    def __init__(self, names):
        self.names, self.parts = list(names), {}

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]


def held_out_names(source, seed=0):
    train, held_out = split_indices(source, 0.1, seed)
    assert sorted([*train, *held_out]) == list(range(len(source)))
    return {source.name(int(i)) for i in held_out}, {source.name(int(i)) for i in train}


def test_images_that_were_trained_on_are_rarely_held_out_when_images_are_added():
    """A run that continues on more images is measured on images that the first run did not see."""
    first = Named(f"a/{i}.jpg" for i in range(1000))
    more = Named(f"a/{i}.jpg" for i in range(1500))
    held_out, trained = held_out_names(first)
    then_held_out, _ = held_out_names(more)
    assert (len(held_out), len(then_held_out)) == (100, 150)
    assert len(then_held_out & trained) < 25  # 90 of 150, if the images were drawn anew
    assert held_out_names(first, seed=1)[0] != held_out
