"""Tests of `dinov2 keys` and `dinov2 originals`."""

import asyncio
import hashlib
import json
import os
import re
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import cli
from service.features.patch_store import PatchStore
from service.keys import KeyStore, key_id_of
from service.originals import Originals, source_of
from service.search.embedded import EmbeddedStore
from service.search.store import CollectionSpec, Item

runner = CliRunner()


def invoke(*words: object) -> Result:
    return runner.invoke(cli.app, [str(word) for word in words])


def rows(folder: Path) -> list[dict]:
    return json.loads(invoke("keys", "list", "--json", "--data-dir", folder).stdout)


def test_a_key_is_created_listed_rotated_and_revoked(tmp_path: Path) -> None:
    made = invoke("keys", "create", "shop", "--scopes", "read, WRITE", "--expires", "90d", "--data-dir", tmp_path)
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    key_id = key_id_of(key.encode())
    assert key_id is not None
    assert f"key {key_id} of shop for {tmp_path}: read, write; expires 20" in made.stderr
    assert key not in made.stderr
    [row] = rows(tmp_path)
    assert (row["id"], row["name"], row["scopes"], row["state"]) == (key_id, "shop", ["read", "write"], "valid")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["expires"])
    assert row["last_used"] is row["revoked"] is None

    rotated = invoke("keys", "rotate", "shop", "--overlap", "1h", "--data-dir", tmp_path)
    assert rotated.exit_code == 0, rotated.output
    assert f"the key {key_id} expires 20" in rotated.stderr
    assert [row["scopes"] for row in rows(tmp_path)] == [["read", "write"]] * 2

    revoked = invoke("keys", "revoke", key, "--data-dir", tmp_path)
    assert revoked.stdout == f"revoked the key {key_id} of shop\n"
    assert [row["state"] for row in rows(tmp_path)] == ["revoked", "valid"]
    table = invoke("keys", "list", "--data-dir", tmp_path).stdout
    assert re.search(rf"^{key_id}  shop  read,write +revoked  20\S+Z  never$", table, re.MULTILINE)
    assert key not in table


def test_without_options_a_key_only_reads_and_never_expires(tmp_path: Path) -> None:
    made = invoke("keys", "create", "reader", "--data-dir", tmp_path / "new")
    assert "read; never expires" in made.stderr
    assert rows(tmp_path / "new")[0]["expires"] is None


def test_an_overlap_of_zero_ends_the_old_key_at_once(tmp_path: Path) -> None:
    invoke("keys", "create", "a", "--data-dir", tmp_path)
    invoke("keys", "rotate", "a", "--overlap", "0s", "--data-dir", tmp_path)
    assert [row["state"] for row in rows(tmp_path)] == ["expired", "valid"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "a b"], "name 'a b' is not allowed"),
        (["create", "a", "--scopes", "root"], "scopes must be one or more of read, write, admin, not 'root'"),
        (["create", "a", "--scopes", ","], "not none"),
        (["create", "a", "--expires", "soon"], "--expires 'soon' is not a time: write a number and s, m, h or d"),
        (["create", "a", "--expires", "0d"], "after more than 0 s"),
        (["rotate", "a", "--overlap", "-1d"], "--overlap '-1d' is not a time"),
        (["rotate", "nobody"], "no valid key is named 'nobody'; valid keys are named: there"),
        (["revoke", "nobody"], "there is no key with the id 'nobody'"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path: Path, words: list[str], message: str) -> None:
    KeyStore(tmp_path).create("there", ["read"])
    said = invoke("keys", *words, "--data-dir", tmp_path)
    assert said.exit_code == 2
    assert message in said.stderr
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("words", [["list"], ["revoke", "a"], ["rotate", "a"]])
def test_a_mistyped_folder_is_noticed(tmp_path: Path, words: list[str]) -> None:
    said = invoke("keys", *words, "--data-dir", tmp_path / "mistyped")
    assert said.exit_code == 2
    assert "no API key was created in" in said.stderr
    assert not (tmp_path / "mistyped").exists()


# Stored images


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """The digests of two stored images, of which an item needs the first."""
    originals = Originals(tmp_path / "originals")

    async def fill() -> list[str]:
        store = EmbeddedStore(tmp_path, threads=1, interval_s=60.0)
        digests = [await originals.put(data) for data in (b"first", b"other")]
        tag = "e" * 64 + "/cls/l2/224x224/fp32"
        await store.create("shop", CollectionSpec(tag, 8, originals=True))
        await store.upsert("shop", [Item("a", np.ones(8, np.float32), {}, source_of(digests[0]))], tag=tag)
        await store.close()
        return digests

    digests = asyncio.run(fill())
    with closing(PatchStore(tmp_path / "patches" / "patches.sqlite3", 2**24)) as patches:
        patches.set_many({f"{digest}/model": b"features" for digest in digests})
    for digest in digests:
        os.utime(tmp_path / "originals" / digest[:2] / digest[2:4] / digest, (time.time() - 2 * 86_400,) * 2)
    return digests


def stored(folder: Path) -> set[str]:
    """Return the digests of the stored images, which must be those with stored patch features."""
    digests = {path.name for path in (folder / "originals").rglob("*") if path.is_file()}
    with closing(PatchStore(folder / "patches" / "patches.sqlite3", 2**24)) as patches:
        keys = {f"{hashlib.sha256(data).hexdigest()}/model" for data in (b"first", b"other")}
        assert patches.stored(list(keys)) == {f"{digest}/model" for digest in digests}
    return digests


def test_images_that_no_item_needs_are_erased(tmp_path: Path, images: list[str]) -> None:
    counted = invoke("originals", "erase", "--unreferenced", "--dry-run", "--data-dir", tmp_path)
    assert counted.stdout == "1 image would be erased, 5 bytes\n"
    assert stored(tmp_path) == set(images)
    assert invoke("originals", "erase", "--unreferenced", "--data-dir", tmp_path).stdout == "1 image erased, 5 bytes\n"
    assert stored(tmp_path) == {images[0]}
    assert invoke("originals", "erase", "--unreferenced", "--data-dir", tmp_path).stdout == "0 images erased, 0 bytes\n"


def test_a_named_image_is_erased_with_its_items_if_told_so(tmp_path: Path, images: list[str]) -> None:
    refused = invoke("originals", "erase", images[0], "--data-dir", tmp_path)
    assert refused.exit_code == 2
    assert f"the item 'a' of 'shop' refers to the image {images[0]}" in refused.stderr
    assert stored(tmp_path) == set(images)
    erased = invoke("originals", "erase", images[0].upper(), "--items", "delete", "--data-dir", tmp_path)
    assert erased.stdout == f"shop: a deleted\nerased the image {images[0]}, 5 bytes\n"
    assert stored(tmp_path) == {images[1]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either the sha256 of an image or --unreferenced"),
        (["0" * 64, "--unreferenced"], "give either the sha256 of an image or --unreferenced"),
        (["0" * 64, "--dry-run"], "--dry-run needs --unreferenced"),
        (["../../etc/passwd"], "is not the sha256 of an image"),
        (["0" * 64], "is not stored"),
    ],
)
def test_what_cannot_be_erased(tmp_path: Path, images: list[str], words: list[str], message: str) -> None:
    said = invoke("originals", "erase", *words, "--data-dir", tmp_path)
    assert said.exit_code == 2
    assert message in said.stderr
    assert stored(tmp_path) == set(images)
