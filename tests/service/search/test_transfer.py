"""Tests of copying collections between stores and through files: no item is lost or mixed up, and hostile files are
refused.
"""

import json
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import CollectionNotFound, Conflict, InvalidRequest, ModelMismatch, StorageFailed
from service.originals import Originals, photo_digest, source_of
from service.search.checks import normalised
from service.search.collection_files import spec_from, spec_text
from service.search.store import CollectionInfo, CollectionSpec, IndexSpec, Item
from service.search.transfer import Copied, Photos, copy_collection, export_collection, import_collection
from tests.dict_store import DictStore

pa = pytest.importorskip("pyarrow", reason="the extra `parquet`")
import pyarrow.parquet as pq  # noqa: E402

TAG = "f" * 64 + "/cls/l2/28x28/fp32"
SPEC = CollectionSpec(TAG, 5, index=IndexSpec("hnsw", m=16), indexed=("brand", "shelf.row"), originals=True)
FORMATS = ["parquet", "npz", "jsonl"]
CRAFTED: list[tuple[dict[str, Any], str]] = [
    ({**asdict(SPEC), **change}, words)
    for change, words in [
        ({"dimension": 10**9}, "dimension=1000000000 is not allowed: a whole number, 1 to 8,192"),
        ({"dimension": "5"}, "dimension='5' is not allowed"),
        ({"dtype": "int8"}, "dtype='int8' is not allowed: one of float32, float16"),
        ({"index": {"kind": "nonsense"}}, "index.kind='nonsense' is not allowed: one of auto, flat,"),
        ({"index": {"target_recall": "x"}}, "index.target_recall='x' is not allowed: a number, 0.5 to 1.0"),
        ({"index": {"target_recall": 7}}, "index.target_recall=7 is not allowed"),
        ({"indexed": ["a'b"]}, 'indexed: key "a\'b" is not allowed'),
        ({"originals": "yes"}, "originals='yes' is not allowed: true or false"),
    ]
]


class ExactStore(DictStore):
    """A store that keeps vectors unchanged, so that a round trip can be compared bit by bit."""

    async def upsert(self, collection: str, items: Sequence[Item], **options: Any) -> CollectionInfo:
        info = await super().upsert(collection, items, **options)
        held = self._resolve(collection)[1].items
        for item in items:
            held[item.id] = replace(held[item.id], vector=item.vector.copy())
        return info


def items(count: int, seed: int = 0) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [
        Item(
            f"ü/写 {index:05}",
            normalised(rng.normal(size=5)),
            {"n": index, "brand": "Ærla", "deep": {"list": [1, None, 2.5, 2**60]}} if index % 3 else {},
            f"/photos/{index}.jpg" if index % 2 else None,
            f"{index:064x}" if index % 5 else None,
        )
        for index in range(count)
    ]


async def filled(count: int = 2500, store: DictStore | None = None) -> DictStore:
    store = store or ExactStore()
    await store.create("shop", SPEC)
    if count:
        await store.upsert("shop", items(count), tag=TAG)
    return store


async def content(store: DictStore, name: str = "shop") -> dict[str, tuple[Any, ...]]:
    found = (await store.scroll(name, limit=10**6)).items
    return {item.id: (item.vector.tobytes(), dict(item.metadata), item.source, item.digest) for item in found}


async def test_copy_takes_everything(tmp_path: Path) -> None:
    source, target = await filled(), ExactStore()
    seen: list[int] = []
    assert await copy_collection(source, target, "shop", "shop-2", advance=seen.append) == Copied(2500, 0, 2500)
    assert await content(target, "shop-2") == await content(source)
    assert (await target.info("shop-2")).spec == SPEC
    assert seen == [1000, 1000, 500]


async def test_copy_goes_on_where_it_ended() -> None:
    source, target = await filled(), ExactStore()
    await target.create("shop", SPEC)
    await target.upsert("shop", items(1200), tag=TAG)
    assert await copy_collection(source, target, "shop") == Copied(1300, 1200, 2500)
    assert await copy_collection(source, source, "shop", "twin") == Copied(2500, 0, 2500)


