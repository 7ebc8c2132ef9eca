"""Tests of compressed request bodies and compressed answers."""

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib

import httpx
import pytest

from service.encodings import MAX_MEMBERS, PIECE_BYTES, BodyDecoder, accepts_gzip, body_decoder
from service.errors import BadRequest
from tests.fakes import photo, running

EMBED = "/v1/embeddings"
PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:50]) + gzip.compress(data[50:])


CODINGS = [
    ("gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("x-gzip", two_members),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("identity", bytes),
]


async def pieces(data: bytes, size: int):
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize(("name", "encode"), CODINGS)
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_compressed_image_is_decoded(tmp_path, name, encode, size):
    async with running(tmp_path) as run:
        plain = await run.client.post(EMBED, content=photo(), headers=PNG)
        headers = PNG | {"Content-Encoding": name}
        packed = await run.client.post(EMBED, content=pieces(encode(photo()), size), headers=headers)
        assert run.service.lifecycle.buffer.used == 0
    assert packed.json()["data"] == plain.json()["data"]


@pytest.mark.parametrize(("name", "encode"), CODINGS)
async def test_compressed_json_and_forms_are_decoded(tmp_path, name, encode):
    async with running(tmp_path) as run:
        vectors = json.dumps({"items": [{"id": f"item {i}", "vector": [i + 1.0] * 8} for i in range(900)]}).encode()
        headers = JSON | {"Content-Encoding": name}
        added = await run.client.post("/v1/collections/shop/items", content=encode(vectors), headers=headers)
        request = httpx.Request("POST", "http://service", files={"file": photo()})
        headers = {"Content-Type": request.headers["Content-Type"], "Content-Encoding": name}
        form = await run.client.post(EMBED, content=encode(request.read()), headers=headers)
    assert (added.json()["count"], form.status_code) == (900, 200)


async def test_settings_in_a_compressed_body_are_not_lost(tmp_path):
    headers = JSON | {"Content-Encoding": "gzip"}
    async with running(tmp_path) as run:
        body = gzip.compress(b'{"dtype": "float16"}')
        made = await run.client.put("/v1/collections/shop", content=body, headers=headers)
    assert made.json()["dtype"] == "float16"


@pytest.mark.parametrize("name", ["br", "zstd", "gzip, gzip", "compress", "a" * 5000])
async def test_an_unknown_encoding_is_refused_with_the_known_ones(tmp_path, name):
    async with running(tmp_path) as run:
        answer = await run.client.post(EMBED, content=photo(), headers=PNG | {"Content-Encoding": name})
        twice = [("Content-Type", "image/png"), ("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")]
        double = await run.client.post(EMBED, content=gzip.compress(photo()), headers=twice)
    for refused in (answer, double):
        assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert refused.headers["Accept-Encoding"] == "gzip, deflate"
        assert len(refused.content) < 500


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("gzip", photo(), "not valid gzip"),
        ("gzip", gzip.compress(photo())[:-9], "ends too early"),
        ("gzip", gzip.compress(photo()) + b"junk", "not valid gzip"),
        ("gzip", gzip.compress(photo())[:-8] + bytes(8), "not valid gzip"),  # the checksum is wrong
        ("deflate", zlib.compress(photo())[:-3], "ends too early"),
        ("deflate", zlib.compress(photo()) + b"x", "continues after the end"),
        ("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1), f"more than {MAX_MEMBERS} members"),
    ],
    ids=["plain", "cut", "junk", "checksum", "cut deflate", "long deflate", "members"],
)
async def test_a_body_that_is_not_in_its_encoding_is_refused(tmp_path, name, body, words):
    async with running(tmp_path) as run:
        answer = await run.client.post(EMBED, content=body, headers=PNG | {"Content-Encoding": name})
        assert run.service.lifecycle.buffer.used == 0
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    assert words in answer.text


