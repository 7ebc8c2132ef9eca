"""Tests of hostile request bodies: each costs little, gets a short error, and damages no stored data."""

import base64
import threading
import time

import pytest

from service import data_urls
from service.data_urls import image_from_text
from service.errors import BrokenImage, ImageTooLarge, InvalidRequest
from service.middleware import error_body
from service.off_loop import BIG_BODY, off_loop
from service.options import check_fields
from service.search.checks import metadata_text
from tests.fakes import most_s, no_file_left_open, photo, running

JSON = {"Content-Type": "application/json"}
ITEMS = "/v1/collections/shop/items"
CLASSIFY = "/v1/classify"


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (ITEMS, b'{"items":[' + b"0," * 200_000 + b"0]}", "200001 images in items"),
        (ITEMS, b'{"items":[{' + b",".join(b'"k%d":0' % i for i in range(5000)) + b"}]}", "items.0 has 5,000 fields"),
        ("/v1/segment", b'{"image":"","include":[' + b"0," * 200_000 + b"0]}", "include"),
        ("/v1/embeddings", b'{"input":"",' + b",".join(b'"k%d":0' % i for i in range(50_000)) + b"}", "50,000 fields"),
        ("/v1/embeddings", b'{"input":"","' + b"k" * 2_000_000 + b'":0}', "unknown field"),
        ("/v1/embeddings", b'{"input":[' + b"[]," * 700_000 + b"[]]}", "more than 1,000,000 JSON values"),
        ("/v1/collections/shop/search", b'{"vector":[' + b'"x",' * 8000 + b'"x"]}', "vector.0"),
        ("/v1/embeddings", b'{"input":"","user":"' + b"u" * 1_000_000 + b'"}', "user"),
        (CLASSIFY, b'{"images":"","classes":{' + b",".join(b'"k%d":[]' % i for i in range(100_000)) + b"}}", "'k0'"),
        (CLASSIFY, b'{"images":"","classes":{"a":[' + b"0," * 200_000 + b"0]}}", "200002 images in images and classes"),
        (CLASSIFY, b'{"images":"","classes":{"' + b"k" * 1_000_000 + b'":""}}', "is not allowed: 1 to 256"),
    ],
    ids=[
        "items",
        "item-keys",
        "include",
        "keys",
        "long-key",
        "values",
        "vector",
        "long-value",
        "classes",
        "examples",
        "long-class",
    ],
)
async def test_a_hostile_body_is_refused_quickly_in_few_words(tmp_path, path, body, words):
    async with running(tmp_path) as run:
        await run.client.get("/livez")
        started = time.process_time()
        answer = await run.client.post(path, content=body, headers=JSON)
        spent = time.process_time() - started
    assert answer.status_code == 422
    assert words in answer.text
    assert len(answer.content) < 2000
    assert spent < most_s(body)


async def test_messages_name_the_value_and_what_is_allowed(tmp_path):
    async with running(tmp_path) as run:
        k = await run.client.post("/v1/collections/shop/search", json={"vector": [1.0], "k": 5000})
        typo = await run.client.post("/v1/embeddings", json={"input": "", "poling": "cls"})
        pooling = await run.client.post("/v1/embeddings", json={"input": "", "pooling": "max"})
    assert "k: Input should be less than or equal to 1000, not 5000" in k.json()["detail"]
    assert "poling: unknown field; known fields are model, encoding_format" in typo.json()["error"]["message"]
    assert "'cls', 'mean' or 'cls+mean', not 'max'" in pooling.json()["error"]["message"]


def test_an_object_may_have_32_fields():
    check_fields({f"k{i}": 0 for i in range(32)}, "it")
    with pytest.raises(InvalidRequest, match="it has 33 fields; at most 32"):
        check_fields({f"k{i}": 0 for i in range(33)}, "it")


async def test_a_large_body_is_taken_apart_on_a_thread():
    here = threading.get_ident()
    assert await off_loop(BIG_BODY - 1, threading.get_ident) == here
    assert await off_loop(BIG_BODY, threading.get_ident) != here


@pytest.mark.parametrize("size", [1, 10, 11, 12, 1000])
def test_base64_is_measured_before_it_is_decoded(monkeypatch, size):
    image = bytes(range(size % 251)) + bytes(size - size % 251)
    for padded in (True, False):
        text = base64.b64encode(image).decode()
        assert image_from_text(text if padded else text.rstrip("="), size, {}) == image

    def never(*_args, **_options):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(data_urls.binascii, "a2b_base64", never)
    for prefix in ("", "data:image/png;base64,"):
        with pytest.raises(ImageTooLarge, match=f"the limit is {size}"):
            image_from_text(prefix + base64.b64encode(image + b"123").decode(), size, {})


def test_base64_in_any_of_its_spellings():
    image = b"\xfb\xff\xfe\xff" * 30
    text = base64.b64encode(image).decode()
    assert "+" in text
    assert "/" in text
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for spelt in (base64.urlsafe_b64encode(image).decode(), lines, text.rstrip("="), f" {text} "):
        assert image_from_text(spelt, 1000, {}) == image
    with pytest.raises(BrokenImage):
        image_from_text("%%%%", 1000, {})


