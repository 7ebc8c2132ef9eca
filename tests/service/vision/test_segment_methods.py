"""Tests of `/v1/segment` and `/v1/detect`: every method, every format, and requests that are refused."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from benchmarks.vision_scenes import Scene, composite, scene
from service.errors import InvalidRequest
from service.vision import segment
from service.vision.detect import suppress
from service.vision.foreground import segment_foreground
from service.vision.local import Vision
from service.vision.mask import coco_rle_decode, coco_rle_encode
from service.vision.task import File
from tests.service.vision.conftest import Serve

METHODS: dict[str, dict[str, Any]] = {
    "foreground": {},
    "cluster": {"k": 3},
    "cut": {},
    "multi": {},
    "prompt": {"prompts": [{"points": [{"x": 20, "y": 22}]}]},
}


def encoded(image: np.ndarray, orientation: int = 1, kind: str = "PNG") -> bytes:
    """Return an encoded image. `orientation` is the value of the EXIF field."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def pixels_of(answer: Any) -> np.ndarray:
    assert isinstance(answer, File)
    assert answer.media_type == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.data)))


@pytest.fixture(scope="module")
def drawn() -> Scene:
    return scene(11, (224, 224), 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "orientation"),
    [((61, 83), 1), ((61, 83), 6), ((240, 60), 8), ((40, 300), 3), ((33, 33), 5), ((15, 31), 1)],
)
@pytest.mark.parametrize("side", [None, 56])
def test_masks_have_the_size_of_the_upright_image(
    vision: Vision, method: str, size: tuple[int, int], orientation: int, side: int | None
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    upright = size[::-1] if orientation in (5, 6, 7, 8) else size
    image = encoded(pixels, orientation, "JPEG")
    options: dict[str, Any] = {"method": method, **METHODS[method]}
    if method == "prompt":
        options["prompts"] = [{"points": [{"x": upright[1] // 2, "y": upright[0] // 2}]}]
    for refine in (True, False):
        options |= {"refine": refine, "size": side}
        assert pixels_of(vision.run("segment", [image], format="png", **options)).shape == upright
        assert pixels_of(vision.run("segment", [image], format="overlay", **options)).shape == (*upright, 3)
        lengths: Any = vision.run("segment", [image], format="rle", **options)
        described = [lengths] if method == "foreground" else lengths["regions"]
        for each in described:
            assert each["segmentation"]["size"] == list(upright)
            assert coco.decode(each["segmentation"]).shape == upright
    boxes: Any = vision.run("detect", [image], min_score=0, size=side)
    for each in boxes["objects"]:
        x, y, width, height = each["box"]
        assert 0 <= x < x + width <= upright[1]
        assert 0 <= y < y + height <= upright[0]


@pytest.mark.parametrize("method", ["cluster", "cut", "multi", "prompt"])
def test_all_formats_show_the_same_regions(vision: Vision, drawn: Scene, method: str) -> None:
    image = encoded(drawn.image)
    options: dict[str, Any] = {"method": method, "size": 224, **METHODS[method]}
    if method == "prompt":
        rows, columns = np.nonzero(drawn.masks[1])
        box = [int(columns.min()) - 5, int(rows.min()) - 5, int(np.ptp(columns)) + 10, int(np.ptp(rows)) + 10]
        options["prompts"] = [{"mask": coco_rle_encode(drawn.masks[0])}, {"box": box}]
    labels = pixels_of(vision.run("segment", [image], format="png", **options))
    answer: Any = vision.run("segment", [image], format="rle", **options)
    outlined: Any = vision.run("segment", [image], format="polygons", tolerance=0, **options)
    assert (
        len(answer["regions"]) == len(outlined["regions"]) == {"cluster": 3, "cut": 1, "multi": 2, "prompt": 2}[method]
    )
    for region, outline in zip(answer["regions"], outlined["regions"], strict=True):
        mask = coco_rle_decode(region["segmentation"])
        value = 255 if method == "cut" else region["label"]
        np.testing.assert_array_equal(mask, labels == value)
        assert region["segmentation"]["counts"] == coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        assert region["area"] == mask.sum() == coco.area(region["segmentation"])
        assert region["box"] == coco.toBbox(region["segmentation"]).tolist()
        assert ("score" in region) == (method in ("cut", "multi"))
        assert outline["polygons"]
        assert {key: region[key] for key in ("label", "area", "box")} == {
            key: outline[key] for key in ("label", "area", "box")
        }
    if method in ("multi", "prompt"):
        overlaps = [
            (mask & (labels == number)).sum() / (mask | (labels == number)).sum()
            for mask in drawn.masks
            for number in (1, 2)
        ]
        assert sorted(overlaps)[-2] > 0.8
    assert answer.get("found") is (True if method in ("cut", "multi") else None)


def test_the_foreground_is_unchanged_unless_refined(vision: Vision, drawn: Scene) -> None:
    image = encoded(drawn.image)
    spec = vision.artifact.manifest.preprocess
    analysed = vision.analyse(image, segment.TASK.view(segment.SegmentOptions(), vision.model))
    expected = segment_foreground(analysed.patches, 224, 224, spec)
    plain = pixels_of(vision.run("segment", [image]))
    np.testing.assert_array_equal(plain, expected.mask * np.uint8(255))
    refined = pixels_of(vision.run("segment", [image], refine=True))
    seen = drawn.mask & (pixels_of(vision.run("segment", [image], method="cluster", k=2)) > 0)  # inside the crop
    before, after = ((seen & (each > 0)).sum() / (seen | (each > 0)).sum() for each in (plain, refined))
    assert after > before
    answer: Any = vision.run("segment", [image], format="polygons")
    assert set(answer) == {"polygons", "contrast", "crop_box"}


@pytest.mark.parametrize("method", ["cut", "lost"])
def test_boxes_enclose_the_objects(vision: Vision, drawn: Scene, method: str) -> None:
    image = encoded(drawn.image)
    answer: Any = vision.run("detect", [image], method=method, size=224)
    assert answer["found"] is True
    scores = [each["score"] for each in answer["objects"]]
    assert scores == sorted(scores, reverse=True)
    for mask in drawn.masks:
        truth = coco.toBbox(coco.encode(np.asfortranarray(mask, np.uint8)))
        boxes = np.array([each["box"] for each in answer["objects"]], np.float64)
        assert coco.iou(boxes, truth[None], [0]).max() > 0.8
    picture = pixels_of(vision.run("detect", [image], method=method, size=224, format="overlay"))
    assert picture.shape == (224, 224, 3)
    assert (picture != drawn.image).any(axis=2).sum() > 200
    few: Any = vision.run("detect", [image], method=method, size=224, max_objects=1)
    assert len(few["objects"]) == 1
    strict: Any = vision.run("detect", [image], method=method, size=224, min_score=1)
    assert (strict["found"], strict["objects"]) == (False, [])


def test_an_empty_image_has_no_object(vision: Vision) -> None:
    image = encoded(np.full((100, 120, 3), 90, np.uint8))
    for method in ("cut", "multi"):
        answer: Any = vision.run("segment", [image], method=method, format="rle")
        assert (answer["found"], answer["regions"]) == (False, [])
        assert not pixels_of(vision.run("segment", [image], method=method)).any()
    both: Any = vision.run("segment", [image], method="cut", include="embedding")
    assert (both["found"], both["regions"]) == (False, [])
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(both["png"])))).shape == (100, 120)
    assert len(both["embedding"]) == vision.artifact.manifest.config.embed_dim
    none: Any = vision.run("detect", [image])
    assert (none["found"], none["objects"]) == (False, [])


def test_suppression_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.integers(0, 30, (40, 2)), rng.integers(5, 30, (40, 2))]).astype(np.float64)
    for limit in (0.0, 0.3, 0.5, 1.0):
        overlaps = coco.iou(boxes, boxes, [0] * 40)
        expected: list[int] = []
        for index in range(40):
            if all(overlaps[index, other] <= limit for other in expected):
                expected.append(index)
        assert suppress(boxes.tolist(), limit) == expected


BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "segment",
        {"method": "watershed"},
        "method: Input should be 'foreground', 'cluster', 'cut', 'multi', 'prompt' or 'linear'",
    ),
    ("segment", {"method": "cluster", "k": 33}, "k: Input should be less than or equal to 32, not 33"),
    ("segment", {"method": "cluster", "k": 1}, "k: Input should be greater than or equal to 2, not 1"),
    ("segment", {"method": "multi", "max_objects": 33}, "max_objects: Input should be less than or equal to 32"),
    ("segment", {"method": "cut", "min_score": 1.5}, "min_score: Input should be less than or equal to 1"),
    ("segment", {"method": "cut", "k": 3}, "k has no effect with method=cut; it belongs to method=cluster"),
    (
        "segment",
        {"min_score": 0.5},
        "min_score has no effect with method=foreground; it belongs to method=cut and multi",
    ),
    ("segment", {"method": "prompt"}, "method=prompt needs prompts"),
    ("segment", {"method": "prompt", "prompts": [{}]}, "prompts.0: a positive point, a box or a mask is needed"),
    (
        "segment",
        {"method": "prompt", "prompts": [{"points": [{"x": 30, "y": 20, "positive": False}]}]},
        "prompts.0: a positive point, a box or a mask is needed",
    ),
    (
        "segment",
        {"method": "prompt", "prompts": [{"box": [20, 10, 9, 9]}, {"points": [{"x": 400, "y": 1}]}]},
        "prompts.1.point [400.0, 1.0] is outside the image of 60 x 45 pixels (width x height)",
    ),
    (
        "segment",
        {"method": "prompt", "prompts": [{"box": [100, 100, 9, 9]}]},
        "prompts.0.box [100.0, 100.0, 9.0, 9.0] is outside",
    ),
    ("segment", {"method": "prompt", "prompts": [{"box": [1, 1, 0, 9]}]}, "has no area"),
    (
        "segment",
        {"method": "prompt", "prompts": [{"box": [1, 1, 9]}]},
        "prompts.0.box: List should have at least 4 items",
    ),
    (
        "segment",
        {"method": "prompt", "prompts": [{"mask": {"size": [60, 45], "counts": [0, 2700]}}]},
        "prompts.0.mask.size is [60, 45], but the image has [45, 60] pixels",
    ),
    (
        "segment",
        {"method": "prompt", "prompts": [{"mask": {"size": [45, 60], "counts": [2700]}}]},
        "prompts.0.mask is empty",
    ),
    (
        "segment",
        {"method": "prompt", "prompts": [{"mask": {"size": [45, 60], "counts": [0, 2700]}, "box": [1, 1, 9, 9]}]},
        "prompts.0: either box or mask, not both",
    ),
    ("segment", {"method": "prompt", "prompts": [{"box": [1, 1, 9, 9]}] * 17}, "prompts: List should have at most 16"),
    ("segment", {"method": "prompt", "prompts": "[{"}, "prompts: Input should be a valid list"),
    ("segment", {"format": "polygons", "tolerance": -1}, "tolerance: Input should be greater than or equal to 0"),
    ("detect", {"method": "yolo"}, "method: Input should be 'lost' or 'cut'"),
    ("detect", {"max_objects": 0}, "max_objects: Input should be greater than or equal to 1"),
    ("detect", {"max_overlap": 2}, "max_overlap: Input should be less than or equal to 1"),
    ("detect", {"method": "lost", "threshold": 0.2}, "threshold has no effect with method=lost"),
]


