"""Tests of `dinov2 index`, `search` and `collections`, on a store that keeps its items between invocations."""

import json
import os
import shlex
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import cli
from cli import collection as cli_collections
from model.artifact import read_manifest
from service.originals import Originals
from service.search.store import CollectionInfo, SnapshotInfo
from service.settings import Settings, load_settings
from tests.dict_store import DictStore
from tests.fakes import DIMS, FakeEngine, fake_artifact, photo

TAG = f"{'a' * 64}/cls/l2/28x28/fp32"


class KeptStore(DictStore):
    """A store that remains usable after `close`, with the abilities of the embedded store."""

    capabilities = frozenset({"snapshots", "stats"})

    async def close(self) -> None:
        return

    async def snapshot(self, collection: str) -> SnapshotInfo:
        info = await self.info(collection)
        self.kept = replace(self._resolve(collection)[1], items=dict(self._resolve(collection)[1].items))
        return SnapshotInfo("s1", collection, "2026-01-01T00:00:00+00:00", 1000, info.count)

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        return [await self.snapshot(collection)]

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        await self.create(collection, self.kept.spec)
        self._collections[collection] = self.kept
        return await self.info(collection)

    async def stats(self, collection: str) -> dict[str, Any]:
        return {"count": await self.count(collection), "kind": "flat"}


