"""Tests of `dinov2 backup` and `dinov2 restore` on real stores."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import cli
from model.artifact import bundled_artifact, read_manifest
from service.originals import Originals, source_of
from service.search.embedded import EmbeddedStore
from service.search.store import CollectionSpec, Item
from tests.fakes import photo

runner = CliRunner()


def invoke(*words: object) -> Result:
    return runner.invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with two collections: one of the bundled model with an image, and one of an unknown model."""
    folder = tmp_path / "data"

    async def fill() -> None:
        store, originals = EmbeddedStore(folder, threads=1, interval_s=60.0), Originals(folder / "originals")
        known = f"{read_manifest(bundled_artifact()).fingerprint}/cls/l2/224x224/fp32"
        for name, tag in (("shop", known), ("old", "e" * 64 + "/cls/l2/224x224/fp32")):
            await store.create(name, CollectionSpec(tag, 8, originals=name == "shop"))
            source = source_of(await originals.put(photo(1))) if name == "shop" else None
            await store.upsert(name, [Item("a", np.ones(8, np.float32), {}, source)], tag=tag)
        await store.set_alias("live", "shop")
        await store.close()

    asyncio.run(fill())
    return folder


def test_backup_and_restore(data: Path, tmp_path: Path) -> None:
    said = invoke("backup", tmp_path / "backup", "--data-dir", data)
    assert said.exit_code == 0, said.output
    assert "2 collections, 2 items, 1 aliases" in said.stdout
    assert "images: 1 copied, 0 already there\n" in said.stdout
    artifacts = json.loads((tmp_path / "backup" / "backup.json").read_text())["artifacts"]
    assert artifacts[-1]["fingerprint"] == read_manifest(bundled_artifact()).fingerprint
    said = invoke("restore", tmp_path / "backup", "--data-dir", tmp_path / "elsewhere")
    assert said.exit_code == 0, said.output
    assert "restored shop, 1 items" in said.stdout
    assert "no local model has the fingerprint eeeeeeee, which made the vectors of old" in said.output
    assert "2608a6a3" not in said.output
    rows = json.loads(invoke("collections", "list", "--json", "--data-dir", tmp_path / "elsewhere").stdout)
    assert {row["name"]: row["aliases"] for row in rows} == {"old": [], "shop": ["live"]}
    assert list((tmp_path / "elsewhere" / "originals").glob("*/*/*"))


def test_restore_needs_a_flag_to_replace(data: Path, tmp_path: Path) -> None:
    assert invoke("backup", tmp_path / "backup", "--data-dir", data).exit_code == 0
    said = invoke("restore", tmp_path / "backup", "--data-dir", data)
    assert said.exit_code == 2
    assert "'shop' is a collection already; --replace replaces collections with collections" in said.output
    said = invoke("restore", tmp_path / "backup", "--data-dir", data, "--replace")
    assert said.exit_code == 0, said.output


def test_a_damaged_image_is_reported(data: Path, tmp_path: Path) -> None:
    [image] = (data / "originals").glob("*/*/*")
    image.write_bytes(b"other")
    said = invoke("backup", tmp_path / "backup", "--data-dir", data)
    assert said.exit_code == 1
    assert "1 image was left out because of a read error" in said.output


def test_what_cannot_be_backed_up_is_an_error(tmp_path: Path) -> None:
    said = invoke("backup", tmp_path / "backup", "--data-dir", tmp_path / "nothing")
    assert (said.exit_code, "no vector store in" in said.output) == (2, True)
    assert not (tmp_path / "backup").exists()
    said = invoke("restore", tmp_path / "nothing", "--data-dir", tmp_path / "data")
    assert (said.exit_code, "contains no backup" in said.output) == (2, True)
    assert not (tmp_path / "data").exists()