async def test_bad_requests_are_refused(serve: Serve) -> None:
    image = base64.b64encode(encoded(np.full((45, 60, 3), 9, np.uint8))).decode()
    async with serve() as run:
        for name, options, text in BAD:
            answer = await run.client.post(f"/v1/{name}", json={"image": image, **options})
            assert answer.status_code == 422, (options, answer.text)
            assert text in answer.json()["detail"], (options, answer.json()["detail"])


async def test_prompts_can_be_form_fields(serve: Serve, drawn: Scene) -> None:
    prompt = '[{"points": [{"x": 100, "y": 100}, {"x": 5, "y": 5, "positive": false}]}]'
    async with serve() as run:
        answer = await run.client.post(
            "/v1/segment",
            files={"file": encoded(drawn.image)},
            data={"method": "prompt", "prompts": prompt, "format": "rle", "size": "224"},
        )
    assert answer.status_code == 200, answer.text
    [region] = answer.json()["regions"]
    mask = coco_rle_decode(region["segmentation"])
    assert mask[100, 100]
    assert not mask[5, 5]


def test_too_many_patches_are_refused(vision: Vision, monkeypatch: pytest.MonkeyPatch, drawn: Scene) -> None:
    monkeypatch.setattr(segment, "MAX_PATCHES", 200)
    for name, options in (("segment", {"method": "cut"}), ("segment", {"method": "multi"}), ("detect", {})):
        with pytest.raises(
            InvalidRequest, match=r"has 256 patches; method=.* accepts at most 200. Choose a smaller size"
        ):
            vision.run(name, [encoded(drawn.image)], **options)


def test_large_images_are_drawn_in_blocks(vision: Vision, drawn: Scene) -> None:
    """An image of 1 x 100 aspect ratio and one with many pixels pass through the same code."""
    wide = composite(3, drawn.image, None, (600, 1500))
    labels = pixels_of(vision.run("segment", [encoded(wide.image)], method="cut", size=112))
    assert labels.shape == (600, 1500)
