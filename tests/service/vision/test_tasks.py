"""Tests of what all vision tasks have in common: one table makes the endpoints, the commands and the functions."""

import base64
import io
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli.vision
from cli import app
from service.errors import InvalidRequest, ServiceError
from service.vision import tasks
from service.vision.local import Vision
from service.vision.task import File
from tests.fakes import photo
from tests.service.vision.conftest import Serve

NAMES = list(tasks.SUMMARIES)
REQUIRED = {"words": {"words": ["cat", "dog"]}}
"""The options that a task requires."""


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_described_and_the_formats_are_those_of_the_schema(name: str) -> None:
    task = tasks.task(name)
    for field, info in task.options.model_fields.items():
        assert info.description, f"{name}: {field} has no description"
    assert get_args(task.options.model_fields["format"].annotation) == tuple(task.formats)
    assert set(task.formats.values()) <= set(cli.vision._SUFFIXES)
    assert not task.summary.endswith(".")


@pytest.mark.parametrize("name", NAMES)
async def test_endpoints_refuse_what_they_do_not_know(name: str, serve: Serve) -> None:
    task = tasks.task(name)
    key = "images" if task.many else "image"
    picture, required = base64.b64encode(photo()).decode(), REQUIRED.get(name, {})
    images = [picture] * task.images[0] if task.many else picture
    async with serve() as run:
        for body, text in (
            ({key: images, "no_such_option": 1}, "no_such_option: unknown field"),
            ({key: images, "size": 13}, "size: Input should be greater than or equal to 14, not 13"),
            ({key: images, "format": "jpeg"}, "format: Input should be"),
            ({key: images, "model": "another"}, "model 'another' is not served here"),
            ({}, f"{key} is missing"),
            ({key: [picture] * (task.images[1] + 1)}, f"{task.images[1] + 1} images"),
        ):
            answer = await run.client.post(f"/v1/{name}", json=required | body)
            assert answer.status_code in (404, 422), answer.text
            assert text in answer.json()["detail"], answer.text
        broken_image = {key: ["YWJj"] * task.images[0] if task.many else "YWJj"}
        broken = await run.client.post(f"/v1/{name}", json=required | broken_image)
        assert broken.status_code in (415, 422)
        assert broken.json()["errors"][0]["index"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert tasks.SUMMARIES[name] in result.output
    assert "--format" in result.output


async def test_endpoint_command_and_function_give_the_same_answer(serve: Serve, vision: Vision, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(photo(size=(90, 60)))
    local = vision.run("segment", [image], format="rle", size=56)
    async with serve() as run:
        served = (
            await run.client.post(
                "/v1/segment?format=rle&size=56", content=image.read_bytes(), headers={"Content-Type": "image/png"}
            )
        ).json()
    assert isinstance(local, dict)
    assert served["segmentation"] == local["segmentation"]
    printed = CliRunner().invoke(app, ["segment", str(image), "--size", "56", "--data-dir", str(tmp_path)])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["segmentation"] == local["segmentation"]


def test_the_command_chooses_the_format_from_the_file(tmp_path: Path) -> None:
    image, out = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(photo(size=(90, 60)))
    options = ["segment", str(image), "--data-dir", str(tmp_path), "-o"]
    assert CliRunner().invoke(app, [*options, str(out)]).exit_code == 0
    assert np.asarray(Image.open(out)).shape == (60, 90)
    for name, message in (
        ("mask.bmp", "segment writes files that end in .png, .json"),
        ("no/mask.png", "does not exist"),
    ):
        result = CliRunner().invoke(app, [*options, str(tmp_path / name)])
        assert result.exit_code == 2
        assert message in result.stderr
    result = CliRunner().invoke(app, [*options[:-1], "--format", "overlay"])
    assert (result.exit_code, "give its name with -o" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, [*options[:-1], "--format", "gif"])
    assert (result.exit_code, "format: Input should be" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("path", "key"), [("segment", "image"), ("match", "images"), ("classify", "images"), ("embeddings", "input")]
)
async def test_an_option_in_the_query_is_not_ignored(path: str, key: str, serve: Serve) -> None:
    text = base64.b64encode(photo()).decode()
    async with serve() as run:
        for body, place in (
            ({"json": {key: [text, text]}}, "JSON field"),
            ({"files": {"file": photo()}}, "form field"),
        ):
            answer = await run.client.post(f"/v1/{path}?model=auto", **body)
            assert answer.status_code == 422, answer.text
            assert f"model is in the query string: send it as a {place}" in answer.text
        assert (await run.client.post(f"/v1/{path}?api-version=1", **body)).status_code != 500  # others are left alone


def test_an_image_file_is_named_in_errors_and_one_image_needs_no_list(vision: Vision, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"no image")
    with pytest.raises(ServiceError, match=f"{image}: not a known image"):
        vision.run("segment", image)
    image.write_bytes(photo())
    assert vision.run("segment", str(image)) == vision.run("segment", [photo()]) == vision.run("segment", photo())


def test_the_command_keeps_to_the_limits_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(photo(size=(112, 60)))
    options = ["segment", str(image), "--size", "56", "--data-dir", str(tmp_path)]
    assert CliRunner().invoke(app, options).exit_code == 0
    monkeypatch.setenv("DINOV2_MAX_INPUT_PATCHES", "27")
    result = CliRunner().invoke(app, options)
    assert (result.exit_code, "with 28 patches; at most 27 are allowed" in result.stderr) == (2, True), result.stderr


def test_functions_refuse_bad_calls(vision: Vision) -> None:
    with pytest.raises(InvalidRequest, match=r"unknown task 'see'; the tasks are .*segment"):
        vision.run("see", [photo()])
    with pytest.raises(InvalidRequest, match="the number of images is 2, but segment accepts 1"):
        vision.run("segment", [photo(), photo()])
    with pytest.raises(InvalidRequest, match="colour: unknown field"):
        vision.run("segment", [photo()], colour="red")


def test_a_file_with_the_embedding_becomes_json(vision: Vision) -> None:
    picture = vision.run("segment", [photo()], format="overlay")
    both = vision.run("segment", [photo()], format="overlay", include="embedding", pooling="mean")
    assert isinstance(picture, File)
    assert isinstance(both, dict)
    assert base64.b64decode(both["overlay"]) == picture.data
    assert Image.open(io.BytesIO(picture.data)).size == (40, 32)
    assert both["embedding"].shape == (vision.artifact.manifest.config.embed_dim,)


def test_a_size_with_too_many_patches_is_refused_before_the_engine(vision: Vision) -> None:
    with pytest.raises(InvalidRequest, match=r"size=4096 .* at most 4096 are allowed: choose a smaller size"):
        vision.run("attention", [photo()], size=4096)
