"""Tests of classification: calibration and verdicts are compared with their definition, a scan of all vectors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest, ModelMismatch
from service.retrieval import calibration as calibration_module
from service.retrieval.calibration import MAX_AGE_S, MAX_ITEMS, Reference, calibrate, calibration_of
from service.retrieval.class_answers import calibration_fields, least_count
from service.retrieval.classify import classify_by_collection, classify_by_examples
from service.search.embedded import open_embedded
from service.search.filters import parse_filter
from service.search.store import Item, VectorStore
from service.shared_results import SharedResults
from service.vision.knn import vote
from tests.dict_store import DictStore

D = 6
TAG = "t"
CLASSES = ("apple", "pear", "plum")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def around(rng: np.random.Generator, labels: np.ndarray, spread: float = 0.3) -> np.ndarray:
    centres = unit(np.random.default_rng(99).normal(size=(20, D)))
    return unit(centres[labels] + spread * rng.normal(size=(len(labels), D)))


def labelled(count: int, seed: int = 0, prefix: str = "i", **metadata: Any) -> list[Item]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    rows = around(rng, labels)
    return [
        Item(f"{prefix}{n:03}", row, {"class": CLASSES[label], "n": n, **metadata})
        for n, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]


def scores_by_definition(known: list[Item], others: list[Item], k: int) -> list[float]:
    """For each known item, the similarity to the k-th nearest of the other items."""
    scores = []
    for item in known:
        similarities = [float(item.vector @ other.vector) for other in others if other.id != item.id]
        scores.append(sorted(similarities, reverse=True)[k - 1])
    return sorted(scores)


class CountingStore(DictStore):
    """A store that counts the vectors that it searches with."""

    def __init__(self) -> None:
        super().__init__()
        self.searched = 0

    async def search(self, collection, vectors, k, **more):
        self.searched += len(vectors)
        return await super().search(collection, vectors, k, **more)


@pytest.fixture(params=["dict", "embedded"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    async def make() -> VectorStore:
        return DictStore() if request.param == "dict" else await open_embedded(tmp_path, threads=2)

    return make


@pytest.mark.parametrize("k", [1, 3, 10])
async def test_leave_one_out_is_as_defined(opened, k: int) -> None:
    store = await opened()
    items = labelled(40)
    items.append(Item("twin", items[0].vector, {"class": "apple"}))  # an equal vector is a neighbour
    await store.upsert("c", items, tag=TAG)
    found = await calibrate(store, await store.info("c"), Reference(("class",), k))
    assert found.scores.tolist() == pytest.approx(scores_by_definition(items, items, k), abs=3e-6)
    assert (found.method, found.drawn_from, found.k, found.where) == ("leave-one-out", 41, k, None)
    await store.close()


async def test_items_without_a_label_take_no_part(opened) -> None:
    store = await opened()
    items = labelled(20)
    bare = [Item(f"bare{n}", item.vector, {"other": 1}) for n, item in enumerate(labelled(20, seed=5))]
    await store.upsert("c", items + bare, tag=TAG)
    reference = Reference(("class",), 2)
    found = await calibrate(store, await store.info("c"), reference)
    assert found.scores.tolist() == pytest.approx(scores_by_definition(items, items, 2), abs=3e-6)
    assert found.drawn_from == 20
    result = await classify_by_collection(
        store, SharedResults(), await store.info("c"), bare[3].vector[None], reference, 0.1
    )
    assert all(neighbour.id.startswith("i") for neighbour in result.verdicts[0].neighbours or ())
    await store.close()


async def test_held_out_items_are_compared_with_the_rest(opened) -> None:
    store = await opened()
    items = labelled(30, split="train")
    held_out = labelled(25, seed=3, prefix="h", split="check")
    await store.upsert("c", items + held_out, tag=TAG)
    reference = Reference(("class",), 3, held_out=parse_filter({"key": "split", "eq": "check"}))
    info = await store.info("c")
    found = await calibrate(store, info, reference)
    assert found.scores.tolist() == pytest.approx(scores_by_definition(held_out, items, 3), abs=3e-6)
    assert (found.method, found.drawn_from) == ("held-out", 25)
    result = await classify_by_collection(store, SharedResults(), info, held_out[4].vector[None], reference, 0.1)
    assert [neighbour.id[0] for neighbour in result.verdicts[0].neighbours or ()] == ["i"] * 3  # not even itself
    await store.close()


async def test_a_filter_limits_neighbours_and_calibration(opened) -> None:
    store = await opened()
    items = labelled(40)
    await store.upsert("c", items, tag=TAG)
    low = [item for item in items if item.metadata["n"] < 15]
    reference = Reference(("class",), 2, where=parse_filter({"key": "n", "lt": 15}))
    found = await calibrate(store, await store.info("c"), reference)
    assert found.scores.tolist() == pytest.approx(scores_by_definition(low, low, 2), abs=3e-6)
    await store.close()


async def test_verdicts_are_as_defined(opened) -> None:
    store = await opened()
    items = labelled(60)
    await store.upsert("c", items, tag=TAG)
    rng = np.random.default_rng(7)
    known, strange = around(rng, rng.integers(0, 3, 12)), around(rng, rng.integers(10, 20, 12))
    queries = np.concatenate([known, strange])
    result = await classify_by_collection(
        store, SharedResults(), await store.info("c"), queries, Reference(("class",), 4), 0.1
    )
    scores = np.array(scores_by_definition(items, items, 4))
    for query, verdict in zip(queries, result.verdicts, strict=True):
        ranked = sorted(items, key=lambda item: -float(item.vector @ query))[:4]
        similarities = [float(item.vector @ query) for item in ranked]
        p_value = (1 + np.sum(scores <= similarities[-1] + 1e-6)) / 61
        assert verdict.p_value == pytest.approx(p_value, abs=1 / 61)  # scores are rounded to six digits
        assert verdict.unknown == (verdict.p_value <= 0.1)
        expected = vote([item.metadata["class"] for item in ranked], similarities)
        assert [label for label, _ in verdict.scores] == [label for label, _ in expected]
        assert [score for _, score in verdict.scores] == pytest.approx([score for _, score in expected], abs=1e-3)
        assert verdict.label == (None if verdict.unknown else expected[0].label)
        assert [neighbour.id for neighbour in verdict.neighbours or ()] == [item.id for item in ranked]
    assert result.promised
    assert sum(verdict.unknown for verdict in result.verdicts[:12]) <= 4
    assert sum(verdict.unknown for verdict in result.verdicts[12:]) >= 9
    await store.close()


async def test_a_calibration_is_used_until_the_collection_changes(tmp_path: Path) -> None:
    store = await open_embedded(tmp_path, threads=2)
    items = labelled(30)
    await store.upsert("c", items, tag=TAG)
    shared, reference = SharedResults(), Reference(("class",), 2)

    async def current() -> Any:
        return await calibration_of(store, shared, await store.info("c"), reference)

    first = await current()
    assert await current() is first
    await store.upsert("c", [Item("i000", items[5].vector, {"class": "plum"})], tag=TAG)  # the count stays the same
    second = await current()
    assert second is not first
    assert second.scores.tolist() != first.scores.tolist()
    await store.patch("c", "i001", {"class": None})
    assert (await current()).drawn_from == 29
    await store.close()


async def test_a_store_without_versions_is_asked_again_after_a_while() -> None:
    now = 0.0
    store, shared, reference = CountingStore(), SharedResults(lambda: now), Reference(("class",), 2)
    await store.upsert("c", labelled(30), tag=TAG)
    for time, expected in ((0.0, 30), (MAX_AGE_S, 30), (MAX_AGE_S + 1, 60)):
        now = time
        await calibration_of(store, shared, await store.info("c"), reference)
        assert store.searched == expected
    await store.upsert("c", labelled(1, seed=9, prefix="more"), tag=TAG)
    await calibration_of(store, shared, await store.info("c"), reference)
    assert store.searched == 91


async def test_other_options_have_another_calibration() -> None:
    store, shared = CountingStore(), SharedResults()
    await store.upsert("c", labelled(30, x=1), tag=TAG)
    await store.upsert("c", labelled(10, seed=4, prefix="t", x=True), tag=TAG)
    info = await store.info("c")
    one, true = (parse_filter({"key": "x", "eq": value}) for value in (1, True))
    assert one == true  # in Python
    counts = [
        (await calibration_of(store, shared, info, Reference(("class",), k, where))).drawn_from
        for k, where in ((2, None), (3, None), (2, one), (2, true))
    ]
    assert counts == [40, 40, 30, 10]


async def test_the_number_of_searches_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ITEMS <= 5000
    monkeypatch.setattr(calibration_module, "MAX_ITEMS", 25)
    store = CountingStore()
    await store.upsert("c", labelled(70), tag=TAG)
    found = await calibrate(store, await store.info("c"), Reference(("class",), 3))
    assert (store.searched, len(found.scores), found.drawn_from) == (25, 25, 70)
    everything = scores_by_definition(labelled(70), labelled(70), 3)
    assert all(min(abs(score - other) for other in everything) < 3e-6 for score in found.scores)  # among all items


async def test_few_items() -> None:
    store, shared = DictStore(), SharedResults()
    items = labelled(3)
    await store.upsert("c", items[:1], tag=TAG)
    strange = -sum(item.vector for item in items)[None]

    async def verdict(error_rate: float) -> Any:
        return await classify_by_collection(
            store, shared, await store.info("c"), strange, Reference(("class",), 10), error_rate
        )

    alone = await verdict(0.5)
    assert (alone.verdicts[0].p_value, alone.verdicts[0].unknown, alone.promised) == (None, False, False)
    assert alone.verdicts[0].label == items[0].metadata["class"]
    assert alone.calibration.k == 1
    await store.upsert("c", items, tag=TAG)
    three = await verdict(0.05)
    assert (three.calibration.k, three.promised, three.verdicts[0].unknown) == (2, False, False)
    assert three.verdicts[0].p_value == 0.25
    fields = calibration_fields(three, 0.05)
    assert fields["least_error_rate"] == 0.25
    assert "at least 19" in fields["note"]
    assert (await verdict(0.25)).verdicts[0].unknown


@pytest.mark.parametrize(("error_rate", "count"), [(0.5, 1), (0.05, 19), (0.01, 99), (0.001, 999), (0.3, 3)])
def test_the_least_number_of_items_for_an_error_rate(error_rate: float, count: int) -> None:
    assert least_count(error_rate) == count


async def test_labels_that_are_no_classes() -> None:
    store = DictStore()
    await store.upsert("c", [replace(item, metadata={"class": ["a", "b"]}) for item in labelled(9)], tag=TAG)
    for path in (("class",), ("missing",)):
        with pytest.raises(InvalidRequest, match="no item of collection 'c'") as caught:
            await calibrate(store, await store.info("c"), Reference(path, 2))
        assert caught.value.param == "label"
    with pytest.raises(InvalidRequest, match="among those") as caught:
        await calibrate(store, await store.info("c"), Reference(("class",), 2, parse_filter({"key": "n", "eq": -1})))
    await store.upsert("c", labelled(5), tag=TAG)
    nobody = Reference(("class",), 2, held_out=parse_filter({"key": "n", "eq": -1}))
    with pytest.raises(InvalidRequest, match="no item of collection 'c' with the key 'class' passes it") as caught:
        await calibrate(store, await store.info("c"), nobody)
    assert caught.value.param == "calibration_filter"


async def test_vectors_of_another_model_are_refused() -> None:
    store = DictStore()
    await store.upsert("c", labelled(9), tag=TAG)
    info = await store.info("c")
    other = replace(info, spec=replace(info.spec, tag="other"))
    with pytest.raises(ModelMismatch):
        await classify_by_collection(store, SharedResults(), other, np.ones((1, D)), Reference(("class",), 2), 0.1)


def test_classification_by_examples() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), 12)
    examples, names = around(rng, labels, 0.15), [CLASSES[label] for label in labels]
    truth = rng.integers(0, 3, 200)
    known = classify_by_examples(examples, names, around(rng, truth, 0.15), 0.1)
    assert known.promised
    assert np.mean([verdict.unknown for verdict in known.verdicts]) == pytest.approx(0.1, abs=0.07)
    answered = [(v, CLASSES[t]) for v, t in zip(known.verdicts, truth, strict=True) if not v.unknown]
    assert all(verdict.label == label for verdict, label in answered)
    assert all(len(verdict.scores) == 3 and verdict.neighbours is None for verdict in known.verdicts)
    strange = classify_by_examples(examples, names, around(rng, rng.integers(10, 20, 100), 0.15), 0.1)
    assert np.mean([verdict.unknown for verdict in strange.verdicts]) > 0.9
    few = classify_by_examples(examples[::12], names[::12], around(rng, truth[:5]), 0.5)
    assert not few.promised
    assert [(v.unknown, v.p_value) for v in few.verdicts] == [(False, None)] * 5
    assert calibration_fields(few, 0.5).get("k") is None
