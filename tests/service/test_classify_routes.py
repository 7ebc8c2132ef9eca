"""Tests of `POST /v1/classify`: by a collection, by examples, in every kind of body, and bad input."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.artifact import Artifact
from model.config import ViTConfig
from model.heads.linear import layer_norm
from model.heads.record import HeadDescription
from model.heads.store import Head, add_head, choose_head, open_head
from service.features.pipeline import View
from service.retrieval.class_schemas import MAX_K
from service.search.store import CollectionSpec, Item
from tests.dict_store import DictStore
from tests.fakes import DIMS, Running, fake_artifact, photo, plain_photo, running
from tests.model.heads.artifacts import small_artifact

PATH = "/v1/classify"
PNG = {"Content-Type": "image/png"}
N = 12


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def similar(seed: int, number: int) -> bytes:
    """Return image `number` of a series of images that look like image `seed`."""
    with Image.open(io.BytesIO(photo(seed))) as image:
        pixels = np.asarray(image, np.int16)
    changed = pixels + np.random.default_rng([seed, number]).integers(-20, 21, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(changed.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


async def fill(run: Running, name: str = "shop", pooling: Any = "cls", count: int = N) -> None:
    """Store images 0 to `count` - 1. The class of an image is "even" or "odd"."""
    tag = run.service.tag(pooling=pooling)
    embedded = await run.embed([photo(i) for i in range(count)])
    vectors = [one.result().vector(pooling, True) for one in embedded]
    items = [
        Item(f"p{i:02}", vector, {"class": "odd" if i % 2 else "even", "n": i, "deep": {"class": i}})
        for i, vector in enumerate(vectors)
    ]
    await run.service.store.create(name, CollectionSpec(tag, len(vectors[0])))
    await run.service.store.upsert(name, items, tag=tag)
    run.engine.batches.clear()


async def ask(run: Running, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = await run.client.post(PATH, json=body)
    assert answer.status_code == status, answer.text
    result: dict[str, Any] = answer.json()
    return result


async def test_images_are_classified_by_the_labels_of_a_collection(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await fill(run)
        body = {"images": [text(photo(3)), text(photo(4))], "collection": "shop", "label": "class", "k": 1}
        answer = await ask(run, body)
        assert run.engine.images == 0  # the images are in the cache
        second = await run.client.post(PATH, json=body)
    assert [row["label"] for row in answer["data"]] == ["odd", "even"]
    for index, row in enumerate(answer["data"]):
        assert row["index"] == index
        assert row["unknown"] is False
        assert row["p_value"] == 1.0  # the image itself is in the collection
        assert row["scores"] == [{"label": ["odd", "even"][index], "score": 1.0}]
        assert row["neighbours"] == [{"id": f"p0{3 + index}", "label": row["label"], "score": pytest.approx(1)}]
    assert answer["collection"] == "shop"
    assert answer["fingerprint"] == "a" * 64
    calibration = answer["calibration"]
    assert calibration["note"].startswith("12 known images are too few for the error rate 0.05")
    assert {name: calibration[name] for name in ("method", "items", "drawn_from", "k", "promised", "error_rate")} == {
        "method": "leave-one-out",
        "items": N,
        "drawn_from": N,
        "k": 1,
        "promised": False,
        "error_rate": 0.05,
    }
    assert calibration["least_error_rate"] == pytest.approx(1 / (N + 1))
    assert "classify;dur=" in second.headers["Server-Timing"]
    assert "total" in answer["timings"]


async def test_an_image_that_resembles_no_item_is_unknown(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        tag = run.service.tag()
        embedded = await run.embed([similar(1 + i % 2, i) for i in range(N)])
        items = [Item(f"p{i}", e.result().vector("cls", True), {"class": i % 2}) for i, e in enumerate(embedded)]
        await run.service.store.upsert("shop", items, tag=tag)
        body = {"images": [text(plain_photo(0)), text(photo(1))], "collection": "shop", "label": "class", "k": 3}
        answer = await ask(run, body | {"error_rate": 0.1})
        low = await ask(run, body | {"error_rate": 0.01})
    strange, known = answer["data"]
    assert (strange["label"], strange["unknown"], strange["p_value"]) == (None, True, pytest.approx(1 / (N + 1)))
    assert strange["scores"][0]["label"] in (0, 1)  # the nearest class is still listed
    assert (known["label"], known["unknown"]) == (0, False)
    assert answer["calibration"]["promised"] is True
    assert "note" not in answer["calibration"]
    assert low["data"][0]["unknown"] is False
    assert low["calibration"]["promised"] is False
    assert "at least 99 are needed" in low["calibration"]["note"]


async def test_options_of_a_collection(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await fill(run)
        body = {"images": text(photo(3)), "collection": "shop", "label": "class"}
        even = await ask(run, body | {"filter": {"key": "class", "eq": "even"}, "k": 2, "params": {"exact": True}})
        held_out = await ask(run, body | {"calibration_filter": {"key": "n", "gte": 6}, "top": 1})
        deep = await ask(run, body | {"label": "deep.class", "k": 4, "top": 3})
        await run.service.store.set_alias("live", "shop")
        alias = await ask(run, body | {"collection": "live", "k": None})
    assert {n["label"] for n in even["data"][0]["neighbours"]} == {"even"}
    assert (even["calibration"]["items"], even["calibration"]["k"]) == (6, 2)
    assert held_out["calibration"]["method"] == "held-out"
    assert (held_out["calibration"]["items"], held_out["calibration"]["k"]) == (6, 6)
    assert {n["id"] for n in held_out["data"][0]["neighbours"]} == {f"p0{i}" for i in range(6)}
    assert len(held_out["data"][0]["scores"]) == 1
    assert deep["data"][0]["scores"][0]["label"] == 3
    assert len(deep["data"][0]["scores"]) == 3
    assert alias["collection"] == "live"
    assert alias["calibration"]["k"] == 10


async def test_the_vector_of_an_image_has_the_pooling_of_the_collection(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await fill(run, "joined", "cls+mean")
        answer = await ask(run, {"images": text(photo(5)), "collection": "joined", "label": "class", "k": 1})
    assert answer["data"][0]["neighbours"] == [{"id": "p05", "label": "odd", "score": pytest.approx(1)}]


async def test_classes_by_examples(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        body = {"images": text(photo(1)), "classes": {"one": text(photo(1)), "both": [text(photo(2)), text(photo(3))]}}
        answer = await ask(run, body)
        assert run.engine.images == 3
        mean = await ask(run, body | {"pooling": "mean"})
        vectors = [one.result().vector("mean", True) for one in await run.embed([photo(i) for i in (1, 2, 3)])]
    [row] = answer["data"]
    assert row["label"] == "one"
    assert row["scores"][0] == {"label": "one", "score": pytest.approx(1)}
    assert "neighbours" not in row
    assert "collection" not in answer
    calibration = answer["calibration"]
    assert (calibration["method"], calibration["items"], calibration["promised"]) == ("examples", 2, False)
    assert "k" not in calibration
    both = vectors[1] + vectors[2]
    expected = float(vectors[0] @ (both / np.linalg.norm(both)))
    assert mean["data"][0]["scores"][1] == {"label": "both", "score": pytest.approx(expected, abs=1e-5)}


async def test_examples_of_enough_images_find_unknowns(tmp_path: Path) -> None:
    classes = {name: [text(similar(seed, i)) for i in range(10)] for name, seed in (("one", 1), ("two", 2))}
    async with running(tmp_path) as run:
        images = [text(plain_photo(0)), text(photo(1))]
        answer = await ask(run, {"images": images, "classes": classes, "error_rate": 0.1})
    assert [row["label"] for row in answer["data"]] == [None, "one"]
    assert [row["unknown"] for row in answer["data"]] == [True, False]
    assert answer["calibration"]["items"] == 20
    assert answer["calibration"]["promised"] is True


async def test_forms_and_raw_images(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await fill(run)
        options = {"collection": "shop", "label": "class", "k": "1", "filter": '{"key": "n", "lt": 5}'}
        form = await run.client.post(PATH, files=[("file", photo(3)), ("file", photo(4))], data=options)
        raw = await run.client.post(PATH, params=options | {"error_rate": "0.2"}, content=photo(3), headers=PNG)
        bad = await run.client.post(PATH, params=options | {"filter": "{"}, content=photo(3), headers=PNG)
        neither = await run.client.post(PATH, content=photo(3), headers=PNG)
    assert [row["label"] for row in form.json()["data"]] == ["odd", "even"]
    assert raw.json()["data"][0]["label"] == "odd"
    assert raw.json()["calibration"]["error_rate"] == 0.2
    assert (bad.status_code, bad.json()["param"]) == (422, "filter")
    assert neither.status_code == 422
    assert "classes can only be sent in JSON" in neither.json()["detail"]


async def test_a_broken_image_fails_the_request_or_only_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await fill(run)
        body = {"images": [text(photo(3)), text(photo(4)[:60])], "collection": "shop", "label": "class", "k": 1}
        whole = await ask(run, body, 422)
        some = await ask(run, body | {"on_error": "partial"})
        other_way = await ask(run, body | {"on_error": "partial", "images": body["images"][::-1]})
        none = await ask(run, body | {"on_error": "partial", "images": "a red shoe"}, 422)
    assert whole["errors"][0]["index"] == 1
    assert [row["index"] for row in some["data"]] == [0]
    assert [error["index"] for error in some["errors"]] == [1]
    assert [(row["index"], row["label"]) for row in other_way["data"]] == [(1, "odd")]
    assert none["errors"][0]["index"] == 0


GOOD = {"images": "IMAGE", "collection": "shop", "label": "class"}
EXAMPLES = {"images": "IMAGE", "classes": {"a": "IMAGE"}}


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (GOOD | {"collection": "none"}, 404, None, "there is no collection 'none'"),
        (GOOD | {"collection": "UP"}, 422, "collection", "collection name 'UP' is not allowed"),
        (GOOD | {"collection": "other"}, 409, None, "cannot be compared"),
        (GOOD | {"collection": "empty"}, 422, "label", "no item of collection 'empty'"),
        (GOOD | {"label": "colour"}, 422, "label", "metadata key 'colour'"),
        (GOOD | {"label": None}, 422, "label", "label is missing"),
        (GOOD | {"label": "a..b"}, 422, "label", "key 'a..b' is not allowed"),
        (GOOD | {"k": 0}, 422, "k", "greater than or equal to 1, not 0"),
        (GOOD | {"k": MAX_K + 1}, 422, "k", "less than or equal to 100, not 101"),
        (GOOD | {"top": 0}, 422, "top", "greater than or equal to 1, not 0"),
        (GOOD | {"error_rate": 0}, 422, "error_rate", "greater than or equal to 0.001, not 0"),
        (GOOD | {"error_rate": 0.51}, 422, "error_rate", "less than or equal to 0.5, not 0.51"),
        (GOOD | {"error_rate": "nan"}, 422, "error_rate", "not 'nan'"),
        (GOOD | {"filter": {"key": "n"}}, 422, "filter", "operator"),
        (GOOD | {"filter": {"key": "n", "gt": 99}}, 422, "label", "among those that may be neighbours"),
        (GOOD | {"calibration_filter": {"key": "n", "gt": 99}}, 422, "calibration_filter", "passes it"),
        (GOOD | {"pooling": "mean"}, 422, "pooling", "pooling: not possible with collection, only with classes"),
        (GOOD | {"model": "gpt"}, 404, "model", "'gpt' is not served"),
        (GOOD | {"colour": 1}, 422, "colour", "unknown field"),
        (GOOD | {"images": []}, 422, "images", "0 images in images"),
        (GOOD | {"images": ["IMAGE"] * 9}, 422, "images", "9 images in images: a request can have 1 to 8"),
        (GOOD | {"params": {"exact": 1, "x": 2}}, 422, "params", "params.x: unknown field"),
        (
            GOOD | EXAMPLES,
            422,
            "collection",
            "exactly one of collection, classes, head is needed, not collection and classes",
        ),
        ({"images": "IMAGE"}, 422, "collection", "exactly one of collection, classes, head is needed, not none"),
        (EXAMPLES | {"classes": {}}, 422, "classes", "at least one class"),
        (EXAMPLES | {"classes": []}, 422, "classes", "must be an object"),
        (EXAMPLES | {"classes": {"a": []}}, 422, "classes", "'a' has no image"),
        (EXAMPLES | {"classes": {"": "IMAGE"}}, 422, "classes", "the name '' is not allowed"),
        (EXAMPLES | {"classes": {"a\n": "IMAGE"}}, 422, "classes", "is not allowed"),
        (EXAMPLES | {"classes": {"a": ["IMAGE", "BROKEN"]}}, 422, "classes", "image 1 of 'a' cannot be used: "),
        (EXAMPLES | {"classes": {"a": ["IMAGE", "a red shoe"]}}, 422, "classes", "image 1 of 'a' cannot be used: "),
        (EXAMPLES | {"classes": {"a": "PDF"}}, 415, "classes", "image 0 of 'a' cannot be used: "),
        (EXAMPLES | {"classes": {"a": ["IMAGE"] * 8}}, 422, "classes", "9 images in images and classes"),
        (
            EXAMPLES | {"k": 3, "label": "class"},
            422,
            "label",
            "label and k: not possible with classes, only with collection",
        ),
    ],
)
async def test_bad_input(tmp_path: Path, body: dict[str, Any], status: int, param: str | None, words: str) -> None:
    images = {"IMAGE": text(photo(77)), "BROKEN": text(photo(2)[:60]), "PDF": text(b"%PDF-1.4 " + bytes(200))}
    filled = json.dumps(body)
    for name, image in images.items():
        filled = filled.replace(f'"{name}"', f'"{image}"')
    async with running(tmp_path, store=DictStore(), max_batch_items=8) as run:
        await fill(run, count=4)
        await run.service.store.create("empty", CollectionSpec(run.service.tag(), DIMS))
        await run.service.store.upsert("other", [Item("a", np.ones(DIMS), {"class": 1})], tag="another")
        answer = await ask(run, json.loads(filled), status)
        assert run.engine.images == 0 or "classes" in body  # no image is embedded before the collection is checked
    assert words in answer["detail"]
    assert answer.get("param") == param


def with_head(folder: Path, layers: tuple[int, ...]) -> Artifact:
    """Return an artifact with a classification head that reads these blocks. Its model has one block per entry."""
    config = ViTConfig(embed_dim=DIMS, depth=len(layers), num_heads=1, img_size=28)
    artifact = small_artifact(folder, config=config)
    head = HeadDescription(
        name="colours", kind="classification", layers=layers, normed=True, classes=("red", "green"), source="a test"
    )
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, DIMS * (len(layers) + 1)), dtype=np.float32)
    add_head(artifact, head, {"weight": weight, "bias": np.array([0.5, -0.5], np.float32)})
    return artifact


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
async def test_a_head_of_the_model_classifies(tmp_path: Path, layers: tuple[int, ...]) -> None:
    artifact = with_head(tmp_path / "small-aaaaaaaa", layers)
    async with running(tmp_path, artifact=artifact) as run:
        images = [text(photo(1)), "a red shoe", text(photo(2))]
        answer = await ask(run, {"images": images, "head": "colours", "on_error": "partial"})
        auto = await run.client.post(PATH, params={"head": "auto", "top": 1}, content=photo(2), headers=PNG)
        embedded = [outcome.result() for outcome in await run.embed([photo(1), photo(2)])]
        seen = [
            await run.service.pipeline.analyse(photo(i), lambda one: one.outputs, View(("tokens.0",))) for i in (1, 2)
        ]
    head = open_head(artifact, choose_head(artifact, "classification", None))
    assert [row["index"] for row in answer["data"]] == [0, 2]
    for row, one, outputs in zip(answer["data"], embedded, seen, strict=True):
        cls, mean = one.vector("cls", False), one.vector("mean", False)
        first = layer_norm(outputs["tokens.0"], *head.norm, 1e-6)[0]
        inputs = [cls, mean] if layers == (0,) else [first, cls, mean]
        logits = head.tensors["weight"] @ np.concatenate(inputs) + head.tensors["bias"]
        expected = np.exp(logits) / np.exp(logits).sum()
        scores = {score["label"]: score["score"] for score in row["scores"]}
        assert scores == {"red": pytest.approx(expected[0], abs=1e-5), "green": pytest.approx(expected[1], abs=1e-5)}
        assert row["label"] == max(scores, key=lambda label: scores[label])
        assert row["scores"][0]["score"] > row["scores"][1]["score"]
        assert (row["unknown"], row["p_value"], "neighbours" in row) == (False, None, False)
    assert (answer["head"], answer["errors"][0]["index"]) == ("colours", 1)
    assert "calibration" not in answer
    assert auto.json()["head"] == "colours"
    assert len(auto.json()["data"][0]["scores"]) == 1


async def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "classify", lambda *_: np.array([np.inf, 1], np.float32))
    async with running(tmp_path, artifact=with_head(tmp_path / "small-aaaaaaaa", (0,))) as run:
        answer = await ask(run, {"images": text(photo(1)), "head": "colours"}, 500)
    assert "the head 'colours' gives classes that are not finite" in answer["detail"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"head": "none"}, 422, "there is no head named 'none'; heads for classification: colours"),
        ({"head": "colours", "collection": "shop"}, 422, "not collection and head"),
        ({"head": "colours", "error_rate": 0.1}, 422, "error_rate: not possible with head, only with collection or"),
        ({"head": "colours", "pooling": "cls"}, 422, "pooling: not possible with head, only with classes"),
        ({"head": ""}, 422, "head: String should have at least 1 character"),
    ],
)
async def test_bad_input_with_a_head(tmp_path: Path, body: dict[str, Any], status: int, words: str) -> None:
    async with running(tmp_path, artifact=with_head(tmp_path / "small-aaaaaaaa", (0,))) as run:
        answer = await ask(run, {"images": text(photo(1))} | body, status)
        assert run.engine.images == 0
    assert words in answer["detail"]


async def test_a_model_without_heads_says_how_to_get_one(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        answer = await ask(run, {"images": text(photo(1)), "head": "auto"}, 422)
    assert "has no head for classification; `dinov2 heads add`" in answer["detail"]
    assert answer["param"] == "head"


async def test_a_damaged_head_is_a_fault_of_the_server(tmp_path: Path) -> None:
    artifact = with_head(tmp_path / "small-aaaaaaaa", (0,))
    (artifact.path / "heads" / "colours" / "head.safetensors").write_bytes(b"damaged")
    async with running(tmp_path, artifact=artifact) as run:
        answer = await ask(run, {"images": text(photo(1)), "head": "colours"}, 500)
    assert answer["code"] == "engine_failed"


async def test_a_failing_engine_is_no_fault_of_the_example(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        run.engine.fails = lambda pixels: True
        answer = await ask(run, {"images": text(photo(1)), "classes": {"a": text(photo(2))}}, 500)
    assert "'a'" not in answer["detail"]


async def test_a_collection_of_another_model_is_refused_before_an_image_is_embedded(tmp_path: Path) -> None:
    store = DictStore()
    async with running(tmp_path, store=store, artifact=fake_artifact(digit="b")) as run:
        await store.upsert("shop", [Item("a", np.ones(DIMS), {"class": 1})], tag="a" * 64 + "/cls/l2/28x28/fp32")
        answer = await ask(run, {"images": text(photo(1)), "collection": "shop", "label": "class"}, 409)
        assert run.engine.images == 0
    assert answer["code"] == "model_mismatch"