async def test_at_most_ten_faults_are_told(tmp_path):
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/embeddings", json={"input": "", **{f"k{i}": 0 for i in range(25)}})
    assert answer.json()["error"]["message"].endswith("; and 15 more")


@pytest.mark.parametrize("levels", [250, 300])
async def test_metadata_that_no_answer_can_hold_is_refused_when_it_is_written(tmp_path, levels):
    image = base64.b64encode(photo()).decode()
    async with running(tmp_path) as run:
        bad = await run.client.post(ITEMS, json={"items": [{"id": "p", "image": image, "metadata": nested(levels)}]})
        deep = await run.client.post(ITEMS, json={"items": [{"id": "q", "image": image, "metadata": nested(200)}]})
        found = await run.client.post("/v1/collections/shop/search", json={"image": image})
    assert (bad.status_code, deep.status_code, found.status_code) == (422, 200, 200)
    assert "metadata" in bad.json()["detail"]
    assert [row["id"] for row in found.json()["data"]] == ["q"]
    with pytest.raises(InvalidRequest):
        metadata_text({"name": "\ud800"})


def form(*parts, end=b"--XX--\r\n", name=b"file"):
    return b"".join(
        b'--XX\r\nContent-Disposition: form-data; name="%s"; filename="p%d.png"\r\n\r\n%s\r\n' % (name, i, part)
        for i, part in enumerate(parts)
    ) + (end or b"")


@pytest.mark.parametrize("path", ["/v1/embeddings", ITEMS])
async def test_a_form_that_was_cut_off_is_refused_whole(tmp_path, path):
    headers = {"Content-Type": "multipart/form-data; boundary=XX"}
    whole = form(photo(1), photo(2))
    async with running(tmp_path) as run:
        with no_file_left_open():
            cut = [await run.client.post(path, content=whole[:n], headers=headers) for n in (-9, -30, 150)]
        good = await run.client.post(path, content=whole, headers=headers)
        listed = await run.client.get("/v1/collections")
    assert [answer.status_code for answer in cut] == [400, 400, 400]
    assert all("ends before its last boundary" in answer.text for answer in cut)
    assert good.status_code == 200
    assert [info["count"] for info in listed.json()["data"]] == ([2] if path == ITEMS else [])


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-7", "unicode_escape", "no-such"])
async def test_a_form_in_a_charset_that_json_cannot_hold_is_refused(tmp_path, charset):
    body = form(photo(), name=b"+2AA-")
    headers = {"Content-Type": f"multipart/form-data; boundary=XX; charset={charset}"}
    async with running(tmp_path) as run:
        refused = await run.client.post("/v1/embeddings", content=body, headers=headers)
        headers["Content-Type"] = "multipart/form-data; boundary=XX; charset=UTF-8"
        taken = await run.client.post("/v1/embeddings", content=form(photo()), headers=headers)
    assert (refused.status_code, taken.status_code) == (400, 200)
    assert charset in refused.json()["error"]["message"]


def test_an_error_with_half_a_surrogate_pair_is_still_json():
    for path in ("/v1/embeddings", "/v1/collections"):
        _, body = error_body(InvalidRequest("name \ud800"), path, "id")
        assert b"\\ud800" in body


@pytest.mark.parametrize("prefix", ["DATA:image/png;BASE64,", " data:image/png;base64,", "data:IMAGE/PNG;base64,"])
async def test_a_data_url_in_any_case(tmp_path, prefix):
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/embeddings", json={"input": prefix + base64.b64encode(photo()).decode()})
    assert answer.status_code == 200


@pytest.mark.parametrize("scale", [1e300, 1e-300])
async def test_a_vector_of_any_scale_has_a_direction(tmp_path, scale):
    image = base64.b64encode(photo()).decode()
    async with running(tmp_path) as run:
        await run.client.post(ITEMS, json={"items": [{"image": image}]})
        vector = (await run.client.post("/v1/embeddings", json={"input": image})).json()["data"][0]["embedding"]
        body = {"vector": [value * scale for value in vector]}
        answer = await run.client.post("/v1/collections/shop/search", json=body)
    assert answer.json()["data"][0]["score"] == pytest.approx(1, abs=1e-6)


async def test_the_deepest_metadata_that_is_accepted_can_be_answered_in_every_form(tmp_path):
    image = base64.b64encode(photo()).decode()
    async with running(tmp_path) as run:
        accepted = []
        for levels in range(240, 256):
            item = {"id": "p", "image": image, "metadata": {"g": 1, **nested(levels)}}
            answer = await run.client.post(ITEMS, json={"items": [item]})
            assert answer.status_code in (200, 422), answer.text
            accepted += [levels] if answer.status_code == 200 else []
        assert accepted == list(range(240, accepted[-1] + 1))
        query = {"image": image, "k": 1}
        for body in (
            query,
            {**query, "group_by": "g"},
            {"queries": [query]},
            {"queries": [{**query, "group_by": "g"}]},
        ):
            found = await run.client.post(ITEMS.replace("/items", "/search"), json=body)
            assert found.status_code == 200, found.text[:300]