async def test_a_bomb_is_refused_at_the_limit_and_costs_neither_memory_nor_time(tmp_path):
    bomb = gzip.compress(bytes(2**30))  # 1 MiB
    headers = PNG | {"Content-Encoding": "gzip"}
    async with running(tmp_path, max_body_bytes=2**22, max_image_bytes=2**22) as run:
        for body in (bomb, pieces(bomb, 65536)):
            tracemalloc.start()
            started = time.process_time()
            answer = await run.client.post(EMBED, content=body, headers=headers)
            spent, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
            assert peak < 2**22 + 2**21 + len(bomb) * 3
            assert spent < 2
        assert run.service.lifecycle.buffer.used == 0


async def test_a_body_that_decodes_to_nothing_is_limited_by_its_own_size(tmp_path):
    stream = zlib.compressobj(wbits=31)
    start = stream.compress(b"") or stream.flush(zlib.Z_SYNC_FLUSH)
    headers = PNG | {"Content-Encoding": "gzip"}
    async with running(tmp_path, max_body_bytes=5000, max_image_bytes=5000) as run:
        body = pieces(start + b"\x00\x00\x00\xff\xff" * 2000, 1000)  # empty blocks
        answer = await run.client.post(EMBED, content=body, headers=headers)
    assert answer.status_code == 413


async def test_other_requests_go_on_while_a_body_is_decoded(tmp_path):
    bomb = gzip.compress(bytes(60 * 2**20))
    waits = []
    async with running(tmp_path) as run:
        request = asyncio.create_task(run.client.post(EMBED, content=bomb, headers=PNG | {"Content-Encoding": "gzip"}))
        while not request.done():
            started = time.monotonic()
            await asyncio.sleep(0)
            waits.append(time.monotonic() - started)
    assert request.result().status_code == 413  # of one image
    assert len(waits) > 200
    assert sorted(waits)[-5] < 0.05


def test_a_piece_is_never_longer_than_its_limit_and_nothing_is_lost():
    data = bytes(range(256)) * 40_000
    for encoded, name in ((gzip.compress(data), "gzip"), (zlib.compress(data), "deflate")):
        decoder, found = BodyDecoder(name), []
        for start in range(0, len(encoded), 9999):
            decoder.feed(encoded[start : start + 9999])
            while piece := decoder.decode():
                found.append(piece)
        decoder.finish()
        assert max(map(len, found)) <= PIECE_BYTES
        assert b"".join(found) == data


def test_a_body_without_bytes_is_empty_in_every_encoding():
    decoder = body_decoder("gzip")
    assert decoder is not None
    assert decoder.decode() == b""
    decoder.finish()
    decoder.feed(b"\x1f")
    assert decoder.decode() == b""
    with pytest.raises(BadRequest):
        decoder.finish()


@pytest.mark.parametrize(
    ("value", "gzip_allowed"),
    [
        (b"gzip", True),
        (b"br, GZIP;q=0.5", True),
        (b"gzip;q=0", False),
        (b"gzip; q=0.000, *", False),
        (b"*", True),
        (b"*;q=0", False),
        (b"identity", False),
        (b"br;q=1.0, *;q=0.5", True),
        (b"", False),
        (b"notgzip, zstd", False),
    ],
)
def test_which_clients_accept_gzip(value, gzip_allowed):
    assert accepts_gzip(value) is gzip_allowed


async def raw(run, method: str, path: str, accept: str | None, **options) -> tuple[httpx.Response, bytes]:
    """Send a request and return the response with the bytes of its body as they were sent."""
    headers = options.pop("headers", {}) | {"Accept-Encoding": accept or "identity"}
    request = run.client.build_request(method, path, headers=headers, **options)
    if accept is None:
        del request.headers["Accept-Encoding"]
    response = await run.client.send(request, stream=True)
    body = b"".join([part async for part in response.aiter_raw()])
    return response, body


