"""Tests that the table of index kinds is the only list of kinds, and that a name without a row is always refused."""

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import numpy as np
import pytest

import cli.collection
from service.schemas import IndexIn
from service.search import building
from service.search.database import SegmentRow
from service.search.embedded import EmbeddedStore, open_embedded
from service.search.filters import parse_filter
from service.search.indexes import STRUCTURES, structure_of
from service.search.kinds import CHOICES, EXACT, KINDS, Kind, StructureName, auto_kind, kind_named, kinds_with
from service.search.segment_files import open_segment
from service.search.store import CollectionSpec, IndexSpec, Item, SearchParams

TAG = "f" * 64 + "/cls/l2/224x224/fp32"
ROOT = Path(__file__).parents[3]


async def opened(folder: Path) -> EmbeddedStore:
    store = await open_embedded(folder, threads=1, interval_s=60.0)
    assert isinstance(store, EmbeddedStore)
    return store


def items(count: int) -> list[Item]:
    rng = np.random.default_rng(0)
    return [Item(f"i{n}", rng.normal(size=8)) for n in range(count)]


def test_the_choices_of_settings_schemas_and_commands_are_the_rows_and_auto() -> None:
    assert get_args(Kind) == CHOICES == ("auto", *KINDS)
    assert get_args(get_type_hints(IndexSpec)["kind"]) == CHOICES
    assert get_args(IndexIn.model_fields["kind"].annotation) == CHOICES
    assert get_args(get_type_hints(cli.collection.create)["kind"]) == CHOICES


def test_every_kind_is_documented() -> None:
    (row,) = [line for line in (ROOT / "docs/api.md").read_text().splitlines() if line.startswith("| `index.kind` |")]
    assert all(f"`{name}`" in row for name in CHOICES)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_row_is_complete(kind: Any) -> None:
    names = {field.name for of in (IndexSpec, SearchParams) for field in dataclasses.fields(of)}
    assert set(kind.settings) <= names - {"kind", "target_recall", "exact"}
    assert kind.efforts == tuple(sorted(set(kind.efforts)))
    assert (kind.codes is not None) == (kind.structure == "lists")
    assert structure_of(kind) is STRUCTURES[kind.structure]


def test_every_structure_is_implemented() -> None:
    assert set(STRUCTURES) == set(get_args(StructureName)) == {kind.structure for kind in KINDS.values()}


def test_settings_say_which_kinds_they_apply_to() -> None:
    assert kinds_with("m") == kinds_with("ef_construction") == kinds_with("ef_search") == "hnsw"
    assert kinds_with("n_lists") == kinds_with("nprobe") == "ivf_pq, rabitq"
    assert IndexIn.model_fields["n_lists"].description == "ivf_pq, rabitq: number of inverted lists"


def test_auto_goes_by_size() -> None:
    assert [auto_kind(count).name for count in (0, 1_999_999, 2_000_000, 10**12)] == [
        "hnsw",
        "hnsw",
        "ivf_pq",
        "ivf_pq",
    ]


@pytest.mark.parametrize("name", ["diskann", "auto", "HNSW", ""])
def test_a_name_without_a_row_raises(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"index kind '{name}' is unknown: the kinds are flat, hnsw"):
        kind_named(name)
    with pytest.raises(ValueError, match="is unknown"):
        building.build(name, CollectionSpec(TAG, 8), [])
    with pytest.raises(ValueError, match="is unknown"):
        open_segment(tmp_path, SegmentRow(1, "folder", name, 1, 2, 2, 1, {}), "float32")


@pytest.mark.parametrize("count", [1, 10**6])
def test_settings_with_an_unknown_kind_raise_for_every_size(count: int) -> None:
    with pytest.raises(ValueError, match="index kind 'diskann' is unknown"):
        building.kind_for(IndexSpec(cast("Kind", "diskann")), count)


async def test_a_segment_of_an_unknown_kind_is_searched_exactly_and_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = await opened(tmp_path)
    written = items(50)
    await store.upsert("c", written, tag=TAG)
    await store.settle("c")
    await store.close()
    with closing(sqlite3.connect(tmp_path / "search.sqlite3")) as db, db:
        assert db.execute("UPDATE segments SET kind = 'diskann'").rowcount == 1
    store = await opened(tmp_path)
    assert "index kind 'diskann' is unknown" in caplog.text
    (hits,) = await store.search("c", [written[7].vector], 1, tag=TAG)
    assert hits[0].id == "i7"
    await store.settle("c")
    (segment,) = (await store.stats("c"))["segments"]
    assert (segment["kind"], segment["vectors"], segment["whole"]) == (EXACT.name, 50, True)
    await store.close()


@pytest.mark.parametrize("name", KINDS)
async def test_an_exact_search_with_a_filter_compares_all_that_pass(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "FLAT_BELOW", 100)
    monkeypatch.setattr("service.search.view.EXACT_ROWS", 20)
    store = await opened(tmp_path)
    written = [Item(item.id, item.vector, {"odd": bool(n % 2)}) for n, item in enumerate(items(2000))]
    await store.create("c", CollectionSpec(TAG, 8, index=IndexSpec(cast("Kind", name))))
    await store.upsert("c", written, tag=TAG)
    await store.settle("c")
    assert [segment["kind"] for segment in (await store.stats("c"))["segments"]] == [name]
    odd = [item for item in written if item.metadata["odd"]]
    units = np.stack([item.vector / np.linalg.norm(item.vector) for item in odd])
    queries = np.random.default_rng(1).normal(size=(20, 8))
    exact = SearchParams(exact=True, nprobe=1, ef_search=1)
    where = parse_filter({"key": "odd", "eq": True})
    answers = await store.search("c", queries, 10, tag=TAG, where=where, params=exact)
    nearest = np.argsort(-queries @ units.T, axis=1)[:, :10]
    assert [[hit.id for hit in hits] for hits in answers] == [[odd[row].id for row in rows] for rows in nearest]
    await store.close()


async def test_a_collection_of_an_unknown_kind_does_not_stop_the_maintenance_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = await opened(tmp_path)
    for name in ("a", "b"):
        await store.upsert(name, items(50), tag=TAG)
    await store.close()
    with closing(sqlite3.connect(tmp_path / "search.sqlite3")) as db, db:
        db.execute("""UPDATE collections SET spec = replace(spec, '"auto"', '"diskann"') WHERE name = 'a'""")
    store = await opened(tmp_path)
    store._maintenance._seal_rows = 10
    store._maintenance._tidy(store._connect(), idle=False)
    assert "collection 'a': cannot build a segment (index kind 'diskann' is unknown" in caplog.text
    assert len((await store.stats("b"))["segments"]) == 1
    assert (await store.stats("a"))["tail"] == 50
    await store.close()