async def test_copy_says_when_the_counts_differ() -> None:
    source, target = await filled(10), ExactStore()
    await target.create("shop", SPEC)
    await target.upsert("shop", [replace(items(1)[0], id="another")], tag=TAG)
    with pytest.raises(Conflict, match="holds 10 items and 'shop' now 11"):
        await copy_collection(source, target, "shop")
    with pytest.raises(CollectionNotFound):
        await copy_collection(source, target, "none")
    await target.create("other", replace(SPEC, tag="another"))
    with pytest.raises(Conflict):
        await copy_collection(source, target, "shop", "other")


async def test_copy_takes_the_photos_that_items_lead_to(tmp_path: Path) -> None:
    """The copy includes the images of items that existed already. Each image is copied once, before its item is
    written.
    """
    here, there = Originals(tmp_path / "here"), Originals(tmp_path / "there")
    digests = [await here.put(f"photo {index}".encode()) for index in range(30)]
    source = ExactStore()
    await source.create("shop", SPEC)
    some = [replace(one, digest=digest) for one, digest in zip(items(30), digests, strict=True)]
    some[0] = replace(some[0], digest=None, source=source_of(digests[1]))  # two items, one image
    some[2] = replace(some[2], digest=None, source=None)
    some[3] = replace(some[3], digest="0" * 64)  # is not stored
    await source.upsert("shop", some, tag=TAG)

    class Checking(ExactStore):
        async def upsert(self, collection: str, items: Sequence[Item], **options: Any) -> CollectionInfo:
            for item in items:
                digest = photo_digest(item)
                assert digest in (None, "0" * 64) or await there.get(digest)
            return await super().upsert(collection, items, **options)

    target = Checking()
    await target.create("shop", SPEC)
    await there.put(b"photo 5")
    done = await copy_collection(source, target, "shop", originals=(here, there))
    assert done == Copied(30, 0, 30, Photos(copied=26, present=1, missing=1))
    assert (await there.get(digests[1]), await there.get(digests[29])) == (b"photo 1", b"photo 29")
    for unwanted in (digests[0], digests[2], digests[3]):
        assert await there.size(unwanted) is None
    third = Originals(tmp_path / "third")
    done = await copy_collection(source, target, "shop", originals=(here, third))
    assert done == Copied(0, 30, 30, Photos(copied=27, missing=1))
    same = Originals(f"file://{tmp_path}/here/")
    assert (await copy_collection(source, target, "shop", originals=(here, same))).photos is None


async def test_a_photo_that_cannot_be_stored_ends_the_copy_before_its_item_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = Originals(tmp_path / "here"), Originals(tmp_path / "there")
    source, target = ExactStore(), ExactStore()
    await source.create("shop", SPEC)
    await source.upsert("shop", [replace(items(1)[0], digest=await here.put(b"photo"))], tag=TAG)

    async def full(data: bytes) -> str:
        raise StorageFailed("the image cannot be stored: No space left on device")

    monkeypatch.setattr(there, "put", full)
    with pytest.raises(StorageFailed, match="No space left"):
        await copy_collection(source, target, "shop", originals=(here, there))
    assert await target.count("shop") == 0


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 2500])
async def test_files_give_back_what_was_written(tmp_path: Path, suffix: str, count: int) -> None:
    source, target, path = await filled(count), ExactStore(), tmp_path / f"shop.{suffix}"
    assert await export_collection(source, "shop", path) == count
    assert os.listdir(tmp_path) == [path.name]
    assert (await import_collection(target, "shop", path)).count == count
    assert await content(target) == await content(source)
    assert (await target.info("shop")).spec == SPEC
    assert (await import_collection(target, "shop", path, tag=TAG)).count == count


