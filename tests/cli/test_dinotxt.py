"""Tests of the commands that add dino.txt to a model and use it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli import app
from tests.fakes import photo
from tests.model.dinotxt_files import write_artifact, write_sources


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "small")


def test_dinotxt_is_added_used_listed_and_deleted(model: Path, tmp_path: Path) -> None:
    sources, image = write_sources(tmp_path), tmp_path / "image.png"
    image.write_bytes(photo(size=(90, 60)))
    where = ("--model", model, "--data-dir", tmp_path)
    words = ("words", image, "--words", "cat,red apple", "--templates", "none", *where)
    before = run(*words)
    assert (before.exit_code, "dinov2 heads add-dinotxt" in before.stderr) == (2, True)

    added = run("heads", "add-dinotxt", *sources, *where)
    assert added.exit_code == 0, added.output
    assert f"-> {model / 'heads' / 'dinotxt'}" in added.stdout
    again = run("heads", "add-dinotxt", *sources, *where)
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    assert run("heads", "add-dinotxt", *sources, "--replace", *where).exit_code == 0
    files = (sources.text_encoder, sources.vision_head, sources.vocabulary)
    swapped = run("heads", "add-dinotxt", *files, "--replace", *where)
    assert (swapped.exit_code, "this is a vision head" in swapped.stderr) == (2, True)

    assert "dinotxt                      words           dino.txt" in run("heads", "list", *where).stdout
    assert json.loads(run("heads", "list", "--json", *where).stdout)[0]["name"] == "dinotxt"

    answer = json.loads(run(*words).stdout)
    assert {each["word"] for each in answer["words"]} == {"cat", "red apple"}
    assert run(*words, "-o", tmp_path / "labels.png").exit_code == 0
    assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")

    assert run("heads", "delete", "dinotxt", *where).exit_code == 0
    assert not (model / "heads" / "dinotxt").exists()
    gone = run("heads", "delete", "dinotxt", *where)
    assert (gone.exit_code, "no head named 'dinotxt'" in gone.stderr) == (2, True)
