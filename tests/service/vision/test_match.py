"""Tests of the task "match": planted correspondences are found, and bad input is refused."""

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.preprocess import PreprocessSpec, crop_box
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import Analysed, Embedded
from service.features.served_model import ServedModel
from service.vision.local import Vision
from service.vision.mask import coco_rle_encode
from service.vision.match import TASK, MatchOptions
from service.vision.positional_bias import basis_of, positional_basis, without_bias
from service.vision.task import File
from tests.fakes import DIMS, fake_artifact, photo, running
from tests.service.vision.conftest import Serve

MODEL = ServedModel(fake_artifact())
SPEC = PreprocessSpec(resize=56, crop=None)
SIDE = 56  # 4 x 4 patches


def analysed(patches: np.ndarray, size: tuple[int, int] = (56, 56), spec: PreprocessSpec = SPEC) -> Analysed:
    grid = (4, len(patches) // 4)
    image = np.zeros((*size, 3), np.uint8)
    embedded = Embedded(np.zeros((2, DIMS), np.float32), 1 + len(patches))
    return Analysed(embedded, patches.astype(np.float32), np.zeros((0, DIMS), np.float32), grid, image, spec)


def match(first: Analysed, second: Analysed, model: ServedModel = MODEL, **options: Any) -> dict[str, Any]:
    parsed = MatchOptions.model_validate(options)
    answer = TASK.encode([TASK.compute(image, parsed, model) for image in (first, second)], parsed)
    assert isinstance(answer, dict)
    return answer


def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the patches of an image, the same patches in another order, and the position of each patch there."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(16, DIMS))
    to = rng.permutation(16)
    moved = np.empty_like(rows)
    moved[to] = 3 * rows  # the length of a vector does not matter
    return rows, moved, to


def centre(patch: int, scale: float = 1.0) -> list[float]:
    return [(patch % 4 * 14 + 7) * scale, (patch // 4 * 14 + 7) * scale]


def test_planted_correspondences_are_found() -> None:
    rows, moved, to = planted()
    answer = match(analysed(rows), analysed(moved, size=(112, 112)))
    assert answer["total"] == 16
    assert answer["score"] == pytest.approx(1)
    pairs = {tuple(pair["points"][0]): pair for pair in answer["matches"]}
    for patch in range(16):
        pair = pairs[tuple(centre(patch))]
        assert pair["points"][1] == centre(to[patch], 2)
        assert pair["boxes"][1] == [to[patch] % 4 * 28, to[patch] // 4 * 28, 28, 28]
        assert pair["score"] == pytest.approx(1)


def test_matches_are_mutual_and_equal_the_definition() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(16, DIMS)), rng.normal(size=(24, DIMS))
    answer = match(analysed(first), analysed(second, size=(56, 84)), min_score=-1)
    cosines = (first / np.linalg.norm(first, axis=1, keepdims=True)) @ (
        second / np.linalg.norm(second, axis=1, keepdims=True)
    ).T
    expected = [
        (float(cosines[i, j]), centre(i), [j % 6 * 14 + 7, j // 6 * 14 + 7])
        for i in range(16)
        for j in range(24)
        if cosines[i, j] == cosines[i].max() == cosines[:, j].max()
    ]
    expected.sort(key=lambda pair: -pair[0])
    assert len(expected) > 3
    assert [pair["points"] for pair in answer["matches"]] == [[a, b] for _, a, b in expected]
    assert [pair["score"] for pair in answer["matches"]] == pytest.approx([score for score, _, _ in expected])
    few = match(analysed(first), analysed(second, size=(56, 84)), min_score=expected[3][0] - 1e-6, limit=2)
    assert (few["total"], few["matches"]) == (4, answer["matches"][:2])


@pytest.mark.parametrize("kind", ["box", "mask", "point"])
def test_a_region_restricts_the_first_image(kind: str) -> None:
    rows, moved, to = planted()
    mask = np.zeros((SIDE, SIDE), bool)
    mask[14:28, 28:42] = True  # patch 6
    region = {"box": [28, 14, 14, 14], "mask": coco_rle_encode(mask), "point": [35.5, 20]}[kind]
    answer = match(analysed(rows), analysed(moved), region={kind: region})
    assert [pair["points"] for pair in answer["matches"]] == [[centre(6), centre(to[6])]]


def test_padding_matches_nothing() -> None:
    spec = PreprocessSpec(resize=None, crop=56, fit="pad")
    rows, moved, _ = planted()
    rows[:4] = moved[:4] = 1.0  # the first row of patches of a wide image shows only padding
    rows[12:] = moved[12:] = 1.0
    sides = [analysed(patches, size=(56, 112), spec=spec) for patches in (rows, moved)]
    assert crop_box(56, 112, spec)[1] < 0
    answer = match(*sides, min_score=-1)
    assert answer["matches"]
    for pair in answer["matches"]:
        for point in pair["points"]:
            assert 0 < point[1] < 56


def test_a_planted_positional_bias_is_removed() -> None:
    rng = np.random.default_rng(2)
    trace = rng.normal(size=(16, 2)) @ rng.normal(size=(2, DIMS))  # two directions depend on the position
    rows, moved, to = planted()
    first, second = analysed(rows + 4 * trace), analysed(moved / 3 + 4 * trace)
    model = replace(MODEL, forward_zeros=lambda height, width: (trace + 5).astype(np.float32))
    assert basis_of(model, (4, 4)).shape == (2, DIMS)

    def right(answer: dict[str, Any]) -> int:
        return sum(pair["points"] in [[centre(i), centre(to[i])] for i in range(16)] for pair in answer["matches"])

    with_bias, without = match(first, second, model), match(first, second, model, debias=True)
    assert right(without) == without["total"] == 16
    assert right(with_bias) <= 4


def test_the_basis_explains_the_variance_and_is_computed_once() -> None:
    rng = np.random.default_rng(3)
    of_zeros = (rng.normal(size=(64, 6)) * [10, 5, 3, 1, 0.1, 0.01]) @ np.linalg.qr(rng.normal(size=(16, 16)))[0][:6]
    centred = of_zeros - of_zeros.mean(axis=0)
    for explained in (0.5, 0.9, 0.99):
        basis = positional_basis(of_zeros.astype(np.float32), explained)
        left = np.square(without_bias(centred.astype(np.float32), basis)).sum() / np.square(centred).sum()
        one_less = np.square(without_bias(centred.astype(np.float32), basis[:-1])).sum() / np.square(centred).sum()
        assert left <= 1 - explained < one_less
        assert basis @ basis.T == pytest.approx(np.eye(len(basis)), abs=1e-5)
    assert positional_basis(np.ones((64, 16), np.float32)).shape == (0, 16)
    calls = []

    def zeros(height: int, width: int) -> np.ndarray:
        calls.append((height, width))
        return of_zeros.astype(np.float32)

    model = replace(MODEL, forward_zeros=zeros, derived={})
    for grid in [(4, 16), (4, 16), *((n, 2) for n in range(1, 17)), (4, 16)]:
        basis_of(model, grid)
    assert (len(model.derived), calls[:2], calls[-1]) == (16, [(56, 224), (14, 28)], (56, 224))
    with pytest.raises(EngineFailed, match="without an engine"):
        basis_of(MODEL, (1, 1))


def shifted(dx: int, dy: int) -> bytes:
    """Return an image of noise. The noise has moved by this number of pixels."""
    pixels = np.random.default_rng(4).integers(0, 256, (40, 40, 3), np.uint8)
    big = np.asarray(Image.fromarray(pixels).resize((560, 560), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(big[140 + dy : 420 + dy, 140 + dx : 420 + dx]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("debias", [False, True])
def test_the_bundled_model_finds_a_shift(vision: Vision, debias: bool) -> None:
    answer = vision.run("match", [shifted(0, 0), shifted(28, 56)], size=140, debias=debias)
    moves = np.array([np.subtract(*pair["points"]) for pair in answer["matches"][:20]])
    assert np.median(moves, axis=0) == pytest.approx([28, 56], abs=1)
    assert np.mean(np.abs(moves - [28, 56]).max(axis=1) <= 28) > 0.7  # at most one patch beside


async def test_the_endpoint(serve: Serve, vision: Vision) -> None:
    images = [base64.b64encode(image).decode() for image in (shifted(0, 0), shifted(28, 0))]
    async with serve() as run:
        answer = await run.client.post("/v1/match", json={"images": images, "limit": 3, "debias": True})
        assert answer.status_code == 200, answer.text
        files = [("files", (f"{i}.png", base64.b64decode(image), "image/png")) for i, image in enumerate(images)]
        region = '{"point": [140, 140]}'
        picture = await run.client.post("/v1/match", files=files, data={"format": "png", "region": region})
        assert picture.status_code == 200, picture.text
    own = vision.run("match", [shifted(0, 0), shifted(28, 0)], limit=3, debias=True)
    assert isinstance(own, dict)
    assert answer.json()["matches"] == own["matches"]
    assert set(answer.json()) == set(own) | {"model", "fingerprint", "timings"}
    assert Image.open(io.BytesIO(picture.content)).size == (2 * 280 + 8, 280)
    drawn = vision.run("match", [shifted(0, 0), shifted(28, 0)], format="png", region={"point": [140, 140]})
    assert isinstance(drawn, File)
    assert drawn.data == picture.content


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ({"box": [500, 0, 10, 10]}, "region.box [500.0, 0.0, 10.0, 10.0] is outside the part of the image"),
        ({"box": [0, 0, 0, 10]}, "has no area"),
        ({"box": [0, 0, 10]}, "at least 4 items"),
        ({"point": [41, 0]}, "region.point [41.0, 0.0] is outside the image of 40 x 32 pixels"),
        ({"mask": {"size": [32, 41], "counts": "0"}}, "region.mask.size is [32, 41], but the image has [32, 40]"),
        ({"mask": {"size": [32, 40], "counts": [1280]}}, "region.mask is empty"),
        ({"box": [0, 0, 9, 9], "point": [1, 1]}, "exactly one of box, mask and point is needed, not box and point"),
        ({}, "exactly one of box, mask and point is needed, not none"),
        ("somewhere", "region"),
    ],
)
async def test_regions_that_do_not_fit_are_refused(tmp_path, region: Any, text: str) -> None:
    images = [base64.b64encode(photo(i)).decode() for i in range(2)]
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/match", json={"images": images, "region": region})
    assert answer.status_code == 422
    assert text in answer.json()["detail"]


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": 1001}, {"min_score": 1.1}, {"min_score": float("nan")}])
def test_options_beyond_their_bounds_are_refused(vision: Vision, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        vision.run("match", [photo(), photo()], **options)


def test_one_image_is_not_enough(vision: Vision) -> None:
    with pytest.raises(InvalidRequest, match="the number of images is 1, but match accepts 2"):
        vision.run("match", [photo()])
