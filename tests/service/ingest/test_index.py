"""Tests of indexing: the stored items, the items that a second run skips, and that its stages run concurrently."""

import asyncio
import gc
import io
import os
import tarfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.decode import DecodeLimits
from model.preprocess import preprocess
from service.errors import Conflict, InvalidRequest, ModelMismatch, StorageFailed
from service.features.images import decode
from service.ingest import index as index_files
from service.ingest import unpacking
from service.ingest.embed import load_ahead
from service.ingest.folders import Content, Photo
from service.ingest.index import IndexHooks, IndexOptions, IndexReport, index_photos, pooling_of, vector_tag
from service.ingest.sources import find_photos
from service.search.store import CollectionInfo, CollectionSpec, Item
from tests.dict_store import DictStore
from tests.fakes import DIMS, SPEC, FakeEngine, fake_artifact, photo, running
from tests.service.ingest import bombs

ARTIFACT = fake_artifact()


class Recorder(DictStore):
    """A store that records the size of each write. It can be slow or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[int] = []
        self.delay_s = 0.0
        self.fails_at: int | None = None  # which write
        self.refuses: set[str] = set()

    async def upsert(self, collection: str, items: Sequence[Item], **options: Any) -> CollectionInfo:
        if self.fails_at == len(self.writes):
            raise StorageFailed("the disk is full")
        if refused := self.refuses & {item.id for item in items}:
            raise InvalidRequest(f"{refused} is not to this store's taste")
        await asyncio.sleep(self.delay_s)
        self.writes.append(len(items))
        return await super().upsert(collection, items, **options)


async def run(
    *sources: Path, store: DictStore, engine: FakeEngine | None = None, to: str = "shop", **given: Any
) -> IndexReport:
    hooks = {name: given.pop(name) for name in ("stop", "keep", "on_problem", "on_progress") if name in given}
    found = given.pop("found", None) or find_photos([str(source) for source in sources])
    options = IndexOptions(**{"batch_size": 4, "workers": 2, **given})
    return await index_photos(found, store, to, ARTIFACT, engine or FakeEngine(), options, IndexHooks(**hooks))


def write_photos(folder: Path, names: Sequence[str], seed: int = 0) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(seed + index))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with six images at two depths, one of them with metadata, and three files that are not images."""
    path = write_photos(tmp_path / "photos", ["a.png", "b.png", "c.png", "deep/d.png", "deep/e.png", "ü/写.png"])
    (path / "a.json").write_text('{"brand": "Arla", "price": 5}')
    (path / "empty.jpg").write_bytes(b"")
    (path / "torn.png").write_bytes(photo()[:100])
    (path / "text.jpg").write_text("no image")
    return path


async def test_photos_become_items(folder: Path) -> None:
    store = DictStore()
    report = await run(folder, store=store, metadata={"shop": 7})
    assert (report.indexed, report.present, report.failed, report.interrupted) == (6, 0, 3, False)
    assert {Path(problem.source).name for problem in report.problems} == {"empty.jpg", "torn.png", "text.jpg"}
    item = (await store.get("shop", ["a.png"]))[0]
    assert item is not None
    stat = (folder / "a.png").stat()
    assert item.metadata["_file"]["bytes"] == stat.st_size
    assert {key: item.metadata[key] for key in ("brand", "price", "shop")} == {"brand": "Arla", "price": 5, "shop": 7}
    assert item.source == str(folder / "a.png")
    assert item.digest == __import__("hashlib").sha256(photo(0)).hexdigest()
    pixels = preprocess(decode(photo(0)), SPEC)
    expected = FakeEngine().run(pixels[None]).cls[0]
    np.testing.assert_allclose(item.vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert (await store.info("shop")).spec == CollectionSpec(vector_tag(ARTIFACT, FakeEngine(), "cls"), DIMS)


async def test_the_tag_is_the_services(tmp_path: Path) -> None:
    async with running(tmp_path, artifact=ARTIFACT) as served:
        tags = {pooling: served.service.tag(pooling=pooling) for pooling in ("cls", "mean", "cls+mean")}
    for pooling, served_tag in tags.items():
        tag = vector_tag(ARTIFACT, FakeEngine(), pooling)
        assert tag == served_tag
        assert vector_tag(ARTIFACT, FakeEngine(precision="int8"), pooling).endswith("/28x28/int8")
        assert pooling_of(CollectionInfo("shop", CollectionSpec(tag, DIMS), 0)) == pooling
    with pytest.raises(Conflict, match="no local model makes"):
        pooling_of(CollectionInfo("shop", CollectionSpec("mine", DIMS), 0))


async def test_a_second_run_reads_and_embeds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, engine = DictStore(), FakeEngine()
    await run(folder, store=store)
    for name in ("empty.jpg", "torn.png", "text.jpg"):
        (folder / name).unlink()
    read: list[str] = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or b"")
    report = await run(folder, store=store, engine=engine)
    assert (report.indexed, report.present, report.failed) == (0, 6, 0)
    assert not engine.batches
    assert not read