def test_specs_are_read_as_they_were_written() -> None:
    assert spec_from(spec_text(SPEC)) == SPEC
    wrong: list[tuple[Any, str]] = [
        (1, "an object with tag, dimension and index is needed"),
        ({}, "an object with tag, dimension and index is needed"),
        ({**asdict(SPEC), "more": 1}, "'more' is not a setting"),
        ({**asdict(SPEC), "index": {"sort": "x"}}, "'sort' is not a setting"),
        ({**asdict(SPEC), "indexed": "brand"}, "indexed='brand' is not allowed"),
        *((body, words) for body, words in CRAFTED),
    ]
    for body, words in wrong:
        with pytest.raises(ValueError, match=re.escape(words)):
            spec_from(json.dumps(body))
    for text in ("{", "[" * 100_000, '{"tag": ' + "1" * 5000 + "}"):
        with pytest.raises(ValueError, match="settings cannot be read"):
            spec_from(text)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("spec", "words"), CRAFTED)
async def test_a_file_with_settings_that_no_collection_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, spec: dict[str, Any], words: str
) -> None:
    """The file is refused before anything is created, and the message names it."""
    path = tmp_path / f"shop.{suffix}"
    monkeypatch.setattr("service.search.collection_files.asdict", lambda _: spec)
    await export_collection(await filled(3), "shop", path)
    monkeypatch.undo()
    store = DictStore()
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        await import_collection(store, "shop", path)
    assert str(path) in str(caught.value)
    assert await store.collections() == []


async def test_a_vector_that_is_too_long_makes_no_collection(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]), vectors=np.ones((1, 8193), np.float32))
    store = DictStore()
    with pytest.raises(InvalidRequest, match="dimension=8193 is not allowed: a whole number, 1 to 8,192"):
        await import_collection(store, "shop", tmp_path / "x.npz", tag=TAG)
    assert await store.collections() == []


@pytest.mark.parametrize("suffix", FORMATS)
async def test_another_model_or_tag_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shop.{suffix}"
    await export_collection(await filled(3), "shop", path)
    with pytest.raises(ValueError, match="not of 'mine'"):
        await import_collection(ExactStore(), "shop", path, tag="mine")
    other = ExactStore()
    await other.create("shop", CollectionSpec("another", 5))
    with pytest.raises(ModelMismatch, match="another"):
        await import_collection(other, "shop", path)
    assert not await content(other)


@pytest.mark.parametrize("suffix", FORMATS)
async def test_a_failed_export_leaves_the_older_file(tmp_path: Path, suffix: str) -> None:
    class Failing(ExactStore):
        async def scroll(self, collection: str, **options: Any) -> Any:
            if options["cursor"] is not None:
                raise OSError("the connection broke")
            return await super().scroll(collection, **options)

    path = tmp_path / f"shop.{suffix}"
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="broke"):
        await export_collection(await filled(1500, Failing()), "shop", path)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == [path.name]


async def test_unknown_kinds_of_file_and_missing_ones(tmp_path: Path) -> None:
    store = await filled(1)
    with pytest.raises(ValueError, match=r"must end in one of \.parquet, \.npz, \.jsonl"):
        await export_collection(store, "shop", tmp_path / "shop.csv")
    for suffix in FORMATS:
        with pytest.raises((ValueError, OSError), match=r"No such file|cannot be read"):
            await import_collection(store, "shop", tmp_path / f"none.{suffix}")