class Kept:
    """The collaborators that all invocations in one test share."""

    def __init__(self) -> None:
        self.stores: dict[str, KeptStore] = {}
        self.engine = FakeEngine(precision="fp32")
        self.photos: list[bytes] = []

    def store(self, name: str = "embedded") -> KeptStore:
        return self.stores.setdefault(name, KeptStore())

    def invoke(self, *words: object, **options: Any) -> Result:
        return CliRunner().invoke(cli.app, [str(word) for word in words], **options)

    def ok(self, *words: object, **options: Any) -> str:
        result = self.invoke(*words, **options)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, *words: object) -> str:
        result = self.invoke(*words)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.replace("│", "").split())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept()

    def settings(given: dict[str, Any]) -> Settings:
        known = {name: value for name, value in given.items() if name in Settings.model_fields}
        chosen = load_settings(known)
        return chosen.model_copy(
            update={"vector_store": given.get("vector_store", "embedded"), "originals_url": None},
        )

    async def open_store(chosen: Any) -> KeptStore:
        return found.store(chosen.vector_store)

    class Recorded(Originals):
        async def put(self, data: bytes) -> str:
            found.photos.append(data)
            return await super().put(data)

    opening = ModuleType("service.search.opening")
    opening.open_store = open_store  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "service.search.opening", opening)
    monkeypatch.setattr("service.originals.Originals", Recorded)
    monkeypatch.setattr("service.settings.load_settings", settings)
    monkeypatch.setattr("service.artifact_choice.choose_artifact", lambda model, data_dir: Path("artifact"))
    monkeypatch.setattr("model.artifact.load_artifact", lambda path, derived_dir: fake_artifact())
    monkeypatch.setattr(
        "model.artifact.read_manifest",
        lambda path: fake_artifact().manifest if path == Path("artifact") else read_manifest(path),
    )
    monkeypatch.setattr("model.engines.choice.load_engine", lambda artifact, name, threads: found.engine)
    monkeypatch.setenv("DINOV2_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "search.sqlite3").touch()  # what reads asks for it
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.png", "deep/c.png"]):
        (folder / name).write_bytes(photo(index))
    (folder / "a.json").write_text('{"brand": "Arla"}')
    return folder


@pytest.fixture
def torn(photos: Path) -> Path:
    """Add an unreadable file to the folder of images, and return its path."""
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
    return photos / "torn.jpg"


def test_every_option_and_command_has_help(kept: Kept) -> None:
    group = typer.main.get_command(cli_collections.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert kept.invoke("collections", name, "--help").exit_code == 0
        assert command.help
        assert [parameter.name for parameter in command.params if not parameter.help] == []


def test_index_then_search(kept: Kept, photos: Path) -> None:
    said = kept.ok("index", photos, "--collection", "shop", "--metadata", "shop=7", "--metadata", "city=Umeå")
    assert "3 indexed, 0 already there, 0 failed -> shop" in said
    assert "left out" not in said
    item = kept.store()._collections["shop"].items["a.png"]
    assert {key: item.metadata[key] for key in ("brand", "shop", "city")} == {
        "brand": "Arla",
        "shop": 7,
        "city": "Umeå",
    }
    said = kept.ok("search", photos / "b.png", "-c", "shop", "-k", 2)
    lines = said.splitlines()
    assert lines[0].split() == ["score", "id", "source"]
    assert lines[1].split() == ["1.0000", "b.png", str(photos / "b.png")]
    assert len(lines) == 3
    where = '{"key": "brand", "eq": "Arla"}'
    hits = json.loads(kept.ok("search", photos / "b.png", "-c", "shop", "--json", "--filter", where))
    assert [(hit["id"], hit["metadata"]["brand"], hit["source"]) for hit in hits] == [
        ("a.png", "Arla", str(photos / "a.png"))
    ]
    assert "3 already there" in kept.ok("index", photos, "-c", "shop")


def test_photos_left_out_are_listed_counted_and_exit_status_1(
    kept: Kept, photos: Path, torn: Path, tmp_path: Path
) -> None:
    result = kept.invoke("index", photos, "-c", "shop")
    assert result.exit_code == 1
    assert "3 indexed, 0 already there, 1 failed -> shop" in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"failed {torn}: the JPEG is damaged")
    assert lines[-1] == "1 image was left out: see the list above; --errors FILE saves the whole list"
    assert kept.store()._collections["shop"].items.keys() == {"a.png", "b.png", "deep/c.png"}
    for index in range(25):
        (photos / f"{index}.jpg").write_bytes(b"")
    result = kept.invoke("index", photos, "-c", "shop")  # the good ones are there already
    assert (result.exit_code, result.stderr.count("failed ")) == (1, 20)
    assert result.stderr.splitlines()[-1] == (
        "26 images were left out: the first 20 are listed above; --errors FILE saves the whole list"
    )
    errors = tmp_path / "errors.jsonl"
    result = kept.invoke("index", photos, "-c", "shop", "--errors", errors)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"26 images were left out: see the list in {errors}"
    rows = [json.loads(line) for line in errors.read_text().splitlines()]
    assert len(rows) == 26
    assert rows[0].keys() == {"source", "reason"}


def test_index_exit_status(kept: Kept, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = kept.invoke("index", tmp_path / "empty", "-c", "shop")
    assert (result.exit_code, "0 indexed" in result.output) == (1, True)
    assert kept.invoke("index", photos, "-c", "shop").exit_code == 0
    assert kept.invoke("index", photos, "-c", "shop").exit_code == 0
    assert kept.invoke("index", tmp_path / "none", "-c", "shop").exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["NONE", "-c", "shop"], "no such file or folder"),
        (["PHOTOS", "-c", "Not Allowed"], "is not allowed"),
        (["PHOTOS", "-c", "shop", "--metadata", "novalue"], "is not key=value"),
        (["PHOTOS", "-c", "shop", "--errors", "NONE/x"], "No such file or directory"),
        (["PHOTOS"], "Missing option"),
        (["PHOTOS", "-c", "means", "--pooling", "cls"], "holds mean vectors, not cls"),
        (["PHOTOS", "-c", "means", "--originals"], "stores no images"),
        (["PHOTOS", "-c", "other"], "cannot be compared"),
        (["PHOTOS", "-c", "foreign"], "no local model makes"),
        (["PHOTOS/a.json", "-c", "shop"], "a list must be a .jsonl file"),
        (["PHOTOS/a.png", "-c", "shop", "--prune"], "is not a folder"),
        (["PHOTOS", "-c", "shop", "--prune", "--id", "sha256"], "--prune needs --id path"),
        (["PHOTOS", "-c", "shop", "--folders-as", "a//b"], "separated by slashes"),
    ],
)
def test_index_says_what_is_wrong(kept: Kept, photos: Path, words: list[str], said: str) -> None:
    kept.ok("collections", "create", "means", "--pooling", "mean")
    kept.ok("collections", "create", "other", "--tag", TAG.replace("a", "b"), "--dimension", DIMS)
    kept.ok("collections", "create", "foreign", "--tag", "mine", "--dimension", DIMS)
    places = {"PHOTOS": str(photos), "NONE": str(photos / "none"), "NONE/x": str(photos / "none" / "x")}
    places |= {f"PHOTOS/{name}": str(photos / name) for name in ("a.json", "a.png")}
    assert said in kept.refused("index", *(places.get(word, word) for word in words))
    assert not kept.engine.batches