async def test_only_the_run_itself_says_what_is_known_of_a_file(tmp_path: Path) -> None:
    """A Parquet file or an archive may have a field of the same name."""
    store = DictStore()
    stamps = [None, {"bytes": 1}]
    found = [
        Photo(f"{i}", f"s3://x/{i}", lambda i=i: Content(photo(i), {"_file": {"bytes": 7}, "n": i}), stamp)
        for i, stamp in enumerate(stamps)
    ]
    await run(store=store, found=found)
    items = await store.get("shop", ["0", "1"])
    assert [item.metadata for item in items if item] == [{"n": 0}, {"n": 1, "_file": {"bytes": 1}}]


async def test_the_runs_metadata_wins_over_the_sources(folder: Path) -> None:
    store = DictStore()
    await run(folder, store=store, metadata={"brand": "mine"})
    (item,) = await store.get("shop", ["a.png"])
    assert item is not None
    assert (item.metadata["brand"], item.metadata["price"]) == ("mine", 5)


async def test_changed_files_are_embedded_again(folder: Path) -> None:
    store, engine = DictStore(), FakeEngine()
    await run(folder, store=store)
    (folder / "b.png").write_bytes(photo(77))
    report = await run(folder, store=store, engine=engine)
    assert (report.indexed, report.present) == (1, 5)
    assert engine.images == 1
    item = (await store.get("shop", ["b.png"]))[0]
    assert item is not None
    assert item.digest == __import__("hashlib").sha256(photo(77)).hexdigest()
    assert (await run(folder, store=store, force=True)).indexed == 6


async def test_a_folder_that_moved_is_the_same_photos(folder: Path, tmp_path: Path) -> None:
    store = DictStore()
    await run(folder, store=store)
    os.rename(folder, tmp_path / "elsewhere")
    report = await run(tmp_path / "elsewhere", store=store)
    assert (report.indexed, report.present) == (0, 6)


async def test_two_sources_with_one_relative_path(tmp_path: Path) -> None:
    one = write_photos(tmp_path / "one", ["a.png", "b.png"])
    two = write_photos(tmp_path / "two", ["a.png", "c.png"], seed=10)
    store = DictStore()
    for _ in range(2):
        report = await run(one, two, store=store)
        assert [problem.source for problem in report.problems] == [str(two / "a.png")]
        assert f"belongs to {one / 'a.png'}; --force" in report.problems[0].reason
    assert (await store.info("shop")).count == 3
    assert (await run(one, two, store=store, id_by="sha256", to="other")).indexed == 4


async def test_an_item_without_a_source_is_left_alone(tmp_path: Path) -> None:
    store = DictStore()
    await store.upsert("shop", [Item("a.png", np.ones(DIMS))], tag=vector_tag(ARTIFACT, FakeEngine(), "cls"))
    report = await run(write_photos(tmp_path / "p", ["a.png"]), store=store)
    assert (report.indexed, report.present) == (0, 1)


