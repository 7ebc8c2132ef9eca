"""Tests of `POST /v1/attention` with the bundled model: the forms of the answer, and refused options."""

import base64
import io
import math
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidRequest
from service.vision import attention
from service.vision.local import Vision
from service.vision.task import File
from tests.fakes import photo
from tests.service.vision.conftest import Serve

DEPTH, HEADS = 4, 3  # of the bundled model
PNG = {"Content-Type": "image/png"}


async def ask(serve: Serve, query: str, status: int = 200, image: bytes | None = None) -> httpx.Response:
    async with serve() as run:
        image = photo(size=(90, 60)) if image is None else image
        answer = await run.client.post(f"/v1/attention{query}", content=image, headers=PNG)
    assert answer.status_code == status, answer.text
    return answer


def pixels(answer: httpx.Response) -> np.ndarray:
    assert answer.headers["Content-Type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def local(vision: Vision, image: bytes | None = None, **options: Any) -> Any:
    answer = vision.run("attention", [photo(size=(90, 60)) if image is None else image], **options)
    if not isinstance(answer, File):
        return answer
    if answer.media_type == "application/x-npy":
        return np.load(io.BytesIO(answer.data))
    return np.asarray(Image.open(io.BytesIO(answer.data)))


async def test_json(serve: Serve) -> None:
    answer = (await ask(serve, "")).json()
    maps = np.array(answer["maps"])
    assert maps.shape == (1, HEADS, 16, 16)
    assert (answer["blocks"], answer["heads"], answer["fuse_heads"]) == ([3], [0, 1, 2], "none")
    assert (answer["grid"], answer["crop_box"]) == ([16, 16], pytest.approx([21, 6, 48, 48], abs=0.2))
    shares = np.array(answer["class_share"]) + answer["register_share"]
    np.testing.assert_allclose(maps.sum((-2, -1)) + shares, 1, atol=1e-5)
    assert np.array(answer["register_share"]).tolist() == [[0, 0, 0]]  # the model has no registers
    assert (np.array(answer["entropy"]) < np.log(256)).all()
    assert answer["timings"]["attention"] > 0


async def test_forms_lists_and_json_bodies_select_the_same(serve: Serve) -> None:
    image = photo(size=(90, 60))
    async with serve() as run:
        answers = [
            await run.client.post("/v1/attention?blocks=0,-1&heads=1", content=image, headers=PNG),
            await run.client.post("/v1/attention", files={"file": image}, data={"blocks": ["0", "-1"], "heads": "1"}),
            await run.client.post(
                "/v1/attention",
                json={"image": base64.b64encode(image).decode(), "blocks": [0, -1], "heads": [1], "mass": None},
            ),
        ]
    assert [answer.status_code for answer in answers] == [200] * 3
    first = answers[0].json()
    assert (first["blocks"], first["heads"]) == ([0, 3], [1])
    assert all(answer.json()["maps"] == first["maps"] for answer in answers)


async def test_files(serve: Serve) -> None:
    array = await ask(serve, "?format=npy&blocks=all&size=56")
    assert array.headers["Content-Type"] == "application/x-npy"
    assert np.load(io.BytesIO(array.content)).shape == (DEPTH, HEADS, 4, 6)
    assert pixels(await ask(serve, "?format=png")).shape == (60, 90)
    assert pixels(await ask(serve, "?format=overlay")).shape == (60, 90, 3)
    figure = pixels(await ask(serve, "?format=figure"))
    assert figure.shape[0] > 4 * 144  # one row of maps per block
    assert figure.shape[1] > 4 * 144  # the image, and one column per head


def test_any_aspect_ratio(vision: Vision) -> None:
    for size, grid in (((300, 40), (2, 15)), ((40, 300), (15, 2)), ((60, 60), (2, 2))):
        image = photo(size=size)
        assert local(vision, image, size=28, format="npy").shape == (1, HEADS, *grid)
        assert local(vision, image, size=28, format="npy", resolution="image").shape == (1, HEADS, *size[::-1])
        assert local(vision, image, size=28, format="overlay").shape == (*size[::-1], 3)
        assert local(vision, image, size=28, format="figure").ndim == 3


def test_outside_the_crop_the_map_is_0_and_the_image_unchanged(vision: Vision) -> None:
    image = photo(size=(120, 60))
    decoded = np.asarray(Image.open(io.BytesIO(image)))
    x, y, width, height = local(vision, image)["crop_box"]
    outside = np.ones((60, 120), bool)
    outside[int(y) : int(y + height) + 1, int(x) : int(x + width) + 1] = False
    assert not local(vision, image, format="npy", resolution="image")[0, 0][outside].any()
    assert not local(vision, image, format="png")[outside].any()
    np.testing.assert_array_equal(local(vision, image, format="overlay")[outside], decoded[outside])
    assert (local(vision, image, format="overlay")[~outside] != decoded[~outside]).any()


def test_the_range_is_that_of_the_pixels_in_the_crop(vision: Vision) -> None:
    image = photo(size=(146, 73))  # no pixel is at the centre of a patch
    x, y, width, height = local(vision, image)["crop_box"]
    inside = slice(math.ceil(y), int(y + height)), slice(math.ceil(x), int(x + width))
    maps = local(vision, image, format="npy", resolution="image", values="range", blocks="all")
    seen = maps[:, :, *inside]
    assert (seen.min(axis=(-2, -1)) == 0).all()
    assert (seen.max(axis=(-2, -1)) == 1).all()
    assert not maps.sum(axis=(0, 1))[: int(y)].any()


def test_a_set_of_patches(vision: Vision) -> None:
    marked = local(vision, format="npy", mass=0.6)
    assert marked.dtype == np.uint8
    assert 0 < marked.sum(axis=(-2, -1)).max() < 154  # 60 % of 256 patches, if all had the same weight
    grey = local(vision, format="png", mass=0.6)
    assert set(np.unique(grey)) == {0, 255}
    large = local(vision, format="npy", mass=0.6, resolution="image", fuse_heads="mean")[0, 0]
    np.testing.assert_array_equal(large * 255, grey)
    assert local(vision, format="overlay", mass=0.6).shape == (60, 90, 3)
    assert local(vision, format="figure", mass=0.6).shape == local(vision, format="figure", mass=0.5).shape
    assert local(vision, mass=1)["maps"].all()


def test_figures_of_some_maps(vision: Vision) -> None:
    one = local(vision, format="figure", blocks=[-1], fuse_heads="max")
    rolled = local(vision, format="figure", fuse_blocks="rollout")
    fused = local(vision, format="figure", fuse_heads="mean")
    assert one.shape[1] == rolled.shape[1] < fused.shape[1]
    each, shared = (local(vision, format="figure", scale=scale) for scale in ("each", "shared"))
    assert each.shape == shared.shape
    assert (each != shared).any()
    assert (local(vision, format="figure", colormap="grey") != each).any()


def test_a_picture_of_many_rows_is_drawn_in_blocks(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [local(vision, format=form, size=28) for form in ("png", "overlay")]
    monkeypatch.setattr(attention, "_ROWS", 7)
    for expected, form in zip(whole, ("png", "overlay"), strict=True):
        np.testing.assert_array_equal(local(vision, format=form, size=28), expected)


def test_an_equal_map_is_drawn(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all patches have the same weight, no picture divides by 0."""
    equal = np.full((1, 257), 1 / 257, np.float32)
    monkeypatch.setattr(attention, "class_weights", lambda queries, keys, num_heads, heads: equal[[0] * len(heads)])
    assert not local(vision, format="png").any()
    assert local(vision, format="figure", scale="shared").ndim == 3
    assert local(vision, values="range", format="npy", resolution="image").max() == 0


@pytest.mark.parametrize(
    ("query", "param", "text"),
    [
        ("blocks=4", "blocks", "blocks: 4 is out of range; the model has 4 blocks, 0 to 3"),
        ("heads=-4", "heads", "heads: -4 is out of range; the model has 3 heads, 0 to 2"),
        ("blocks=1,1", "blocks", "blocks: 1 is chosen twice"),
        ("blocks=first", "blocks", "blocks: must be all, or integers such as 0,5,-1, not 'first'"),
        ("fuse_blocks=rollout&blocks=1", "blocks", "blocks=[1]: fuse_blocks=rollout uses all blocks"),
        ("fuse_blocks=rollout&fuse_heads=none", "fuse_heads", "fuse_heads=none: fuse_blocks=rollout needs fuse_heads"),
        ("format=png&blocks=all", "format", "format=png shows one map, but blocks and heads select 4 x 1"),
        ("format=overlay&fuse_heads=none", "format", "format=overlay shows one map, but blocks and heads select 1 x 3"),
        ("resolution=image", "resolution", "resolution=image needs format=npy, not format=json"),
        ("mass=0", "mass", "mass: Input should be greater than 0, not '0'"),
        ("mass=1.5", "mass", "mass: Input should be less than or equal to 1"),
        ("mass=nan", "mass", "mass: Input should be"),
        ("opacity=2", "opacity", "opacity: Input should be"),
        ("fuse_heads=sum", "fuse_heads", "fuse_heads: Input should be 'none', 'mean', 'max' or 'min'"),
        ("values=log", "values", "values: Input should be"),
        ("colormap=jet", "colormap", "colormap: Input should be"),
        ("scale=log", "scale", "scale: Input should be"),
    ],
)
async def test_bad_options(serve: Serve, query: str, param: str, text: str) -> None:
    problem = (await ask(serve, f"?{query}", status=422)).json()
    assert text in problem["detail"]
    assert problem["param"] == param


async def test_the_amount_of_the_answer_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_JSON_NUMBERS", DEPTH * HEADS * 256 - 1)
    monkeypatch.setattr(attention, "MAX_NUMBERS", 90 * 60 * 2)
    problem = (await ask(serve, "?blocks=all", status=422)).json()
    assert problem["detail"].startswith("format=json: the answer would be 4 x 3 maps of 16 x 16, 3,072 numbers, but at")
    assert problem["param"] == "format"
    await ask(serve, "?blocks=0,1,2")
    await ask(serve, "?format=npy&blocks=all")
    assert "1 x 3 maps of 60 x 90" in (await ask(serve, "?format=npy&resolution=image", status=422)).text
    await ask(serve, "?format=npy&resolution=image&heads=0,1")
    monkeypatch.setattr(attention, "MAX_PIXELS", 90 * 60 - 1)
    assert "1 x 1 maps of 60 x 90" in (await ask(serve, "?format=png", status=422)).text
    assert "the answer would be a figure of" in (await ask(serve, "?format=figure", status=422)).text


def test_options_are_refused_before_the_forward_pass(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(vision), "analyse", lambda *args: pytest.fail("the network ran"))
    with pytest.raises(InvalidRequest, match="blocks: 7 is out of range"):
        local(vision, blocks=[7])