def test_prune_removes_items_whose_file_is_gone(kept: Kept, photos: Path) -> None:
    kept.ok("index", photos, "-c", "shop")
    (photos / "b.png").unlink()
    words = ("index", photos, "-c", "shop", "--prune")
    said = kept.ok(*words, input="n\n")
    assert "Remove 1 of 3 items, whose files no longer exist (b.png)?" in said
    assert "0 removed from shop" in said
    assert kept.invoke(*words, input="").exit_code == 1  # nobody answers
    assert len(kept.store()._collections["shop"].items) == 3
    said = kept.ok(*words, "--yes")
    assert "1 removed from shop, because their files no longer exist" in said
    assert said.splitlines()[-1] == "3 files: 2 used, 1 ignored (1 .json), 0 failed"
    assert kept.store()._collections["shop"].items.keys() == {"a.png", "deep/c.png"}
    assert "0 removed" in kept.ok(*words)  # no question


def test_prune_does_not_empty_a_collection_when_a_folder_is_not_mounted(kept: Kept, photos: Path) -> None:
    kept.ok("index", photos, "-c", "shop")
    for path in photos.rglob("*.*"):
        path.unlink()
    result = kept.invoke("index", photos, "-c", "shop", "--prune", "--yes")
    assert result.exit_code == 1
    assert f"nothing was removed from {photos}: no image was found, so it may not be mounted" in result.stderr
    assert len(kept.store()._collections["shop"].items) == 3
    assert f"there are no images in {photos}" in result.stderr


def test_prune_keeps_the_items_of_a_source_that_is_not_mounted(kept: Kept, photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "d.png").write_bytes(photo(3))
    kept.ok("index", photos, disk, "-c", "shop")
    (disk / "d.png").unlink()
    (disk / "not-mounted.txt").write_text("")
    (photos / "b.png").unlink()
    said = kept.ok("index", photos, disk, "-c", "shop", "--prune", "--yes")
    assert f"nothing was removed from {disk}: no image was found, so it may not be mounted" in said
    assert kept.store()._collections["shop"].items.keys() == {"a.png", "deep/c.png", "d.png"}


