"""Tests of `dinov2 classify` with the bundled model and the embedded store."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import cli
from cli import classify
from service.retrieval import class_schemas

COLOURS = {"red": (200, 40, 30), "green": (40, 180, 60)}


def picture(colour: tuple[int, int, int], number: int) -> bytes:
    """Return an image of one colour with a little noise."""
    noise = np.random.default_rng(number).integers(-30, 31, (48, 48, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ten images of each class, and with the images to classify."""
    root = tmp_path_factory.mktemp("classify")
    for name, colour in COLOURS.items():
        (root / "photos" / name).mkdir(parents=True)
        for number in range(10):
            (root / "photos" / name / f"{number}.png").write_bytes(picture(colour, number))
    (root / "new.png").write_bytes(picture(COLOURS["green"], 77))
    stripes = np.zeros((48, 48, 3), np.uint8)
    stripes[::6] = stripes[1::6] = 255
    Image.fromarray(stripes).save(root / "strange.png")
    (root / "torn.png").write_bytes(picture(COLOURS["red"], 1)[:60])
    result = CliRunner().invoke(
        cli.app,
        ["index", f"{root}/photos", "-c", "shop", "--folders-as", "class", "--data-dir", f"{root}/data"],
    )
    assert "20 indexed" in result.output, result.output
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(folder)

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(cli.app, ["classify", *map(str, words), "--data-dir", f"{folder}/data"])

    return invoke


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_by_a_collection(run: Callable[..., Result]) -> None:
    words = ("new.png", "strange.png", "-c", "shop", "--label", "class", "--error-rate", 0.1, "-k", 3)
    shown = answer(run(*words, "--json"))
    assert [(row["image"], row["label"], row["unknown"]) for row in shown["data"]] == [
        ("new.png", "green", False),
        ("strange.png", None, True),
    ]
    assert [neighbour["id"].split("/")[0] for neighbour in shown["data"][0]["neighbours"]] == ["green"] * 3
    assert (shown["calibration"]["items"], shown["calibration"]["promised"]) == (20, True)
    table = run(*words).stdout.splitlines()
    assert table[0].split() == ["image", "p-value", "score", "class"]
    assert table[1].split()[0::3] == ["new.png", "green"]
    assert "unknown (nearest: " in table[2]


def test_filters(run: Callable[..., Result]) -> None:
    red = '{"field": "id", "prefix": "red/"}'
    words = ("new.png", "-c", "shop", "--label", "class", "--json")
    assert answer(run(*words, "--filter", red))["data"][0]["scores"] == [{"label": "red", "score": 1}]
    held_out = answer(run(*words, "--calibration-filter", red))
    assert (held_out["calibration"]["method"], held_out["calibration"]["items"]) == ("held-out", 10)


def test_by_examples(run: Callable[..., Result]) -> None:
    folders = ("--example", "rot=photos/red", "--example", "gruen=photos/green")
    shown = answer(run("new.png", "strange.png", *folders, "--error-rate", 0.1, "--json", "--top", 1))
    assert [(row["label"], row["unknown"]) for row in shown["data"]] == [("gruen", False), (None, True)]
    assert [len(row["scores"]) for row in shown["data"]] == [1, 1]
    assert shown["calibration"]["items"] == 20
    few = run("new.png", "--example", "a=photos/red/1.png", "--example", "a=photos/red/2.png", "--pooling", "mean")
    assert few.exit_code == 0, few.output
    assert few.stdout.splitlines()[1].split()[-1] == "a"
    assert "2 known images are too few for the error rate 0.05" in few.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new.png"], "exactly one of --collection and --example"),
        (["new.png", "-c", "shop", "--label", "class", "--example", "a=new.png"], "exactly one of"),
        (["new.png", "-c", "shop"], "--label is missing"),
        (["new.png", "-c", "shop", "--label", "colour"], "no item of collection 'shop' has"),
        (["new.png", "-c", "none", "--label", "class"], "there is no collection 'none'"),
        (["new.png", "-c", "shop", "--label", "class", "--pooling", "mean"], "--pooling is only possible"),
        (["new.png", "-c", "shop", "--label", "class", "--filter", "{"], "--filter is not JSON"),
        (["new.png", "-c", "shop", "--label", "class", "-k", "101"], "Invalid value for '-k'"),
        (["new.png", "-c", "shop", "--label", "class", "--error-rate", "0.6"], "Invalid value for '--error-rate'"),
        (["none.png", "-c", "shop", "--label", "class"], "none.png"),
        (["torn.png", "-c", "shop", "--label", "class"], "torn.png: "),
        (["new.png", "--example", "new.png"], "--example 'new.png' is not NAME=PATH"),
        (["new.png", "--example", "a=none.png"], "none.png: no such file or folder"),
        (["new.png", "--example", "a=torn.png"], "torn.png: "),
        (["new.png", "--example", "a=new.png", "--label", "class", "-k", "2"], "--label and -k: only possible with"),
    ],
)
def test_it_says_what_is_wrong(run: Callable[..., Result], words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", "").split())


def test_the_limits_are_those_of_the_service() -> None:
    assert (classify.MAX_K, classify.ERROR_RATES) == (class_schemas.MAX_K, class_schemas.ERROR_RATES)