async def test_json_is_compressed_for_clients_that_accept_gzip(tmp_path):
    body = {"input": 8 * [f"data:image/png;base64,{photo_text()}"]}
    async with running(tmp_path, gzip_min_bytes=1024) as run:
        plain, plain_body = await raw(run, "POST", EMBED, None, json=body)
        refused, refused_body = await raw(run, "POST", EMBED, "gzip;q=0, br", json=body)
        packed, packed_body = await raw(run, "POST", EMBED, "gzip, br", json=body)
        small, small_body = await raw(run, "GET", "/livez", "gzip")
        head, head_body = await raw(run, "HEAD", "/openapi.json", "gzip")
        got, got_body = await raw(run, "GET", "/openapi.json", "gzip")
        wrong, wrong_body = await raw(run, "POST", EMBED, "gzip", json={"input": [""] * 30})
    assert not any("Content-Encoding" in answer.headers for answer in (plain, refused, small))
    assert packed.headers["Content-Encoding"] == got.headers["Content-Encoding"] == "gzip"
    assert packed.headers["Vary"] == "Accept-Encoding"
    assert int(packed.headers["Content-Length"]) == len(packed_body) < len(plain_body) / 2
    assert json.loads(gzip.decompress(packed_body))["data"] == json.loads(plain_body)["data"]
    assert json.loads(refused_body)["data"] == json.loads(plain_body)["data"]
    assert json.loads(small_body) == {"status": "alive"}
    assert (head.headers["Content-Encoding"], head_body) == ("gzip", b"")
    assert head.headers["Content-Length"] == got.headers["Content-Length"]
    assert json.loads(gzip.decompress(got_body))["openapi"]
    assert (wrong.status_code, wrong.headers["Content-Encoding"]) == (422, "gzip")
    assert len(json.loads(gzip.decompress(wrong_body))["error"]["errors"]) == 30


def photo_text() -> str:
    import base64

    return base64.b64encode(photo()).decode()


async def test_images_and_files_are_not_compressed(tmp_path):
    async with running(tmp_path, gzip_min_bytes=1024) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        added = await run.client.post("/v1/collections/shop/items", files={"file": photo()})
        item = added.json()["items"][0]["id"]
        snapshot = (await run.client.post("/v1/collections/shop/snapshots")).json()["name"]
        image, image_body = await raw(run, "GET", f"/v1/collections/shop/items/{item}/image", "gzip")
        file, file_body = await raw(run, "GET", f"/v1/collections/shop/snapshots/{snapshot}", "gzip")
    assert image_body == photo()
    assert len(image_body) > 1024
    assert not any("Content-Encoding" in answer.headers for answer in (image, file))
    assert file_body.startswith(b"SQLite format 3")


async def test_the_size_from_which_answers_are_compressed_is_a_setting(tmp_path):
    async with running(tmp_path, gzip_min_bytes=0) as run:
        never, _ = await raw(run, "GET", "/openapi.json", "gzip")
    async with running(tmp_path / "b", gzip_min_bytes=10) as run:
        small, _ = await raw(run, "GET", "/livez", "gzip")
    async with running(tmp_path / "c") as run:
        default, _ = await raw(run, "GET", "/openapi.json", "gzip")
    assert "Content-Encoding" not in never.headers
    assert default.headers["Content-Encoding"] == "gzip"
    assert small.headers["Content-Encoding"] == "gzip"


@pytest.mark.parametrize("path", ["/v1/collections/shop", EMBED])
async def test_a_byte_order_mark_before_json_is_ignored(tmp_path, path):
    fields = {"dtype": "float16"} if path != EMBED else {"input": photo_text()}
    body = b"\xef\xbb\xbf" + json.dumps(fields).encode()
    async with running(tmp_path) as run:
        answer = await run.client.request("PUT" if path != EMBED else "POST", path, content=body, headers=JSON)
    assert answer.status_code in (200, 201)
    assert answer.json().get("dtype", "float16") == "float16"
