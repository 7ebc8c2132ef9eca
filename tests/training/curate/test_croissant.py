"""Tests of the description of a dataset in Croissant. The package `mlcroissant` is not needed."""

import fnmatch
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.curate.curated import cats_and_dogs
from training.curate.manifest import read_manifest
from training.curate.tars import WriteSettings
from training.curate.write import write

NAMED = WriteSettings(shard_images=5, name="pets", license="https://example.org/licence")


def described(out: Path, settings: WriteSettings) -> dict[str, Any]:
    pool = cats_and_dogs()
    write(pool.outcome(held_out=["1/cats/03.jpg"]), pool.read, out, settings)
    content: dict[str, Any] = json.loads((out / "croissant.json").read_text())
    return content


def ids(node: Any, defined: bool) -> Iterator[str]:
    """Yield the ids that are defined in a description, or else those that it refers to."""
    if isinstance(node, dict):
        if "@id" in node and ("@type" in node) == defined:
            yield node["@id"]
        for name, value in node.items():
            if name != "@context":
                yield from ids(value, defined)
    elif isinstance(node, list):
        for value in node:
            yield from ids(value, defined)


@pytest.mark.parametrize("form", ["shards", "list"])
def test_every_file_is_described_and_every_reference_has_a_target(tmp_path: Path, form: str) -> None:
    content = described(tmp_path, WriteSettings(form, shard_images=5))  # type: ignore[arg-type]
    files = {file["name"]: file for file in content["distribution"] if file["@type"] == "cr:FileObject"}
    there = {path.name for path in tmp_path.iterdir() if path.suffix in (".tar", ".jsonl")}
    assert set(files) == there
    for name, file in files.items():
        data = (tmp_path / name).read_bytes()
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert file["contentSize"] == f"{len(data)} B"
        assert file["contentUrl"] == name
    defined = list(ids(content, True))
    assert len(defined) == len(set(defined))
    assert set(ids(content, False)) <= set(defined)
    digests = json.loads((tmp_path / "curation.json").read_text())["digests"]
    assert content["identifier"] == f"sha256:{digests['all']}"
    assert content["@type"] == "sc:Dataset"
    assert content["recordSet"][0]["data"] == [{"splits/name": "train"}, {"splits/name": "val"}]


def test_the_images_of_the_shards_join_their_lines_in_the_manifest(tmp_path: Path) -> None:
    content = described(tmp_path, NAMED)
    assert (content["name"], content["license"]) == ("pets", "https://example.org/licence")
    [images] = [part for part in content["distribution"] if part["@type"] == "cr:FileSet"]
    fields = {field["name"]: field for field in content["recordSet"][1]["field"]}
    samples = set()
    for shard in images["containedIn"]:
        with tarfile.open(tmp_path / shard["@id"]) as tar:
            for name in tar.getnames():
                if any(fnmatch.fnmatch(name, pattern) for pattern in images["includes"]):
                    match = re.search(fields["sample"]["source"]["transform"]["regex"], name)
                    assert match is not None
                    samples.add(match[1])
    assert samples == {entry.sample for entry in read_manifest(tmp_path)}
    assert fields["sample"]["references"] == {"fileObject": {"@id": "manifest.jsonl"}, "extract": {"column": "sample"}}
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {"key", "sha256", "part", "label"} <= set(fields) & set().union(*lines)


def test_texts_that_are_empty_are_left_out(tmp_path: Path) -> None:
    content = described(tmp_path, WriteSettings())
    assert "license" not in content
    assert content["description"] == "Images that dinov2 curate has selected."