def test_prune_looks_for_the_files_again_after_the_answer(
    kept: Kept, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.ok("index", photos, "-c", "shop")
    (photos / "a.png").unlink()
    (photos / "b.png").unlink()

    def confirm(question: str) -> bool:
        (photos / "b.png").write_bytes(photo(1))
        return True

    monkeypatch.setattr(typer, "confirm", confirm)
    assert "1 removed from shop" in kept.ok("index", photos, "-c", "shop", "--prune")
    assert kept.store()._collections["shop"].items.keys() == {"b.png", "deep/c.png"}


def test_folders_become_metadata_and_a_list_has_its_own(kept: Kept, photos: Path) -> None:
    kept.ok("index", photos, "-c", "shop", "--folders-as", "shelf/part", "--metadata", "part=x")
    items = kept.store()._collections["shop"].items
    found = {key: {name: item.metadata.get(name) for name in ("shelf", "part")} for key, item in items.items()}
    assert found == {name: {"shelf": "deep" if "/" in name else None, "part": "x"} for name in items}


def test_index_follows_the_collection(kept: Kept, photos: Path, tmp_path: Path) -> None:
    kept.ok("collections", "create", "means", "--pooling", "cls+mean", "--originals")
    kept.ok("index", photos, "-c", "means")
    assert len(kept.photos) == 3
    assert len(files(tmp_path / "data" / "originals")) == 3
    assert kept.store()._collections["means"].spec.dimension == 2 * DIMS
    kept.ok("index", photos, "-c", "means", "--no-originals", "--force")
    assert len(kept.photos) == 3
    kept.ok("index", photos, "-c", "new", "--originals", "--id", "sha256")
    assert kept.store()._collections["new"].spec.originals
    assert len(kept.photos) == 6


def test_ctrl_c_keeps_what_was_written(kept: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.png").write_bytes(photo(index))
    run = kept.engine.run

    def interrupted(pixels: Any) -> Any:
        if len(kept.engine.batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return run(pixels)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        before = signal.getsignal(signal.SIGINT)
        kept.engine.run = interrupted  # type: ignore[method-assign]
        result = kept.invoke("index", folder, "-c", "shop", "--batch-size", 4)
        assert result.exit_code == 130
        assert "run again to resume" in result.output
        assert 0 < len(kept.store()._collections["shop"].items) == kept.engine.images < 60
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_search_says_what_is_wrong(kept: Kept, photos: Path) -> None:
    kept.ok("index", photos, "-c", "shop")
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
    assert "there is no collection 'none'" in kept.refused("search", photos / "a.png", "-c", "none")
    missing = CliRunner().invoke(cli.app, ["search", str(photos / "none.png"), "-c", "shop"])
    assert missing.output == f"error: {photos / 'none.png'}: No such file or directory\n"
    assert "torn.jpg: the JPEG is damaged" in kept.refused("search", photos / "torn.jpg", "-c", "shop")
    assert "--filter is not JSON" in kept.refused("search", photos / "a.png", "-c", "shop", "--filter", "{")
    assert "filter:" in kept.refused("search", photos / "a.png", "-c", "shop", "--filter", "{}")


def test_collections_from_their_making_to_their_end(kept: Kept, photos: Path) -> None:
    made = json.loads(
        kept.ok(
            *("collections", "create", "shop", "--dtype", "float16", "--kind", "hnsw", "--m", 16),
            *("--indexed", "brand", "--indexed", "shelf.row", "--target-recall", 0.9),
        )
    )
    assert (made["tag"], made["dimension"], made["dtype"]) == (TAG, DIMS, "float16")
    assert made["indexed"] == ["brand", "shelf.row"]
    assert made["index"]["m"] == 16
    kept.ok("index", photos, "-c", "shop")
    assert kept.ok("collections", "alias", "live", "shop").strip() == "live -> shop"
    [row] = json.loads(kept.ok("collections", "list", "--json"))
    assert (row["name"], row["count"], row["aliases"]) == ("shop", 3, ["live"])
    assert kept.ok("collections", "list").splitlines()[1].split() == ["shop", "3", str(DIMS), "aaaaaaaa", "cls", "live"]
    assert json.loads(kept.ok("collections", "show", "live"))["name"] == "shop"
    assert json.loads(kept.ok("collections", "stats", "shop")) == {"count": 3, "kind": "flat"}
    assert kept.ok("collections", "snapshot", "shop").startswith("s1  2026-01-01")
    assert "3 items" in kept.ok("collections", "snapshot", "shop", "--list")
    assert "restored again, 3 items" in kept.ok("collections", "restore", "shop", "s1", "--as", "again")
    assert "live -> again (was shop)" in kept.ok("collections", "alias", "live", "again")
    assert "is or has an alias" in kept.refused("collections", "drop", "again", "--yes")
    assert "dropped live" in kept.ok("collections", "alias", "live", "--drop")
    assert kept.invoke("collections", "drop", "again", input="n\n").exit_code == 1
    assert "Drop again with its 3 items?" in kept.ok("collections", "drop", "again", input="y\n")
    assert "dropped shop, 3 items" in kept.ok("collections", "drop", "shop", "--yes")
    assert json.loads(kept.ok("collections", "list", "--json")) == []


def test_collections_say_what_is_wrong(kept: Kept) -> None:
    assert "must be given together" in kept.refused("collections", "create", "shop", "--tag", "x")
    assert "either the collection" in kept.refused("collections", "alias", "live")
    assert "another name" in kept.refused("collections", "copy", "shop")
    assert "no collection" in kept.refused("collections", "show", "none")
    assert "indexed: a key must be" in kept.refused("collections", "create", "shop", "--indexed", "")
    for words, said in [
        (["--m", 1], "index.m=1 is not allowed: a whole number, 2 to 256"),
        (["--ef-construction", 3], "index.ef_construction=3 is not allowed: a whole number, 4 to 4,096"),
        (["--n-lists", 2**21], "index.n_lists=2097152 is not allowed: a whole number, 1 to 1,048,576"),
        (["--target-recall", 0.4], "index.target_recall=0.4 is not allowed: a number, 0.5 to 1.0"),
        (["--target-recall", "nan"], "index.target_recall=nan is not allowed"),
        (["--tag", "x", "--dimension", 8193], "dimension=8193 is not allowed: a whole number, 1 to 8,192"),
        (["--tag", "x" * 257, "--dimension", 8], "is not allowed: 1 to 256 printable characters"),
        ([word for key in range(17) for word in ("--indexed", f"k{key}")], "is not allowed: up to 16 metadata keys"),
    ]:
        assert said in kept.refused("collections", "create", "shop", *words)
    assert kept.store()._collections == {}
    made = json.loads(kept.ok("collections", "create", "keys", "--indexed", "b", "--indexed", "a", "--indexed", "b"))
    assert made["indexed"] == ["a", "b"]  # as over REST, so that both mean the same collection
    kept.store().capabilities = frozenset({"atomic_upsert"})  # type: ignore[misc]
    assert "does not support snapshots; it supports atomic_upsert" in kept.refused("collections", "snapshot", "shop")
    assert "does not support stats" in kept.refused("collections", "stats", "shop")


def test_copy_between_stores(kept: Kept, photos: Path) -> None:
    kept.ok("index", photos, "-c", "shop")
    words = ("collections", "copy", "shop", "--from-store", "embedded", "--to-store", "milvus://host:19530")
    assert "3 copied, 0 already there -> shop, 3 items" in kept.ok(*words)
    assert "0 copied, 3 already there -> shop, 3 items" in kept.ok(*words)
    assert kept.store("milvus://host:19530")._collections["shop"].items.keys() == {"a.png", "b.png", "deep/c.png"}
    assert "3 copied" in kept.ok("collections", "copy", "shop", "--as", "twin")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_copy_takes_the_stored_photos_along(kept: Kept, photos: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "data" / "originals", tmp_path / "elsewhere" / "originals"
    kept.ok("index", photos, "-c", "shop", "--originals")
    assert "images" not in kept.ok("collections", "copy", "shop", "--as", "twin")  # one place
    words = ("collections", "copy", "shop", "--to-store", f"embedded:{tmp_path / 'elsewhere'}")
    assert "images: 3 copied, 0 already there\n" in kept.ok(*words)
    assert files(there) == files(here)
    stored = [path for path in here.rglob("*") if path.is_file()]
    stored[0].unlink()
    stored[1].write_bytes(b"damaged")
    other = (*words, "--to-originals", tmp_path / "third")
    result = kept.invoke(*other)
    assert result.exit_code == 1
    assert "images: 1 copied, 0 already there, 1 not stored at the source\n" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("1 image was left out because of a read error at the source: the stored image ")
    assert files(tmp_path / "third") == [stored[2].name]
    assert "images: 0 copied, 1 already there, 1 not" in kept.invoke(*other).stdout


def test_a_copy_of_a_collection_without_photos_copies_none(kept: Kept, photos: Path, tmp_path: Path) -> None:
    kept.ok("index", photos, "-c", "shop")
    words = ("collections", "copy", "shop", "--as", "twin", "--to-originals", tmp_path / "third")
    assert "images" not in kept.ok(*words)
    assert "originals_url: nowhere cannot be opened" in kept.refused(*words[:-1], "nowhere://x")


@pytest.mark.parametrize("suffix", ["parquet", "npz", "jsonl"])
def test_export_and_import(kept: Kept, photos: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="the extra `parquet`")
    kept.ok("index", photos, "-c", "shop")
    out = tmp_path / f"shop.{suffix}"
    assert f"3 items -> {out}" in kept.ok("collections", "export", "shop", "--out", out)
    assert "3 imported -> again, 3 items" in kept.ok("collections", "import", out, "--collection", "again")
    one, two = (kept.store()._collections[name] for name in ("shop", "again"))
    assert one.spec == two.spec
    for item_id, item in one.items.items():
        other = two.items[item_id]
        assert (item.metadata, item.source, item.digest) == (other.metadata, other.source, other.digest)
        np.testing.assert_allclose(item.vector, other.vector, atol=1e-7)


def test_export_and_import_say_what_is_wrong(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.ok("collections", "create", "shop")
    assert "must end in one of" in kept.refused("collections", "export", "shop", "--out", tmp_path / "x.csv")
    assert "does not exist" in kept.refused("collections", "export", "shop", "--out", tmp_path / "no" / "x.npz")
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]), vectors=np.ones((1, DIMS), np.float32))
    words = ("collections", "import", tmp_path / "x.npz", "-c", "shop")
    assert "--tag or --fingerprint" in kept.refused(*words)
    assert "not both" in kept.refused(*words, "--tag", TAG, "--fingerprint", "a")
    assert "no local model" in kept.refused(*words, "--fingerprint", "ffffffff")
    assert "cannot be compared" in kept.refused(*words, "--tag", "mine")
    assert "1 imported" in kept.ok(*words, "--tag", TAG)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    said = kept.refused("collections", "export", "shop", "--out", tmp_path / "x.parquet")
    assert "pip install pyarrow" in said
    assert sorted(os.listdir(tmp_path)) == ["data", "x.npz"]


def test_a_fingerprint_stands_for_the_tag_of_a_model_that_is_here(kept: Kept, tmp_path: Path) -> None:
    from model.artifact import bundled_artifact, read_manifest

    manifest = read_manifest(bundled_artifact())
    np.savez(tmp_path / "x.npz", paths=np.array(["a"]), vectors=np.ones((1, 8), np.float32))
    words = ("collections", "import", tmp_path / "x.npz", "-c", "shop", "--fingerprint", manifest.fingerprint[:8])
    kept.ok(*words)
    height, width = manifest.input_size
    assert kept.store()._collections["shop"].spec.tag == f"{manifest.fingerprint}/cls/l2/{height}x{width}/fp32"


def test_help_imports_nothing_heavy() -> None:
    import subprocess

    script = "import sys, cli; print([name for name in ('numpy', 'fsspec', 'pyarrow', 'faiss') if name in sys.modules])"
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_real_model_and_the_embedded_store(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two invocations use the same folder and share no state in memory."""
    from service.search.embedded import open_embedded

    opening = ModuleType("service.search.opening")
    open_store: Callable[[Any], Any] = lambda settings: open_embedded(settings.data_dir)  # noqa: E731
    opening.open_store = open_store  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "service.search.opening", opening)
    data = ["--data-dir", str(tmp_path / "data")]
    run = CliRunner()
    result = run.invoke(cli.app, ["index", str(photos), "-c", "shop", *data])
    assert "3 indexed" in result.output, result.output
    assert "3 already there" in run.invoke(cli.app, ["index", str(photos), "-c", "shop", *data]).output
    result = run.invoke(cli.app, ["search", str(photos / "deep" / "c.png"), "-c", "shop", "--json", *data])
    hit = json.loads(result.output)[0]
    assert hit["id"] == "deep/c.png"
    assert hit["score"] == pytest.approx(1, abs=1e-5)


def test_reading_makes_no_store_and_names_the_one_it_reads(tmp_path: Path, photos: Path) -> None:
    data = ["--data-dir", str(tmp_path / "data")]
    run = CliRunner()
    for words in (["collections", "list"], ["search", str(photos / "a.png"), "-c", "shop"]):
        result = run.invoke(cli.app, [*words, *data])
        assert (result.exit_code, "no vector store in" in result.output) == (2, True), result.output
        assert not (tmp_path / "data" / "search.sqlite3").exists()
    assert run.invoke(cli.app, ["index", str(photos), "-c", "shop", *data]).exit_code == 0
    result = run.invoke(cli.app, ["search", str(photos / "a.png"), "-c", "shoop", *data])
    assert f"there is no collection 'shoop' in {tmp_path / 'data'}" in " ".join(result.output.split())


def test_vectors_of_embed_know_what_made_them(tmp_path: Path, photos: Path) -> None:
    data, out = ["--data-dir", str(tmp_path / "data")], tmp_path / "mean.npz"
    run = CliRunner()
    result = run.invoke(cli.app, ["embed", str(photos), "--out", str(out), "--pooling", "mean", *data])
    assert result.exit_code == 0, result.output
    result = run.invoke(cli.app, ["collections", "import", str(out), "-c", "shop", *data])
    assert "3 imported" in result.output, result.output
    shown = json.loads(run.invoke(cli.app, ["collections", "show", "shop", *data]).output)
    assert "/mean/l2/" in shown["tag"]
    result = run.invoke(
        cli.app, ["collections", "import", str(out), "-c", "x", "--tag", "another/cls/l2/1x1/fp32", *data]
    )
    assert result.exit_code == 2
    assert "the vectors in the file are of" in result.output


def documented_commands() -> list[str]:
    """Return the commands of docs/indexing.md that need no other machine."""
    text = (Path(cli.__file__).parents[1] / "docs" / "indexing.md").read_text()
    blocks = text.split("```sh\n")[1:]
    lines = [line for block in blocks for line in block.partition("```")[0].splitlines()]
    return [line for line in lines if "s3://" not in line and "milvus://" not in line]


def test_every_documented_command_runs(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet`")
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for index, name in enumerate(["a.jpg", "b.jpg"]):
        Path("photos", name).write_bytes(photo(index, kind="JPEG"))
    with tarfile.open("shard.tar", "w") as tar:
        tar.add("photos/a.jpg", "c.jpg")
    pq.write_table(pa.table({"image": [photo(3)], "label": [1]}), "train.parquet")
    Path("list.jsonl").write_text('{"image": "photos/a.jpg", "id": "1", "brand": "Arla"}\n')
    commands = documented_commands()
    assert len(commands) > 20
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "dinov2"
        kept.ok(*words)
    assert kept.store()._collections["shop"].items.keys() == {"a.jpg", "b.jpg", "c.jpg", "train.parquet#0", "1"}
