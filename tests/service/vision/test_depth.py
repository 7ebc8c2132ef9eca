"""Tests of `POST /v1/depth`: every format shows the same depths, and what does not fit is refused."""

import base64
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.heads.store import choose_head, open_head, remove_head
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import View
from service.vision import tasks
from service.vision.heads import tokens_of
from service.vision.local import Vision
from service.vision.pictures import to_image
from service.vision.task import File
from tests.fakes import Running, photo, running
from tests.service.vision.conftest import _Kept
from tests.service.vision.head_models import add_dpt, add_linear_depth, add_segmenter, with_heads

IMAGE = photo(3, size=(90, 60))
HEIGHT, WIDTH = 60, 90


@pytest.fixture
def model(vision: Vision, tmp_path: Path) -> Vision:
    """The bundled model without heads."""
    return with_heads(vision, tmp_path / "derived")


@pytest.fixture
def rooms(model: Vision) -> Vision:
    """The bundled model with one depth head."""
    add_linear_depth(model.artifact)
    return model


@pytest.fixture
def serve_model(tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(model: Vision) -> AsyncIterator[Running]:
        async with running(tmp_path / "data", engine=_Kept(model.engine), artifact=model.artifact) as run:
            yield run

    return start


def metres_of(model: Vision, **options: Any) -> np.ndarray:
    answer = model.run("depth", [IMAGE], format="npy", **options)
    assert isinstance(answer, File)
    return np.load(io.BytesIO(answer.data))


def test_all_formats_show_the_depths_of_the_head(rooms: Vision) -> None:
    last = rooms.artifact.manifest.config.depth - 1
    analysed = rooms.analyse(IMAGE, View((f"tokens.{last}",)))
    head = open_head(rooms.artifact, choose_head(rooms.artifact, "depth", "rooms"))
    wanted = head.depth(tokens_of(analysed))
    h, w = analysed.grid
    assert wanted.shape == (4 * h, 4 * w)
    assert wanted.std() > 0.05

    metres = metres_of(rooms)
    assert (metres.shape, metres.dtype) == ((HEIGHT, WIDTH), np.float32)
    np.testing.assert_allclose(metres, to_image(wanted, (HEIGHT, WIDTH), analysed.crop_box), rtol=1e-5)
    assert (metres == 0).any()  # the model crops the image

    numbers = rooms.run("depth", [IMAGE], array=True)
    assert isinstance(numbers, dict)
    assert (numbers["head"], numbers["depth_range"], numbers["size"]) == ("rooms", [0.5, 8.0], [HEIGHT, WIDTH])
    np.testing.assert_allclose(numbers["depth"], wanted, rtol=1e-5)
    summary = [numbers[name] for name in ("min", "max", "median")]
    np.testing.assert_allclose(summary, [wanted.min(), wanted.max(), np.median(wanted)], rtol=1e-5)
    assert "depth" not in rooms.run("depth", [IMAGE])

    png16 = rooms.run("depth", [IMAGE], format="png16")
    assert isinstance(png16, File)
    assert png16.headers["X-Depth-Units-Per-Metre"] == "1000"
    values = np.asarray(Image.open(io.BytesIO(png16.data)))
    assert values.dtype == np.uint16
    np.testing.assert_array_equal(values, np.rint(metres * 1000))

    picture = rooms.run("depth", [IMAGE], format="png")
    assert isinstance(picture, File)
    colours = np.asarray(Image.open(io.BytesIO(picture.data))).astype(int)
    assert colours.shape == (HEIGHT, WIDTH, 3)
    assert (colours[metres == 0] == 128).all()
    seen = metres > 0
    brightness = colours.sum(axis=2)
    assert brightness[metres == metres[seen].min()].min() > brightness[metres == metres.max()].max()
    assert float(picture.headers["X-Depth-Min"]) == pytest.approx(wanted.min(), rel=1e-4)


def test_an_array_of_a_large_image_is_refused(rooms: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.vision.depth.MAX_NUMBERS", HEIGHT * WIDTH)
    assert metres_of(rooms).shape == (HEIGHT, WIDTH)
    monkeypatch.setattr("service.vision.depth.MAX_NUMBERS", HEIGHT * WIDTH - 1)
    with pytest.raises(InvalidRequest, match=r"5,400 numbers \(60 x 90\), but at most 5,399 are allowed") as caught:
        metres_of(rooms)
    assert caught.value.param == "format"


@pytest.mark.parametrize(
    ("task", "format_"), [("depth", "png"), ("depth", "png16"), ("depth", "npy"), ("detect", "overlay")]
)
def test_no_array_of_the_size_of_the_image_waits_for_the_encoding(rooms: Vision, task: str, format_: str) -> None:
    """Only the number of images that are computed at the same time is limited, so only they may have such arrays."""
    found = tasks.task(task)
    options = found.options.model_validate({"format": format_})
    analysed = rooms.analyse(IMAGE, found.view(options, rooms.model))
    result = found.compute(analysed, options, rooms.model)
    content = result if isinstance(result, File) else result.picture
    assert isinstance(content, File)
    assert found.encode([result], options).data is content.data


def test_the_whole_image_has_a_depth_if_a_size_is_given(rooms: Vision) -> None:
    metres = metres_of(rooms, size=56)
    assert metres.shape == (HEIGHT, WIDTH)
    assert (metres > 0).all()


def test_the_range_of_the_request_moves_the_depths(rooms: Vision) -> None:
    near, far = metres_of(rooms, size=56), metres_of(rooms, size=56, min_depth=1.0, max_depth=16.0)
    np.testing.assert_allclose((far - 1) / 15, (near - 0.5) / 7.5, atol=1e-4)
    kitti = rooms.run("depth", [IMAGE], format="png16", max_depth=80)
    assert isinstance(kitti, File)
    assert kitti.headers["X-Depth-Units-Per-Metre"] == "256"
    values = np.asarray(Image.open(io.BytesIO(kitti.data)))
    np.testing.assert_array_equal(values, np.rint(metres_of(rooms, max_depth=80) * 256))


def test_a_dpt_head_estimates_depth(model: Vision) -> None:
    add_dpt(model.artifact)
    answer = model.run("depth", [IMAGE], size=42, array=True)
    assert isinstance(answer, dict)
    h, w = 3, 5  # 60 x 90 pixels become 42 x 70
    assert answer["depth"].shape == (32 * -(-h // 2), 32 * -(-w // 2))
    assert 0.001 <= answer["min"] < answer["max"] <= 10
    with pytest.raises(InvalidRequest, match=r"2646 patches, but the head 'dpt' accepts at most 2500: .* smaller size"):
        model.run("depth", [IMAGE], size=588)


async def test_bad_requests(model: Vision, serve_model: Callable[..., Any]) -> None:
    body = {"image": base64.b64encode(IMAGE).decode()}
    async with serve_model(model) as run:

        async def refused(text: str, param: str, **options: Any) -> None:
            answer = await run.client.post("/v1/depth", json=body | options)
            assert answer.status_code == 422, answer.text
            problem = answer.json()
            assert text in problem["detail"], problem
            assert problem["param"] == param

        advice = "`dinov2 heads add` adds one of Meta's to a published model, and `dinov2 train-head depth`"
        await refused(f"has no head for depth; {advice}", "head")
        add_linear_depth(model.artifact)
        assert (await run.client.post("/v1/depth", json=body)).status_code == 200  # without a restart
        await refused("there is no head named 'moon'; heads for depth: rooms", "head", head="moon")
        await refused("there is no head named '../rooms'", "head", head="../rooms")
        await refused("need 0 < min_depth < max_depth", "min_depth", min_depth=8)
        await refused("min_depth=3 and max_depth=2", "max_depth", min_depth=3, max_depth=2)
        await refused("max_depth", "max_depth", max_depth=-1)
        await refused("a 16-bit PNG holds depths up to 255.996 m; use npy", "format", max_depth=300, format="png16")
        add_segmenter(model.artifact)
        await refused(
            "the head 'parts' is for segmentation, not for depth; heads for depth: rooms", "head", head="parts"
        )
        add_linear_depth(model.artifact, "streets")
        await refused("choose a head: heads for depth: rooms, streets", "head")
        remove_head(model.artifact, "rooms")
        answer = await run.client.post("/v1/depth?format=png16", content=IMAGE, headers={"Content-Type": "image/png"})
        assert answer.status_code == 200
        assert (answer.headers["X-Depth-Units-Per-Metre"], answer.headers["Content-Type"]) == ("1000", "image/png")


async def test_the_service_lists_heads_and_hides_folders(model: Vision, serve_model: Callable[..., Any]) -> None:
    async with serve_model(model) as run:
        assert (await run.client.get("/v1/models/auto")).json()["heads"] == []
        add_linear_depth(model.artifact)
        [head] = (await run.client.get("/v1/models")).json()["data"][0]["heads"]
        assert (head["name"], head["kind"], head["architecture"]) == ("rooms", "depth", "linear")
        assert (head["depth_range"], head["metrics"], head["classes"]) == ([0.5, 8.0], {"delta1": 0.5}, [])
        stored = model.artifact.derived / "heads" / "rooms" / "head.safetensors"
        assert len(head["fingerprint"]) == 64
        stored.write_bytes(stored.read_bytes()[:-1])
        answer = await run.client.post("/v1/depth", content=IMAGE, headers={"Content-Type": "image/png"})
        assert answer.status_code == 500
        assert answer.json()["detail"] == "the head 'rooms' cannot be used; the log of the service has the reason"


def test_a_damaged_record_is_an_error_of_the_service(rooms: Vision) -> None:
    (rooms.artifact.derived / "heads" / "rooms" / "head.json").write_text("{")
    with pytest.raises(EngineFailed, match="the head 'rooms' cannot be used"):
        rooms.run("depth", [IMAGE], head="rooms")