async def test_foreign_files_need_a_tag(tmp_path: Path) -> None:
    vectors = np.stack([item.vector for item in items(3)])
    np.savez(tmp_path / "a.npz", paths=np.array(["x", "y", "z"]), vectors=vectors, fingerprint=np.array("f" * 64))
    pq.write_table(pa.table({"id": ["x", "y", "z"], "vector": vectors.tolist()}), tmp_path / "a.parquet")
    lines = [json.dumps({"id": key, "vector": vector.tolist()}) for key, vector in zip("xyz", vectors, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for suffix in FORMATS:
        store = ExactStore()
        with pytest.raises(ValueError, match="--tag or --fingerprint"):
            await import_collection(store, "shop", tmp_path / f"a.{suffix}")
        assert await import_collection(store, "shop", tmp_path / f"a.{suffix}", tag=TAG) == Copied(3, 0, 3)
        assert [row[0] for row in (await content(store)).values()] == [vector.tobytes() for vector in vectors]


async def broken(path: Path, match: str) -> DictStore:
    store = DictStore()
    with pytest.raises(ValueError, match=match) as caught:
        await import_collection(store, "shop", path, tag=TAG)
    assert str(path) in str(caught.value)
    return store


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"ids": np.array(["a", "b"]), "vectors": np.ones((3, 5), np.float32)}, "do not match"),
        ({"ids": np.array(["a"]), "vectors": np.ones(5, np.float32)}, "do not match"),
        ({"ids": np.array(["a"]), "vectors": np.ones((1, 0), np.float32)}, "do not match"),
        ({"ids": np.array([["a"]]), "vectors": np.ones((1, 5), np.float32)}, "do not match"),
        ({"ids": np.array([1]), "vectors": np.ones((1, 5), np.float32)}, "do not match"),
        ({"ids": np.array(["a"]), "vectors": np.ones((1, 5), np.int64)}, "not floats"),
        ({"ids": np.array(["a"])}, "no array vectors"),
        ({"vectors": np.ones((1, 5), np.float32)}, "no array ids or paths"),
        ({"ids": np.array(["a"]), "vectors": np.ones((1, 5)), "fields": np.array([], np.uint8)}, "0 lines of fields"),
        ({"ids": np.array(["a"]), "vectors": np.ones((1, 5)), "fields": np.frombuffer(b"{x", np.uint8)}, "row 0: not"),
        ({"ids": np.array(["a"]), "vectors": np.ones((1, 5)), "tag": np.array(TAG), "spec": np.array("?")}, "settings"),
        ({"ids": np.array(["a"]), "vectors": np.array([[object()]])}, "allow_pickle=False"),
    ],
)
async def test_npz_of_the_wrong_form(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert not await (await broken(tmp_path / "x.npz", match)).collections()


async def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "x.npz").write_bytes(pickle.dumps(Evil()))
    await broken(tmp_path / "x.npz", "pickle")
    np.savez(tmp_path / "y.npz", ids=np.array([Evil()], dtype=object), vectors=np.ones((1, 5)), allow_pickle=True)
    await broken(tmp_path / "y.npz", "allow_pickle=False")
    np.save(tmp_path / "z.npy", np.ones((2, 5)))
    os.rename(tmp_path / "z.npy", tmp_path / "z.npz")
    await broken(tmp_path / "z.npz", "a single array")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{broken", "line 4: not JSON"),
        ("[1]", "line 4: not a JSON object"),
        ('{"vector": [1, 2, 3, 4, 5]}', "line 4: its id is not a string"),
        ('{"id": "x"}', "line 4: its vector"),
        ('{"id": "x", "vector": "text"}', "line 4: its vector"),
        ('{"id": "x", "vector": [[1], [2, 3]]}', "line 4: its vector"),
        ('{"id": "x", "vector": 5}', "line 4: its vector"),
        ('{"id": "x", "vector": [1, 2, 3, 4, 5], "metadata": [1]}', "line 4: metadata must be an object"),
        ('{"id": "x", "vector": [1, 2, 3, 4, 5], "source": 1}', "line 4: metadata must be an object"),
    ],
)
async def test_a_broken_line_is_named_and_what_stands_before_is_kept(tmp_path: Path, line: str, match: str) -> None:
    path = tmp_path / "x.jsonl"
    await export_collection(await filled(3), "shop", path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, lines[3]]))
    assert len(await content(await broken(path, match))) == 2
    path.write_text("\n")
    await broken(path, "empty")