async def test_ids_by_content(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", [f"{index}.png" for index in range(9)])
    for index in range(9):
        (folder / f"twin-{index}.png").write_bytes(photo(index))
    store, engine = DictStore(), FakeEngine()
    report = await run(folder, store=store, id_by="sha256")
    assert (report.indexed, report.present) == (9, 9)
    items = (await store.scroll("shop")).items
    assert all(item.id == item.digest for item in items)
    assert (await run(folder, store=store, engine=engine, id_by="sha256")).present == 18
    assert not engine.batches
    again = await run(folder, store=store, engine=engine, id_by="sha256", force=True)
    assert again.indexed >= 9
    assert again.indexed + again.present == 18


async def test_one_content_that_two_threads_load_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path, ["a.png"])
    (folder / "b.png").write_bytes(photo(0))
    both = threading.Barrier(2)

    def together(*args: Any) -> Any:
        both.wait(10)  # neither was seen by the other
        return decode(*args)

    monkeypatch.setattr(index_files, "decode", together)
    store = Recorder()
    report = await run(folder, store=store, id_by="sha256")
    assert (report.indexed, report.present, sum(store.writes)) == (1, 1, 1)


async def test_nothing_is_remembered_of_what_is_written_or_has_failed(folder: Path) -> None:
    for id_by in ("path", "sha256"):
        store = DictStore()
        state = index_files._Run(store, "shop", ARTIFACT, FakeEngine(), IndexOptions(id_by=id_by), IndexHooks())
        await state.check()
        report = await state.go(find_photos([str(folder)]))
        assert (report.indexed, report.failed) == (6, 3)
        assert state.under_way == {}


async def test_the_store_is_asked_of_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Asked(DictStore):
        async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
            asked.append(len(ids))
            return await super().get(collection, ids)

    store = Asked()
    await store.create("shop", CollectionSpec(vector_tag(ARTIFACT, FakeEngine(), "cls"), DIMS))
    monkeypatch.setattr(index_files, "_CHECK_ITEMS", 8)
    await run(write_photos(tmp_path, [f"{index:03}.png" for index in range(30)]), store=store)
    assert asked == [4, 8, 8, 8, 2]
    asked.clear()
    monkeypatch.setattr(index_files, "_CHECK_BYTES", 100)
    found = [Photo(f"{i}", f"x/{i}", lambda i=i: Content(photo(i), {}), held_bytes=60) for i in range(6)]
    await run(store=store, found=found)
    assert asked == [2, 2, 2]  # what is held in memory is bounded


