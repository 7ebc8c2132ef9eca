"""Tests of `dinov2 verify`, with a tiny model and numbers that torch computes for it.

The published numbers themselves cannot be checked here, because neither the weights nor the image may be downloaded.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from model import published_numbers
from model.export.artifact import export_artifact
from model.export.options import ExportOptions
from model.preprocess import PreprocessSpec, preprocess
from model.zoo import ENTRIES
from tests.model.tiny import CONFIG, backbone, random_weights

torch = pytest.importorskip("torch", reason="the reference numbers are computed with torch: pip install '.[train]'")
runner = CliRunner()
SPEC = PreprocessSpec(resize=80, crop=42)  # the position embedding of 70 x 70 pixels is resized
WEIGHTS = {key: 20 * value if key == "pos_embed" else value for key, value in random_weights().items()}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_artifact(
        replace(backbone(preprocess=SPEC), weights=WEIGHTS), tmp_path_factory.mktemp("verify"), ExportOptions()
    ).path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cats.png")
    return tmp_path / "cats.png"


def numbers_of(image: Path, rule: str) -> list[list[float]]:
    """Return the first three features of the first three tokens, from torch and with this rule."""
    from model.vit import DinoVisionTransformer

    model = DinoVisionTransformer(replace(CONFIG, pos_embed_rule=rule)).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in WEIGHTS.items()})
    pixels = torch.from_numpy(preprocess(np.asarray(Image.open(image)), SPEC))[None]
    with torch.no_grad():
        out = model.forward_features(pixels)
    tokens = torch.cat([out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]], dim=1)
    return [[round(float(value), 4) for value in row] for row in tokens[0, :3, :3]]


@pytest.fixture
def table(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "numbers.json"
    content = {
        "image": {"name": "cats", "url": "http://example.com", "width": 128, "height": 96},
        "preprocess": {"resize": SPEC.resize, "crop": SPEC.crop},
        "decimals": 4,
        "needed_decimals": 2,
        "models": {
            "tiny": {"tokens": ["class token", "register 0", "register 1"], "values": [], "source": "a paper"},
        },
    }
    path.write_text(json.dumps(content))
    monkeypatch.setattr(published_numbers, "NUMBERS", path)
    return path


def change(table: Path, values: list[list[float]]) -> None:
    content = json.loads(table.read_text())
    content["models"]["tiny"]["values"] = values
    table.write_text(json.dumps(content))


def invoke(artifact: Path, image: Path):
    return runner.invoke(cli.app, ["verify", str(artifact), "--image", str(image)])


def test_a_model_that_agrees(artifact: Path, image: Path, table: Path) -> None:
    change(table, numbers_of(image, "offset"))
    result = invoke(artifact, image)
    assert result.exit_code == 0, result.output
    assert "numbers: a paper" in result.stdout
    assert "the model agrees" in result.stdout
    lines = [line for line in result.stdout.splitlines() if "decimal places" in line]
    assert len(lines) == 9
    assert all(line.endswith(("3 decimal places", "4 decimal places")) for line in lines), lines
    assert lines[0].startswith("class token        0")
    assert lines[8].startswith("register 1         2")


def test_one_wrong_number_is_enough_to_disagree(artifact: Path, image: Path, table: Path) -> None:
    values = numbers_of(image, "offset")
    values[1][2] += 0.01
    change(table, values)
    result = invoke(artifact, image)
    assert result.exit_code == 1
    assert "register 0         2" in result.stdout
    assert "1 decimal places" in result.stdout
    assert "the model disagrees: each number must agree to 2 decimal places" in result.output
    assert "weights are right" not in result.output


def test_another_rule_for_positions_is_named(artifact: Path, image: Path, table: Path) -> None:
    change(table, numbers_of(image, "antialias"))
    result = invoke(artifact, image)
    assert result.exit_code == 1
    assert "with the rule antialias for resizing the position embedding" in result.output
    assert "This artifact uses the rule offset" in result.output


def test_what_cannot_be_verified_is_an_error(artifact: Path, image: Path, table: Path, tmp_path: Path) -> None:
    change(table, numbers_of(image, "offset"))
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    said = invoke(artifact, tmp_path / "other.png")
    assert (said.exit_code, "is 128 x 96, but this image is 64 x 64" in said.output) == (2, True)
    content = json.loads(table.read_text())
    content["preprocess"] = {"resize": 256, "crop": 42}
    table.write_text(json.dumps(content))
    said = invoke(artifact, image)
    assert said.exit_code == 2
    assert "export the model with --resize 256 --crop 42" in said.output
    content["models"] = {"other": content["models"]["tiny"]}
    table.write_text(json.dumps(content))
    assert "no numbers are published for 'tiny', only for other" in invoke(artifact, image).output
    missing, table_as_image = tmp_path / "missing.png", invoke(artifact, table)
    assert f"error: {missing}: No such file or directory\n" == invoke(artifact, missing).output
    assert table_as_image.output.startswith(f"error: {table}: not a known image")


@pytest.mark.parametrize(
    ("computed", "published", "decimals"),
    [(1.0, 1.0, 4), (1.00004, 1.0, 4), (1.00006, 1.0, 3), (1.004, 1.0, 2), (1.006, 1.0, 1), (9, 1, 0), (np.nan, 1, 0)],
)
def test_agreed_decimals(computed: float, published: float, decimals: int) -> None:
    assert published_numbers.agreed_decimals(computed, published, 4) == decimals


def test_the_published_numbers_are_complete() -> None:
    content = json.loads(published_numbers.NUMBERS.read_text())
    assert set(content["models"]) <= set(ENTRIES)
    for model in content["models"].values():
        assert len(model["tokens"]) == len(model["values"]) == 3
        assert all(len(row) == 3 for row in model["values"])
        assert model["source"].startswith("transformers, tests/models/")
