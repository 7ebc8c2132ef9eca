"""Tests of segmentation with a head: the class of a pixel is the one with the largest interpolated logit."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.heads.store import Head, choose_head, open_head
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import View
from service.vision import linear
from service.vision.linear import pixel_classes
from service.vision.local import Vision
from service.vision.mask import coco_rle_decode
from service.vision.pictures import to_image
from service.vision.task import File
from tests.fakes import photo
from tests.service.vision.head_models import add_segmenter, with_heads

RNG = np.random.default_rng(0)
BOX = (3.5, 2.0, 20.0, 24.5)
SIZE = (30, 26)


def plain(logits: np.ndarray) -> np.ndarray:
    """Interpolate the map of each class, and compare the maps pixel by pixel."""
    maps = np.stack([to_image(one, SIZE, BOX, outside=np.nan) for one in logits])
    return np.where(np.isnan(maps[0]), 0, 1 + np.nan_to_num(maps, nan=0).argmax(axis=0))


@pytest.mark.parametrize("block", [1, 500, 10**9])
def test_classes_are_those_of_the_interpolated_logits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_BLOCK_LOGITS", block)
    logits = RNG.standard_normal((5, 4, 3), dtype=np.float32)
    labels = pixel_classes(logits, SIZE, BOX)
    assert (labels.shape, labels.dtype) == (SIZE, np.uint8)
    np.testing.assert_array_equal(labels, plain(logits))
    assert len(np.unique(labels)) == 6


def test_a_large_image_with_many_classes_is_computed_on_a_coarser_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.repeat(np.repeat(RNG.standard_normal((3, 2, 2), dtype=np.float32), 4, axis=1), 4, axis=2)
    exact = pixel_classes(logits, (160, 120), (10.0, 0.0, 100.0, 160.0))
    monkeypatch.setattr(linear, "MAX_LOGITS", 3 * 40 * 30)
    coarse = pixel_classes(logits, (160, 120), (10.0, 0.0, 100.0, 160.0))
    assert coarse.shape == exact.shape
    assert (coarse == exact).mean() > 0.9
    assert (coarse == 0).any()


def test_a_part_outside_the_image_is_ignored() -> None:
    """If the preprocessing pads images, the box of the patches is larger than the image."""
    logits = np.zeros((2, 2, 2), np.float32)
    logits[1, :, 1] = 1
    labels = pixel_classes(logits, (4, 8), (0.0, -2.0, 8.0, 8.0))
    # The left patches have their centre at x = 2, so the logit of class 1 is above 0 from pixel 2 on.
    np.testing.assert_array_equal(labels, np.repeat([[1, 1, 2, 2, 2, 2, 2, 2]], 4, axis=0))


IMAGE = photo(3, size=(90, 60))


@pytest.fixture
def model(vision: Vision, tmp_path: Path) -> Vision:
    """The bundled model with one segmentation head of three classes."""
    found = with_heads(vision, tmp_path)
    add_segmenter(found.artifact)
    return found


def labels_of(answer: object) -> np.ndarray:
    assert isinstance(answer, File)
    return np.asarray(Image.open(io.BytesIO(answer.data)))


def test_segment_returns_the_class_of_each_pixel(model: Vision) -> None:
    labels = labels_of(model.run("segment", [IMAGE], method="linear"))
    assert labels.shape == (60, 90)
    analysed = model.analyse(IMAGE, View())
    head = open_head(model.artifact, choose_head(model.artifact, "segmentation", "parts"))
    logits = (analysed.patches @ head.tensors["weight"].T).T.reshape(3, *analysed.grid)
    np.testing.assert_array_equal(labels, pixel_classes(logits, (60, 90), analysed.crop_box))
    assert set(np.unique(labels)) == {0, 1, 2, 3}  # 0: outside the crop

    answer = model.run("segment", [IMAGE], method="linear", format="rle", head="parts")
    assert isinstance(answer, dict)
    assert answer["head"] == "parts"
    assert [(region["label"], region["name"]) for region in answer["regions"]] == [(1, "a"), (2, "b"), (3, "c")]
    for region in answer["regions"]:
        np.testing.assert_array_equal(coco_rle_decode(region["segmentation"]), labels == region["label"])
    whole = labels_of(model.run("segment", [IMAGE], method="linear", size=56))
    assert whole.min() >= 1  # the network sees the whole image


@pytest.mark.parametrize(
    ("options", "param", "reason"),
    [
        ({"method": "linear", "head": "moon"}, "head", "no head named 'moon'; heads for segmentation: parts"),
        ({"method": "cluster", "head": "parts"}, "head", "head has no effect with method=cluster"),
        ({"method": "linear", "refine": True}, "refine", "refine has no effect with method=linear"),
        ({"method": "linear", "k": 3}, "k", "k has no effect with method=linear"),
    ],
)
def test_bad_requests_for_a_head_are_refused(
    model: Vision, options: dict[str, object], param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        model.run("segment", [IMAGE], **options)
    assert caught.value.param == param


def test_logits_that_are_not_finite_are_an_error(model: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Head.segment
    monkeypatch.setattr(Head, "segment", lambda head, tokens: real(head, tokens) * np.float32(np.inf))
    with pytest.raises(EngineFailed, match="the head 'parts' gives classes that are not finite"):
        model.run("segment", [IMAGE], method="linear")


def test_without_a_head_the_answer_says_how_to_get_one(vision: Vision, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no head for segmentation; .*train-head segmentation"):
        with_heads(vision, tmp_path).run("segment", [IMAGE], method="linear")