async def test_what_no_store_would_take_is_listed(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", ["good.png", "new\nline.png", "d" * 200 + "/" + "n" * 100 + ".png"])
    write_photos(folder, [os.fsdecode(b"\xff.png")], seed=9)
    (folder / "long.png").write_bytes(photo(10))
    (folder / "long.json").write_text('{"text": "%s"}' % ("x" * 70_000))
    report = await run(folder, store=DictStore())
    assert (report.indexed, report.failed) == (1, 4)
    reasons = sorted(problem.reason for problem in report.problems)
    assert sum("--id sha256" in reason for reason in reasons) == 3
    assert "metadata has" in reasons[-1]
    report = await run(folder, store=DictStore(), id_by="sha256")
    assert (report.indexed, report.failed) == (4, 1)


async def test_a_source_that_no_store_would_take_costs_no_forward_pass() -> None:
    engine = FakeEngine()
    found = [Photo("a", "s" * 3000, lambda: Content(photo(), {}))]
    report = await run(store=DictStore(), found=found, engine=engine)
    assert (report.indexed, report.failed, engine.images) == (0, 1, 0)


async def test_an_item_that_this_store_refuses_costs_no_other(folder: Path) -> None:
    store = Recorder()
    store.refuses = {"b.png"}
    report = await run(folder, store=store)
    assert (report.indexed, report.failed) == (5, 4)
    assert "not to this store's taste" in report.problems[-1].reason


async def test_limits_hold_and_features_that_are_not_finite_are_listed(folder: Path) -> None:
    report = await run(folder, store=DictStore(), limits=DecodeLimits(max_pixels=10))
    assert (report.indexed, report.failed) == (0, 9)

    class Broken(FakeEngine):
        def run(self, pixels: Any) -> Any:
            features = super().run(pixels)
            features.cls[0] = np.nan
            return features

    report = await run(folder, store=DictStore(), engine=Broken())
    assert (report.indexed, report.failed) == (4, 5)
    assert "not finite" in " ".join(problem.reason for problem in report.problems)

    class Dead(FakeEngine):
        def run(self, pixels: Any) -> Any:
            features = super().run(pixels)
            features.cls[0] = 0
            return features

    report = await run(folder, store=DictStore(), engine=Dead())
    assert (report.indexed, report.failed) == (4, 5)  # a vector of zeros has no direction


async def test_another_model_is_refused_before_any_work(folder: Path) -> None:
    store, engine = DictStore(), FakeEngine()
    await store.create("shop", CollectionSpec("another/cls/l2/28x28/fake", DIMS))
    with pytest.raises(ModelMismatch, match="another/cls"):
        await run(folder, store=store, engine=engine)
    assert not engine.batches


async def test_pooling_and_originals(folder: Path) -> None:
    store, kept = DictStore(), []

    async def keep(data: bytes) -> None:
        kept.append(data)

    report = await run(folder, store=store, pooling="cls+mean", originals=True, keep=keep)
    info = await store.info("shop")
    assert (info.dimension, info.spec.originals) == (2 * DIMS, True)
    assert sorted(kept) == sorted(photo(index) for index in range(6))
    assert report.indexed == 6

    async def full(data: bytes) -> None:
        raise StorageFailed("the disk is full")

    with pytest.raises(StorageFailed, match="disk is full"):
        await run(folder, store=store, to="other", keep=full)


async def test_nothing_found_makes_no_collection(tmp_path: Path) -> None:
    store = DictStore()
    assert (await run(tmp_path, store=store)).indexed == 0
    assert await store.collections() == []


async def test_writes_are_grouped(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, [f"{index:03}.png" for index in range(600)])
    store = Recorder()
    reports: list[int] = []
    report = await run(folder, store=store, batch_size=32, on_progress=lambda state: reports.append(state.indexed))
    assert report.indexed == sum(store.writes) == 600
    assert len(store.writes) <= 2 + 600 // 256 + int(report.seconds)
    assert reports[-1] == 600


async def test_the_engine_works_while_the_store_writes(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, [f"{index:03}.png" for index in range(64)])
    store, engine = Recorder(), FakeEngine(delay_s=0.05)
    store.delay_s = 0.5
    started = time.perf_counter()
    await run(folder, store=store, engine=engine, batch_size=2)  # 1.6 s of engine, 0.5 s a write
    assert len(store.writes) >= 2
    assert time.perf_counter() - started < 1.6 + 0.5 + 0.7


async def test_only_a_few_photos_are_in_memory(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, [f"{index:03}.png" for index in range(80)])
    loaded: list[str] = []

    def found() -> Any:
        for one in find_photos([str(folder)]):
            yield replace(one, load=lambda one=one: loaded.append(one.id) or one.load())

    engine = FakeEngine(gate=threading.Event())
    task = asyncio.create_task(run(folder, store=DictStore(), engine=engine, found=found()))
    await asyncio.to_thread(engine.entered.wait, 10)
    await asyncio.sleep(0.3)
    assert len(loaded) <= 4 + 2 * 4 + 1  # in the engine, ahead, in hand
    assert engine.gate is not None
    engine.gate.set()
    assert (await task).indexed == 80


async def test_stopping_keeps_what_is_embedded(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, [f"{index:03}.png" for index in range(100)])
    store, stop = DictStore(), threading.Event()
    engine = FakeEngine(delay_s=0.02)

    def after_some(state: IndexReport) -> None:
        if len(engine.batches) >= 3:
            stop.set()

    engine_run = engine.run

    def counting(pixels: Any) -> Any:
        after_some(IndexReport())
        return engine_run(pixels)

    engine.run = counting  # type: ignore[method-assign]
    report = await run(folder, store=store, engine=engine, stop=stop)
    assert report.interrupted
    assert report.indexed == (await store.info("shop")).count == engine.images
    assert 8 <= report.indexed < 40
    again = await run(folder, store=store)
    assert (again.indexed, again.present) == (100 - report.indexed, report.indexed)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "feed", "engine"))]


async def test_cancelling_ends_the_threads(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, [f"{index:03}.png" for index in range(100)])
    store, engine = DictStore(), FakeEngine(delay_s=0.05)
    task = asyncio.create_task(run(folder, store=store, engine=engine))
    await asyncio.to_thread(engine.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.images < 40
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "feed", "engine"))]