async def test_parquet_of_the_wrong_form(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    good = [[1.0, 2.0], [3.0, 4.0]]
    tables: list[tuple[dict[str, Any], str]] = [
        ({"id": ["a", None], "vector": good}, "row 1 has no id"),
        ({"id": ["a", "b"], "vector": [[1.0, 2.0], None]}, "row 1 has no id or no vector"),
        ({"id": ["a", "b"], "vector": [[1.0, 2.0], [3.0, None]]}, "row 1: its vector has a null"),
        ({"id": ["a", "b", "c"], "vector": [*good, [5.0, 6.0, 7.0]]}, "row 2: its vector has 3 numbers"),
        ({"id": ["a", "b"], "vector": [[], []]}, "row 0: its vector has 0 numbers"),
        ({"id": ["a", "b"], "vector": [[1, 2], [3, 4]]}, "not floats"),
        ({"id": ["a", "b"], "vector": [1.0, 2.0]}, "not lists"),
        ({"id": [1, 2], "vector": good}, "row 0: its id is not a string"),
        ({"id": ["a", "b"], "vector": good, "metadata": ["{}", "{x"]}, "row 1: metadata: not JSON"),
        ({"id": ["a", "b"], "vector": good, "metadata": ["{}", "[]"]}, "row 1: metadata: not a JSON object"),
        ({"id": ["a", "b"], "embedding": good}, "no column vector; the columns are id, embedding"),
    ]
    for columns, match in tables:
        pq.write_table(pa.table(columns), path)
        await broken(path, match)
    path.write_bytes(path.read_bytes()[:100])
    await broken(path, "x.parquet")


async def test_what_the_store_refuses_is_said_by_the_store(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]), vectors=np.zeros((1, 5), np.float32))
    with pytest.raises(InvalidRequest, match="zeros"):
        await import_collection(DictStore(), "shop", tmp_path / "x.npz", tag=TAG)
    np.savez(tmp_path / "x.npz", ids=np.array(["new\nline"]), vectors=np.ones((1, 5), np.float32))
    with pytest.raises(InvalidRequest, match="no control characters"):
        await import_collection(DictStore(), "shop", tmp_path / "x.npz", tag=TAG)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "a" * 257}, "1 to 256 characters, no control characters"),
        ({"id": "new\nline"}, "1 to 256 characters, no control characters"),
        ({"metadata": {"a": "x" * 70_000}}, "at most 65,536 are accepted"),
        ({"metadata": {"a": "\0"}}, "must not hold the character U+0000"),
        ({"metadata": {"a": float("nan")}}, "metadata must be a JSON object"),
        ({"metadata": json.loads('{"a":' * 300 + "1" + "}" * 300)}, "metadata must be a JSON object"),
        ({"source": "x" * 2049}, "1 to 2048 characters, no control characters"),
        ({"metadata": {"a": 2**63}}, "a is 9223372036854775808, but an integer must be from -2^63 to 2^63 - 1"),
        ({"digest": "DEADBEEF"}, "the sha256 in 64 hex digits"),
    ],
)
async def test_an_item_that_the_api_would_refuse_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = [{"id": f"i{index}", "vector": [1.0, 2.0]} for index in range(1100)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*good, {**good[0], "id": "bad", **change}, *good[:5]]))
    store = DictStore()
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        await import_collection(store, "shop", path, tag=TAG)
    assert f"{path}: item 1,101: " in caught.value.detail
    assert await store.count("shop") == 1000


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
async def test_streamed_files_need_little_memory(tmp_path: Path, suffix: str, peak_memory_bytes: Any) -> None:
    script = f"""
import asyncio, numpy as np
from pathlib import Path
from types import SimpleNamespace
from service.search.store import CollectionInfo, CollectionSpec, Item, Page
from service.search.transfer import export_collection, import_collection
import pyarrow.parquet

class Endless:
    count_ = 0
    async def info(self, name): return CollectionInfo(name, CollectionSpec("tag", 384), 0)
    async def scroll(self, name, *, cursor, limit):
        start = int(cursor or 0)
        items = [Item(f"{{i:09}}", np.full(384, 0.125, np.float32)) for i in range(start, start + limit)]
        return Page(items, str(start + limit) if start + limit < COUNT else None)
    async def upsert(self, name, items, *, tag): self.count_ += len(items)
    async def count(self, name): return self.count_

async def main():
    store = Endless()
    path = Path({str(tmp_path)!r}) / "x.{suffix}"
    assert await export_collection(store, "x", path) == COUNT
    assert (await import_collection(store, "x", path)).count == COUNT
asyncio.run(main())
"""
    few, many = 16_000, 50_000
    grown = peak_memory_bytes(f"COUNT = {many}\n{script}") - peak_memory_bytes(f"COUNT = {few}\n{script}")
    assert grown < (many - few) * 384 * 4 / 2
