"""Tests of what clients in other languages and of other services send: null for fields that were never set, whole
numbers with a decimal point, images in objects, and text where an image belongs."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from service.data_urls import IMAGE_FIELDS, image_from_text
from service.documented_schemas import ImageObject
from service.errors import BrokenImage, InvalidRequest
from service.options import parse_options
from service.schema_base import Schema
from tests.fakes import DIMS, fake_artifact, photo, running

SHOP = "/v1/collections/shop"
EMBED = "/v1/embeddings"
GOOD = [1.0] * DIMS


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{text(image)}"


# ---- null

REQUIRED: dict[str, Any] = {
    "metadata": {},
    "collection": "shop",
    "snapshot": "s",
    "items": [1],
    "input": "x",
    "image": "x",
    "words": ["cat"],
    "images": ["x", "x"],
    "size": [1, 1],
    "counts": [1],
    "url": "data:,",
    "key": "n",
    "indexed": [],
    "references": [{"image": "x", "box": [0, 0, 1, 1]}],
    "x": 1,
    "y": 1,
}


REQUIRED_OF = {
    "CurateParams": {"data": ["shop"]},
    "EvaluateParams": {"model": "auto", "task": "knn", "data": "shop"},
    "ExportParams": {"source": "x"},
    "JobIn": {"kind": "export"},
    "LoadModelIn": {"model": "auto"},
    "ReindexParams": {"promote": True},
    "RetrainParams": {"data": ["shop"]},
    "ScheduleIn": {"kind": "export", "every": "6 h"},
    "TrainParams": {"data": ["shop"], "recipe": "smoke"},
    "_AnyParams": {"kind": "export"},
}
"""The fields that a body of these kinds needs."""


def all_schemas(base: type[Schema] = Schema) -> Iterator[type[Schema]]:
    for schema in base.__subclasses__():
        if not schema.__module__.startswith("tests."):
            yield schema
        yield from all_schemas(schema)


@pytest.mark.parametrize("schema", sorted(set(all_schemas()), key=lambda schema: schema.__name__))
def test_null_means_not_set_in_every_field_that_may_be_left_out(schema):
    fields = {field.alias or name: field for name, field in schema.model_fields.items()}
    required = REQUIRED_OF.get(schema.__name__) or {
        name: REQUIRED[name] for name, field in fields.items() if field.is_required()
    }
    plain = parse_options(schema, required)
    nulls = {name: None for name in fields if name not in required}
    for name in nulls:
        assert parse_options(schema, required | {name: None}) == plain
    parsed = parse_options(schema, required | nulls)
    assert parsed == plain
    assert parsed.model_fields_set == plain.model_fields_set
    if schema.model_config["extra"] == "forbid":
        with pytest.raises(InvalidRequest, match="typo: unknown field"):
            parse_options(schema, required | {"typo": None})
    for name in required:
        if fields[name].is_required() and fields[name].annotation is not Any:  # other code checks such fields
            with pytest.raises(InvalidRequest, match=name):
                parse_options(schema, required | {name: None})


async def test_null_in_bodies_over_http(tmp_path):
    nulls = {"encoding_format": None, "dimensions": None, "user": None, "model": None, "on_error": None}
    nulls |= {"pooling": None, "normalize": None}
    index = {"kind": None, "m": None, "ef_construction": None, "n_lists": None, "target_recall": None}
    item = {"id": "a", "image": None, "vector": GOOD, "fingerprint": None, "source": None, "metadata": None}
    ranking = {"k": None, "offset": None, "filter": None, "score_threshold": None, "group_by": None, "params": None}
    ranking |= {"group_size": None, "rerank": None, "rerank_depth": None, "matches": None, "include": None}
    query = {"image": None, "id": None, "combine": None, "region": None, "fingerprint": None, **ranking}
    async with running(tmp_path) as run:
        post = run.client.post
        embedded = await post(EMBED, json={"input": data_url(photo()), **nulls})
        created = await run.client.put(SHOP, json={"index": index, "indexed": None, "originals": None, "dtype": None})
        added = await post(f"{SHOP}/items", json={"items": [item], "on_error": None, "model": None})
        single = {"vector": GOOD, "queries": None, "on_error": None, "model": None}
        found = await post(f"{SHOP}/search", json={**query, **single})
        params = {"exact": None, "ef_search": None, "nprobe": None}
        part = {"image": None, "vector": GOOD, "fingerprint": None, "id": None, "weight": None}
        combined = await post(f"{SHOP}/search", json={**query, "combine": [part], "params": params})
        batch = await post(f"{SHOP}/search", json={"queries": [{**query, "vector": GOOD}], "k": 1, "on_error": None})
        segmented = await post("/v1/segment", json={"image": text(photo()), "format": None, "include": None})
        scrolled = await post(f"{SHOP}/items/scroll", json={"filter": None, "cursor": None, "limit": None})
        where = {"key": "n", "eq": None, "in": None, "gt": None, "lt": None, "exists": False, "and": None}
        counted = await post(f"{SHOP}/items/count", json={"filter": where})
        same = await post(f"{SHOP}/duplicates", json={"by": None, "threshold": None, "limit": None, "params": None})
    for answer in (embedded, created, added, found, combined, batch, segmented, scrolled, counted, same):
        assert answer.is_success, answer.text
    assert created.json()["index"]["target_recall"] == 0.98
    assert [row["id"] for row in found.json()["data"]] == ["a"]
    assert counted.json()["count"] == 1


async def test_null_in_a_query_leaves_the_option_beside_queries(tmp_path):
    async with running(tmp_path) as run:
        items = [{"id": f"v{i}", "vector": GOOD, "metadata": {"n": i}} for i in range(3)]
        await run.client.post(f"{SHOP}/items", json={"items": items})
        shared = {"k": 2, "filter": {"key": "n", "gt": 0}}
        queries = [{"vector": GOOD}, {"vector": GOOD, "k": None, "filter": None}]
        answer = (await run.client.post(f"{SHOP}/search", json={"queries": queries, **shared})).json()
    first, second = ([row["id"] for row in result["data"]] for result in answer["results"])
    assert first == second == ["v1", "v2"]


# ---- whole numbers


async def test_whole_numbers_may_have_a_decimal_point(tmp_path):
    async with running(tmp_path) as run:
        index = {"kind": "hnsw", "m": 16.0, "ef_construction": 64.0}
        created = await run.client.put(SHOP, json={"index": index, "dimension": float(DIMS)})
        items = [{"id": f"v{i}", "vector": GOOD} for i in range(3)]
        await run.client.post(f"{SHOP}/items", json={"items": items})
        body = {"vector": GOOD, "k": 1.0, "offset": 1.0, "params": {"ef_search": 64.0}}
        found = await run.client.post(f"{SHOP}/search", json=body)
        page = await run.client.post(f"{SHOP}/items/scroll", json={"limit": 2.0})
        embedded = await run.client.post(EMBED, json={"input": text(photo()), "dimensions": float(DIMS)})
        wrong = [await run.client.post(f"{SHOP}/search", json=body | {"k": k}) for k in (1.5, True, "1", 1e300)]
    assert (created.status_code, created.json()["index"]["m"]) == (201, 16)
    assert [row["id"] for row in found.json()["data"]] == ["v1"]
    assert len(page.json()["data"]) == 2
    assert embedded.status_code == 200
    assert [answer.status_code for answer in wrong] == [422] * 4
    assert "1 to 1000" in wrong[0].json()["detail"]


# ---- images in objects

IMAGE = photo(5)
URL = data_url(IMAGE)
FORMS = {
    "OpenAI": {"type": "image_url", "image_url": {"url": URL}},
    "OpenAI, with a detail": {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
    "OpenAI responses": {"type": "input_image", "image_url": URL},
    "LiteLLM": {"type": "image_url", "image_url": URL},
    "Jina": {"image": URL},
    "Jina, base64": {"image": text(IMAGE)},
    "Jina, bytes": {"bytes": text(IMAGE)},
    "Voyage": {"content": [{"type": "image_base64", "image_base64": URL}]},
    "Cohere": {"content": [{"type": "image_url", "image_url": {"url": URL}}]},
    "LangChain 0.3": {"type": "image", "source_type": "base64", "data": text(IMAGE), "mime_type": "image/png"},
    "LangChain 1": {"type": "image", "base64": text(IMAGE), "mime_type": "image/png"},
    "LangChain 1, url": {"type": "image", "url": URL},
    "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text(IMAGE)}},
    "nulls": {"type": "image_url", "text": None, "image_url": {"url": URL}, "image": None, "content": None},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
async def test_images_in_objects_of_other_services(tmp_path, form):
    async with running(tmp_path) as run:
        plain = await run.client.post(EMBED, json={"input": URL})
        for sent in (form, [form], [form, URL]):
            answer = await run.client.post(EMBED, json={"input": sent})
            assert answer.json()["data"][0] == plain.json()["data"][0]
        added = await run.client.post(f"{SHOP}/items", json={"items": [{"id": "a", "image": form}]})
        found = await run.client.post(f"{SHOP}/search", json={"image": form})
        mask = await run.client.post("/v1/segment", json={"image": form})
    assert added.status_code == 200
    assert found.json()["data"][0]["score"] == pytest.approx(1, abs=1e-6)
    assert mask.headers["Content-Type"] == "image/png"


NEST: Any = []
for _ in range(500):
    NEST = [NEST]
LINK = "https://example.com/a.jpg"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"type": "image_url", "image_url": {"url": LINK}}, "does not fetch links"),
        ({"type": "image_url", "image_url": LINK}, "does not fetch links"),
        ({"image": LINK}, "does not fetch links"),
        ({"content": [{"type": "image_url", "image_url": LINK}]}, "does not fetch links"),
        ("s3://bucket/a.jpg", "does not fetch links"),
        ("file:///etc/passwd", "does not fetch links"),
        ({"text": "a red shoe"}, "'a red shoe' is not an image. This service embeds images, not text"),
        ({"type": "text", "text": "a red shoe"}, "not text"),
        ({"image": URL, "text": "a red shoe"}, "not text"),
        ({"content": [{"type": "text", "text": "shoe"}]}, "not text"),
        ({"content": [{"type": "text", "text": "shoe"}, {"image": URL}]}, "content has 2 parts"),
        ({"content": []}, "content has 0 parts"),
        ({"image": URL, "url": URL}, "exactly one of image, image_url"),
        ({}, "exactly one of image, image_url"),
        ({"video": URL}, "not ['video']"),
        ({"image": {"image": {"image": {"image": {"image": URL}}}}}, "nested more than 4 levels deep"),
        ({"text": NEST}, "not text"),
        ([NEST], "Numbers may be"),
        ([1, 2, 3], "[1, 2, 3] is not an image. Numbers may be the token ids of a text"),
        (7, "7 is not an image"),
        (True, "must be text or an object, not bool"),
        (None, "must be text or an object, not NoneType"),
    ],
)
async def test_what_is_not_an_image_is_refused_with_a_reason(tmp_path, sent, words):
    async with running(tmp_path) as run:
        answer = await run.client.post(EMBED, json={"input": [sent, URL], "on_error": "partial"})
    [error] = answer.json()["errors"]
    assert (error["index"], error["code"], error["status"]) == (0, "invalid_request", 422)
    assert words in error["detail"]
    assert len(error["detail"]) < 500


@pytest.mark.parametrize(
    "words",
    [
        "a red shoe",
        "shoe",
        "Shoe",
        "red-shoe",
        "a photo of a red shoe with white laces, on a wooden floor, seen from above in the afternoon light",
        "Ein roter Schuh mit weißen Schnürsenkeln",
        "赤い靴",
        "photo.jpg",
        "/home/me/photos/shoe.jpg",
        "C:\\photos\\shoe.png",
        "<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    ],
)
async def test_text_is_told_apart_from_base64(tmp_path, words):
    async with running(tmp_path) as run:
        answer = await run.client.post(EMBED, json={"input": words})
        batch = await run.client.post(EMBED, json={"input": [words, URL], "on_error": "partial"})
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert "This service embeds images, not text: send a data URL (data:image/jpeg;base64,...), plain base64" in message
    assert [row["index"] for row in batch.json()["data"]] == [1]


def test_base64_is_not_taken_for_text():
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        image = photo(3, kind=kind)
        lines = text(image)
        for spelt in (
            lines,
            " ".join(lines[i : i + 40] for i in range(0, len(lines), 40)),
            f"\n  {lines[:90]}\n  {lines[90:]}",
        ):
            assert image_from_text(spelt, 10_000, {}) == image
    for data in (b"%PDF-1.7 and so on", b"", bytes(40), bytes(range(200))):  # `decode` says what these are
        assert image_from_text(text(data), 1000, {}) == data
    with pytest.raises(BrokenImage):
        image_from_text("%%%", 1000, {})


# ---- OpenAI's fields


async def test_models_have_the_fields_of_openai(tmp_path):
    async with running(tmp_path) as run:
        listed = (await run.client.get("/v1/models")).json()["data"][0]
        one = (await run.client.get("/v1/models/auto")).json()
    assert listed == one
    assert (one["object"], one["created"], one["created_at"]) == ("model", 1767225600, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2026-01-01T00:00:00Z", 1767225600),
        ("2026-01-01T00:00:00", 1767225600),
        ("2026-01-01T02:00:00+02:00", 1767225600),
        ("last week", 0),
    ],
)
async def test_the_time_of_an_export_in_other_forms(tmp_path, written, seconds):
    artifact = fake_artifact()
    artifact = replace(artifact, manifest=artifact.manifest.model_copy(update={"created": written}))
    async with running(tmp_path, artifact=artifact) as run:
        assert (await run.client.get("/v1/models")).json()["data"][0]["created"] == seconds


def test_the_documented_image_object_has_all_fields():
    assert {"type", "content", *IMAGE_FIELDS} == set(ImageObject.model_fields)
    for form in FORMS.values():
        ImageObject.model_validate(form)
