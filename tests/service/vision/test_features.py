"""Tests of `POST /v1/features` with the bundled model: layers, norm, arrays, pictures, and refused options."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.engines.onnxruntime_engine import OnnxEngine
from model.preprocess import PreprocessSpec, preprocess
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import Analysed, Embedded
from service.features.served_model import ServedModel
from service.vision import features as task
from service.vision.local import Vision
from service.vision.task import File
from tests.fakes import photo
from tests.service.vision.conftest import Serve

WIDTH, DEPTH = 192, 4  # of the bundled model
IMAGES = [photo(i, size=(90, 60)) for i in range(3)]


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def local(vision: Vision, *images: bytes, **options: Any) -> Any:
    answer = vision.run("features", images or IMAGES[:1], **options)
    if not isinstance(answer, File):
        return answer
    if answer.media_type == "application/x-npy":
        return np.load(io.BytesIO(answer.data))
    return np.asarray(Image.open(io.BytesIO(answer.data)))


def directly(vision: Vision, image: bytes, name: str) -> np.ndarray:
    """Return an output of the engine for an image, [tokens, D]."""
    assert isinstance(vision.engine, OnnxEngine)
    pixels = preprocess(np.asarray(Image.open(io.BytesIO(image))), vision.artifact.manifest.preprocess)
    return vision.engine.run_outputs(pixels[None], [name])[name][0]


def test_the_default_is_the_patches_of_the_last_layer(vision: Vision) -> None:
    expected = directly(vision, IMAGES[0], "patches").reshape(16, 16, WIDTH)
    answer = local(vision)
    assert (answer["layers"], len(answer["data"])) == ([3], 1)
    [one] = answer["data"]
    assert (one["index"], one["grid"]) == (0, [16, 16])
    assert one["crop_box"] == pytest.approx((21, 6, 48, 48), abs=0.2)
    np.testing.assert_array_equal(one["features"], expected)
    np.testing.assert_array_equal(local(vision, format="npy"), expected)


def test_layers_with_and_without_the_norm(vision: Vision) -> None:
    tokens = {i: directly(vision, IMAGES[0], f"tokens.{i}")[1:].reshape(16, 16, WIDTH) for i in range(DEPTH)}
    raw = local(vision, format="npy", layers="all", norm=False)
    assert raw.shape == (DEPTH, 16, 16, WIDTH)
    for i in range(DEPTH):
        np.testing.assert_array_equal(raw[i], tokens[i])
    normed = local(vision, format="npy", layers=[-1, 0])
    assert normed.shape == (2, 16, 16, WIDTH)
    np.testing.assert_allclose(normed[0], local(vision, format="npy"), atol=1e-4)
    np.testing.assert_allclose(normed[1], ServedModel(vision.artifact).norm(tokens[0]), atol=1e-5)
    assert local(vision, layers=[2])["layers"] == [2]
    assert np.shape(local(vision, layers=[2])["data"][0]["features"]) == (1, 16, 16, WIDTH)


def test_several_images_and_any_size(vision: Vision) -> None:
    stacked = local(vision, *IMAGES, format="npy", size=28)
    assert stacked.shape == (3, 2, 3, WIDTH)
    for array, image in zip(stacked, IMAGES, strict=True):
        np.testing.assert_allclose(array, local(vision, image, format="npy", size=28), atol=1e-4)
    assert local(vision, *IMAGES, format="npy", layers="all").shape == (3, DEPTH, 16, 16, WIDTH)
    tall = photo(9, size=(60, 90))
    data = local(vision, IMAGES[0], tall, size=28)["data"]
    assert [each["grid"] for each in data] == [[2, 3], [3, 2]]
    with pytest.raises(InvalidRequest, match=r"different grids \(2 x 3 and 3 x 2 patches\)"):
        local(vision, IMAGES[0], tall, size=28, format="npy")
    with pytest.raises(InvalidRequest, match="different grids"):
        local(vision, IMAGES[0], tall, size=28, format="pca_npy")
    assert local(vision, IMAGES[0], tall, size=28, format="pca").shape == (90, 135 + 8 + 60, 3)


def test_pictures(vision: Vision) -> None:
    assert local(vision, format="pca").shape == (60, 90, 3)
    colours = local(vision, format="pca_npy")
    assert (colours.shape, colours.dtype) == ((16, 16, 3), np.float32)
    assert (colours.min(), colours.max()) == (0, 1)
    assert local(vision, *IMAGES, format="pca_npy", layers=[1], norm=False).shape == (3, 16, 16, 3)
    assert local(vision, *IMAGES, format="pca").shape == (60, 3 * 90 + 16, 3)
    above = local(vision, *IMAGES, format="pca", show_images=True)
    assert above.shape == (128, 3 * 90 + 16, 3)
    np.testing.assert_array_equal(above[:60, :90], np.asarray(Image.open(io.BytesIO(IMAGES[0]))))


def test_the_same_image_twice_has_the_same_colours(vision: Vision) -> None:
    first, second = local(vision, IMAGES[0], IMAGES[0], format="pca_npy")
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, local(vision, IMAGES[0], format="pca_npy"), atol=0.02)  # other quantiles


def test_only_the_foreground(vision: Vision) -> None:
    mask = np.asarray(Image.open(io.BytesIO(vision.run("segment", IMAGES[:1], format="png").data))) > 0  # type: ignore[union-attr]
    picture = local(vision, format="pca", foreground=True)
    assert 0 < mask.mean() < 1
    assert not picture[~mask].any()
    assert picture[mask].any(axis=-1).mean() > 0.95
    colours = local(vision, format="pca_npy", foreground=True)
    assert 0 < colours.any(axis=-1).mean() < 1


def test_patches_of_padding_do_not_count(vision: Vision) -> None:
    spec = PreprocessSpec(resize=None, crop=56, fit="pad")
    image = np.asarray(Image.open(io.BytesIO(photo(size=(90, 45)))))
    patches = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    embedded = Embedded(np.zeros((2, WIDTH), np.float32), 17)
    analysed = Analysed(embedded, patches, patches[:0], (4, 4), image, spec)
    result = task._compute(analysed, task.FeaturesOptions(format="pca"), vision.model)
    assert result.shown is not None
    assert result.shown.used.all(axis=1).tolist() == [False, True, True, False]


async def test_the_endpoint(serve: Serve) -> None:
    async with serve() as run:
        body = {"images": [text(image) for image in IMAGES], "size": 28, "layers": [0, -1]}
        answer = (await run.client.post("/v1/features", json=body)).json()
        assert np.shape(answer["data"][2]["features"]) == (2, 2, 3, WIDTH)
        assert [each["index"] for each in answer["data"]] == [0, 1, 2]
        files = [("file", image) for image in IMAGES]
        picture = await run.client.post("/v1/features", files=files, data={"format": "pca"})
        assert picture.headers["Content-Type"] == "image/png"
        assert Image.open(io.BytesIO(picture.content)).size == (3 * 90 + 16, 60)
        array = await run.client.post(
            "/v1/features?format=npy", content=IMAGES[0], headers={"Content-Type": "image/png"}
        )
        assert array.headers["Content-Type"] == "application/x-npy"
        assert np.load(io.BytesIO(array.content)).shape == (16, 16, WIDTH)


@pytest.mark.parametrize(
    ("query", "param", "problem"),
    [
        ("layers=4", "layers", "layers: 4 is out of range; the model has 4 layers, 0 to 3"),
        ("layers=1,-3", "layers", "layers: -3 is chosen twice"),
        ("format=pca&layers=0,1", "layers", "format=pca shows one layer, not 2"),
        ("format=pca_npy&layers=all", "layers", "format=pca_npy shows one layer, not 4"),
        ("foreground=true", "foreground", "foreground=true needs format=pca or format=pca_npy, not format=json"),
        ("format=pca_npy&show_images=true", "show_images", "show_images=true needs format=pca, not format=pca_npy"),
        ("norm=maybe", "norm", "norm: Input should be a valid boolean"),
    ],
)
async def test_bad_options(serve: Serve, query: str, param: str, problem: str) -> None:
    async with serve() as run:
        answer = await run.client.post(
            f"/v1/features?{query}", content=IMAGES[0], headers={"Content-Type": "image/png"}
        )
    assert answer.status_code == 422
    assert problem in answer.json()["detail"]
    assert answer.json()["param"] == param


async def test_the_number_of_images_is_bounded(serve: Serve) -> None:
    async with serve() as run:
        answer = await run.client.post("/v1/features", json={"images": [text(IMAGES[0])] * 17, "size": 28})
        assert answer.status_code == 422
        assert "17 images" in answer.text
        bad = await run.client.post("/v1/features", json={"images": [text(IMAGES[0]), text(b"x")], "size": 28})
        assert bad.status_code in (415, 422)
        assert bad.json()["errors"][0]["index"] == 1


def test_the_amount_of_the_answer_is_bounded(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 256 * WIDTH
    monkeypatch.setattr(task, "MAX_JSON_NUMBERS", 2 * one)
    monkeypatch.setattr(task, "MAX_NUMBERS", 3 * one)
    local(vision, *IMAGES[:2])
    with pytest.raises(
        InvalidRequest, match=rf"format=json: the features have {3 * one:,} numbers, but at most"
    ) as many:
        local(vision, *IMAGES)
    assert many.value.param == "format"
    with pytest.raises(InvalidRequest, match=f"the features have {3 * one:,} numbers"):
        local(vision, layers=[0, 1, 2])
    local(vision, *IMAGES, format="npy")
    with pytest.raises(InvalidRequest, match=f"format=npy: the features have {4 * one:,} numbers"):
        local(vision, layers="all", format="npy")


@pytest.mark.parametrize("form", ["pca", "pca_npy"])
def test_features_that_are_not_finite_are_the_engines_fault(
    vision: Vision, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(ServedModel, "norm", lambda self, tokens: tokens * np.nan)
    with pytest.raises(EngineFailed, match="the engine's features cannot be used: patch features must be finite"):
        local(vision, format=form, layers=[0])