async def test_a_store_that_fails_ends_the_run_and_keeps_what_was_written(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, [f"{index:03}.png" for index in range(300)])
    store = Recorder()
    store.fails_at = 1
    with pytest.raises(StorageFailed, match="disk is full"):
        await run(folder, store=store, batch_size=32)
    store.fails_at = None
    report = await run(folder, store=store)
    assert report.present == store.writes[0]
    assert report.indexed + report.present == 300


async def test_an_engine_that_fails_ends_the_run(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="told to fail"):
        await run(folder, store=DictStore(), engine=FakeEngine(fails=lambda pixels: True))


async def test_a_source_that_raises_ends_the_run(folder: Path) -> None:
    def found() -> Any:
        yield from find_photos([str(folder)])
        raise ModuleNotFoundError("pip install something")

    with pytest.raises(ModuleNotFoundError, match="pip install"):
        await run(folder, store=DictStore(), found=found())


async def test_archives_resume_too(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(10):
            info = tarfile.TarInfo(f"{index}.png")
            info.size = len(photo(index))
            tar.addfile(info, io.BytesIO(photo(index)))
    store = DictStore()
    assert (await run(path, store=store)).indexed == 10
    assert (await run(path, store=store)).present == 10


async def test_all_problems_are_told_and_some_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ingest.index.MAX_LISTED", 3)
    for index in range(8):
        (tmp_path / f"{index}.jpg").write_bytes(b"")
    told: list[str] = []
    report = await run(tmp_path, store=DictStore(), on_problem=lambda problem: told.append(problem.source))
    assert (report.failed, len(report.problems), len(told)) == (8, 3, 8)


def test_loading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    def slow(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * number

    assert list(load_ahead(range(20), slow, ahead=4)) == [(number, number * number) for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(load_ahead([1, 0], lambda number: 1 / number, ahead=4))
    taken = load_ahead(iter(range(10**9)), slow, ahead=4)
    assert next(taken) == (0, 0)
    taken.close()


async def test_archives_that_stand_for_gigabytes_do_not_end_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "FREE_BYTES", 4 * 2**20)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 20)
    bomb = bombs.write(tmp_path / "bomb.tar.gz", bombs.many_images())
    report = await run(bomb, folder, store=DictStore())
    assert report.indexed == 6
    reasons = {problem.source: problem.reason for problem in report.problems}
    assert reasons[str(bomb)] == "the rest of the tar was not read: it unpacks to more than 20 times its size"
    assert sum("bomb.tar.gz" in source for source in reasons) == report.failed - 3


async def test_the_bytes_of_an_image_are_not_kept_after_it_is_decoded(tmp_path: Path) -> None:
    """Neither by the items that wait to be written, nor by the record of what is being indexed."""
    held: list[weakref.ref[Any]] = []

    class Held:
        """The bytes of an image, as an object whose end can be observed."""

        def __init__(self, index: int) -> None:
            self.data = photo(index)
            held.append(weakref.ref(self))

        def load(self) -> Content:
            return Content(self.data, {})

    def images() -> Iterator[Photo]:
        for index in range(8):
            yield Photo(f"{index}.png", f"{index}.png", Held(index).load, None, 100)

    alive: list[int] = []
    store = Recorder()
    upsert = store.upsert

    async def counted(collection: str, items: Sequence[Item], **options: Any) -> CollectionInfo:
        gc.collect()
        alive.append(sum(one() is not None for one in held))
        return await upsert(collection, items, **options)

    store.upsert = counted  # type: ignore[method-assign]
    report = await run(store=store, found=images())
    assert report.indexed == 8
    assert alive == [0]


def test_reading_in_advance_waits_for_room() -> None:
    held, stop, done = index_files._Held(10), threading.Event(), threading.Event()
    held.add(8, stop)
    held.add(0, stop)  # what is not in memory never waits
    thread = threading.Thread(target=lambda: (held.add(5, stop), done.set()), daemon=True)
    thread.start()
    assert not done.wait(0.2)
    held.remove(8)
    assert done.wait(5)
    held.remove(5)
    held.add(100, stop)  # one that is larger than the limit comes alone
    thread = threading.Thread(target=lambda: (held.add(5, stop), done.set()), daemon=True)
    done.clear()
    thread.start()
    assert not done.wait(0.2)
    stop.set()
    assert done.wait(5)
