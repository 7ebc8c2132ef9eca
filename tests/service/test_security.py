"""Tests of the access control over HTTP: which requests are let in, what is written to the audit log, and pages of
other origins."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from service.app import create_app
from service.keys import SCOPES, KeyStore
from service.security import ROUTES, check_reachable, is_loopback, needed
from service.settings import Settings
from service.telemetry import JsonLines, configure_logging
from tests.fakes import FakeEngine, Running, fake_artifact, photo, running
from tests.service.test_cors import BROWSER, page_in_browser, served_page
from tests.service.test_server import Server, why_not_started

EMBED = "/v1/embeddings"
SHOP = "/v1/collections/shop"
DENIED = "the API key is not valid: it is unknown, expired or revoked"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def with_keys(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Running, KeyStore, dict[str, str]]]:
    """Start a service with one key for each scope. Yield it with the store of the keys and the keys by scope."""
    store = KeyStore(tmp_path)
    keys = {scope: store.create(scope, [scope])[0] for scope in SCOPES}
    async with running(tmp_path, **settings) as run:
        yield run, store, keys


def audited(caplog) -> list[dict[str, Any]]:
    return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "audit"]


# Which routes need what


async def test_every_route_is_in_the_table_and_nothing_else(tmp_path):
    async with running(tmp_path) as run:
        routes = [(method, route.path) for route in run.app.routes for method in route.methods]
    assert all(isinstance(route, Route) for route in run.app.routes)
    assert {(method, path) for method, path in routes if method != "HEAD"} == set(ROUTES)


def test_a_route_that_is_not_in_the_table_needs_admin():
    assert needed("POST", "/v1/new") == "admin"
    assert needed("HEAD", "/v1/models") == needed("GET", "/v1/models") == "read"


def test_methods_that_change_something_need_more_than_read():
    """Every POST that needs only `read` computes or finds something and stores nothing."""
    reading = {path for (method, path), need in ROUTES.items() if method == "POST" and need == "read"}
    words = ("search", "duplicates", "find-region", "scroll", "count", "facets")
    collections = {path for path in reading if path.startswith("/v1/collections")}
    assert {path.rpartition("/")[2] for path in collections} == set(words)
    assert all(
        need in ("write", "admin") for (method, _), need in ROUTES.items() if method in ("PUT", "PATCH", "DELETE")
    )


FILLED = {
    "{name}": "shop",
    "{name:path}": "auto",
    "{item_id:path}": "a",
    "{alias}": "live",
    "{snapshot}": "none",
    "{digest}": "0" * 64,
    "{job_id}": "none",
}


def filled(template: str) -> str:
    for parameter, value in FILLED.items():
        template = template.replace(parameter, value)
    return template


async def begin(app: Any, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    """Send a request without a body, and return the start of the answer. The answer itself may be an endless stream."""
    started: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()

    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        if message is None:  # the client stays connected
            await asyncio.Event().wait()
        return message

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start" and not started.done():
            started.set_result(httpx.Response(message["status"], headers=message["headers"]))

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    call = asyncio.create_task(app(scope, receive, send))
    try:
        return await asyncio.wait_for(started, 60)
    finally:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize("sent", [None, *SCOPES])
async def test_every_route_with_every_scope(tmp_path, sent):
    """The answer is 401 without a key, 403 with too low a scope, and anything else with the scope in the table."""
    async with with_keys(tmp_path) as (run, _, keys):
        headers = {} if sent is None else bearer(keys[sent])
        heads = {("HEAD", path): need for (method, path), need in ROUTES.items() if method == "GET"}
        for (method, template), need in (ROUTES | heads).items():
            answer = await begin(run.app, method, filled(template), headers)
            enough = SCOPES if need in ("open", "metrics") else SCOPES[SCOPES.index(need) :]
            allowed = need == "open" or sent in enough
            what = f"{method} {template} with {sent}: {answer.status_code}"
            if allowed:
                assert answer.status_code not in (401, 403), what
                continue
            challenge = 'Bearer realm="dinov2-service"'
            if sent is not None:
                challenge += f', error="insufficient_scope", scope="{need}"'
            assert answer.status_code == (401 if sent is None else 403), what
            assert answer.headers["WWW-Authenticate"] == challenge


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/nothing"),
        ("GET", "/nothing"),
        ("DELETE", EMBED),
        ("POST", "/livez"),
        ("OPTIONS", EMBED),
        ("GET", "/v1/models/../../livez/x"),
        ("GET", "/livez//x"),
        ("GET", "/livez/x"),
        ("GET", "/LIVEZ"),
        ("BREW", "/v1/models"),
    ],
)
async def test_whoever_has_no_key_learns_nothing_of_the_routes(tmp_path, method, path):
    async with with_keys(tmp_path) as (run, _, keys):
        without = await run.client.request(method, path)
        assert without.status_code == 401
        assert '"unauthenticated"' in without.text
        assert "Allow" not in without.headers
        assert (await run.client.request(method, path, headers=bearer(keys["read"]))).status_code in (404, 405)


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/collections/", SHOP + "/items/a%2Fimage", SHOP + "/items/a/b/c"])
async def test_no_other_way_to_write_a_path_needs_less(tmp_path, path):
    async with with_keys(tmp_path) as (run, _, _):
        for method in ("GET", "HEAD", "DELETE", "PUT", "POST"):
            assert (await run.client.request(method, path)).status_code == 401


# Keys that are not valid


NOT_BEARER = "the header Authorization has another form"
MALFORMED = "the API key is malformed"
HEADERS = [
    ("Bearer KEY", 200, ""),
    ("bearer KEY", 200, ""),
    ("BEARER   KEY  ", 200, ""),
    ("\tBearer KEY\t", 200, ""),
    ("", 401, "this service needs an API key"),
    ("Bearer", 401, NOT_BEARER),
    ("Bearer ", 401, NOT_BEARER),
    ("KEY", 401, NOT_BEARER),
    ("Basic KEY", 401, NOT_BEARER),
    ("BearerKEY", 401, NOT_BEARER),
    ("Bearer\tKEY", 401, NOT_BEARER),
    ("Bearer KEY KEY", 401, NOT_BEARER),
    ("Bearer KEY, Bearer KEY", 401, NOT_BEARER),
    ("Bearer " + "x" * 60_000, 401, NOT_BEARER),
    ("Bearer none", 401, MALFORMED),
    ("Bearer KEYx", 401, MALFORMED),
    ('Bearer "KEY"', 401, MALFORMED),
    ("Bearer MISTYPED", 401, MALFORMED),
    ("Bearer LOWER", 401, MALFORMED),
    ("Bearer UNKNOWN", 401, DENIED),
    ("Bearer EXPIRED", 401, DENIED),
    ("Bearer REVOKED", 401, DENIED),
    ("Bearer FORGED", 401, DENIED),
]


@pytest.mark.parametrize("path", ["/v1/models", EMBED])
async def test_headers(tmp_path, path):
    async with with_keys(tmp_path) as (run, store, keys):
        good = keys["read"]
        expired, _ = store.create("old", ["read"], 0.001)
        revoked, key = store.create("gone", ["admin"])
        store.revoke(key.id)
        unknown, _ = KeyStore(tmp_path / "elsewhere").create("unknown", ["admin"])
        words = {
            "MISTYPED": good[:-8] + ("0" if good[-8] != "0" else "1") + good[-7:],
            "LOWER": good.lower(),
            "UNKNOWN": unknown,
            "EXPIRED": expired,
            "REVOKED": revoked,
            "FORGED": wrong_secret(good),
            "KEY": good,
        }
        await asyncio.sleep(0.01)  # until the key has expired
        body = {"input": base64.b64encode(photo()).decode()}
        for shown, status, detail in HEADERS:
            header = shown
            for word, value in words.items():
                header = header.replace(word, value)
            headers = {"Authorization": header} if header else {}
            answer = await run.client.request("POST" if path == EMBED else "GET", path, headers=headers, json=body)
            assert answer.status_code == status, f"{shown[:80]!r}: {answer.text[:200]}"
            if status == 200:
                continue
            error = answer.json()["error"] if path == EMBED else answer.json()
            assert error["code"] == "unauthenticated"
            assert error["message" if path == EMBED else "detail"].startswith(detail), shown[:80]
            assert answer.headers["WWW-Authenticate"].endswith('error="invalid_token"') == bool(header)
            assert not any(value in answer.text for value in words.values())


def wrong_secret(key: str) -> str:
    """Return a well-formed key with the id of `key` and another secret."""
    from service import keys

    text = f"{key[:14]}_{'A' * 43}"
    return f"{text}_{keys._checksum(text.encode())}"


async def test_answers_do_not_tell_whether_a_key_exists(tmp_path):
    async with with_keys(tmp_path) as (run, store, keys):
        revoked, key = store.create("gone", ["admin"])
        store.revoke(key.id)
        unknown, _ = KeyStore(tmp_path / "elsewhere").create("unknown", ["admin"])
        bodies = set()
        for text in (revoked, unknown, wrong_secret(keys["read"])):
            answer = await run.client.get("/v1/models", headers=bearer(text) | {"X-Request-ID": "same"})
            bodies.add((answer.status_code, answer.text, answer.headers["WWW-Authenticate"]))
    assert len(bodies) == 1


async def test_two_headers_are_refused_even_if_both_are_valid(tmp_path):
    async with with_keys(tmp_path) as (run, _, keys):
        value = f"Bearer {keys['admin']}"
        answer = await run.client.get("/v1/models", headers=[("Authorization", value), ("Authorization", value)])
    assert answer.status_code == 401
    assert "send exactly one" in answer.text


async def test_other_places_for_a_key_do_not_count(tmp_path):
    async with with_keys(tmp_path) as (run, _, keys):
        key = keys["admin"]
        for headers in ({"X-API-Key": key}, {"Cookie": f"key={key}"}, {"Proxy-Authorization": f"Bearer {key}"}):
            assert (await run.client.get("/v1/models", headers=headers)).status_code == 401
        assert (await run.client.get(f"/v1/models?api_key={key}&access_token={key}")).status_code == 401


async def test_nothing_of_a_body_is_read_before_the_key(tmp_path):
    async with with_keys(tmp_path) as (run, _, keys):
        for headers in ({}, bearer(keys["read"])):
            sent = []

            async def receive():
                raise AssertionError("the body was read")

            async def send(message, sent=sent):
                sent.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": SHOP + "/items",
                "query_string": b"",
                "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            }
            await run.app(scope, receive, send)
            assert sent[0]["status"] == (403 if headers else 401)
            assert dict(sent[0]["headers"])[b"connection"] == b"close"


# When keys are needed


async def test_without_a_key_everyone_may_call_everything_until_the_first_key_is_created(tmp_path):
    async with running(tmp_path) as run:
        assert (await run.client.put(SHOP, headers={"Authorization": "Bearer none"})).status_code == 201
        text, key = KeyStore(tmp_path).create("first", ["admin"])
        assert (await run.client.get(SHOP)).status_code == 401
        assert (await run.client.get(SHOP, headers=bearer(text))).status_code == 200
        KeyStore(tmp_path).revoke(key.id)
        assert (await run.client.get(SHOP, headers=bearer(text))).status_code == 401
        assert (await run.client.get(SHOP)).status_code == 401, "revoking the last key lets everyone in"


async def test_auth_off_ignores_keys(tmp_path):
    async with with_keys(tmp_path, auth="off") as (run, _, _):
        assert (await run.client.put(SHOP)).status_code == 201
        assert (await run.client.delete(SHOP, headers=bearer("none"))).status_code == 200


async def test_auth_on_needs_a_key_before_there_is_one(tmp_path):
    async with running(tmp_path, auth="on") as run:
        assert (await run.client.get("/v1/models")).status_code == 401
        text, _ = KeyStore(tmp_path).create("first", ["read"])
        assert (await run.client.get("/v1/models", headers=bearer(text))).status_code == 200


@pytest.mark.parametrize(("setting", "status"), [(True, 401), (False, 200)])
async def test_metrics_need_a_key_unless_a_setting_opens_them(tmp_path, setting, status):
    async with with_keys(tmp_path, metrics_auth=setting) as (run, _, keys):
        assert (await run.client.get("/metrics")).status_code == status
        assert (await run.client.get("/metrics", headers=bearer(keys["read"]))).status_code == 200
        for path in ("/livez", "/readyz"):
            assert (await run.client.get(path, headers=bearer("wrong"))).status_code == 200


async def test_keys_that_cannot_be_read_let_nobody_in(tmp_path, monkeypatch):
    async with with_keys(tmp_path) as (run, store, keys):
        (tmp_path / "keys.sqlite3").write_bytes(b"not a database" * 1000)
        for suffix in ("-wal", "-shm"):
            (tmp_path / f"keys.sqlite3{suffix}").unlink(missing_ok=True)
        store.stamp.bump()
        answer = await run.client.get("/v1/models", headers=bearer(keys["admin"]))
        assert (answer.status_code, answer.json()["code"]) == (500, "storage_damaged")
        assert (await run.client.get("/livez")).status_code == 200


async def test_the_last_use_is_stored_when_the_service_ends(tmp_path):
    async with with_keys(tmp_path) as (run, store, keys):
        await run.client.get("/v1/models", headers=bearer(keys["write"]))
        assert [key.last_used for key in store.all_keys()] == [None] * 3
    assert [key.last_used is not None for key in store.all_keys()] == [False, True, False]


async def test_the_last_use_is_stored_while_the_service_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("service.app.SAVE_LAST_USED_S", 0.01)
    async with with_keys(tmp_path) as (run, store, keys):
        await run.client.get("/v1/models", headers=bearer(keys["write"]))
        for _ in range(500):
            if store.all_keys()[1].last_used is not None:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("it was not stored")


# Starting


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("::1", True),
        ("[::1]", True),
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("127.0.0.1:8000-8010", True),
        ("0.0.0.0", False),
        ("::", False),
        ("8000", False),
        (":8000", False),
        ("0.0.0.0:8000", False),
        ("[::]:8000", False),
        ("192.168.1.2:8000", False),
        ("::ffff:10.0.0.1", False),
        ("127.0.0.1.example.org", False),
        ("myhost", False),
        ("", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(address, expected):
    assert is_loopback(address) is expected


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"host": "127.0.0.1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "192.168.1.2"}, False),
        ({"host": "0.0.0.0", "auth": "off"}, True),
        ({"host": "0.0.0.0", "auth": "on"}, True),
        ({"host": "0.0.0.0", "publish": "127.0.0.1:8000"}, True),
        ({"host": "0.0.0.0", "publish": "8000"}, False),
        ({"host": "0.0.0.0", "publish": "0.0.0.0:8000"}, False),
        ({"host": "127.0.0.1", "publish": "0.0.0.0:8000"}, False),
    ],
)
def test_without_a_key_other_machines_must_not_reach_the_service(tmp_path, settings, starts):
    chosen = Settings(data_dir=tmp_path / "data", **settings)
    if starts:
        check_reachable(chosen)
        return
    with pytest.raises(ValueError, match=r"`dinov2 keys create NAME`, or set DINOV2_AUTH=off"):
        check_reachable(chosen)
    KeyStore(tmp_path / "data").create("a", ["read"])
    check_reachable(chosen)


def test_a_service_that_other_machines_reach_does_not_start_without_a_key(tmp_path):
    message = why_not_started(tmp_path / "data", DINOV2_HOST="0.0.0.0")
    assert "other machines can reach 0.0.0.0, and there is no API key" in message
    assert "`dinov2 keys create NAME`" in message
    assert "DINOV2_AUTH=off" in message


def test_a_running_process_notices_a_new_and_a_revoked_key_within_a_second(tmp_path):
    server = Server(tmp_path / "data")
    try:
        url, store = f"{server.url}/v1/models", KeyStore(tmp_path / "data")
        assert httpx.get(url).status_code == 200
        text, key = store.create("a", ["read"])
        with httpx.Client(headers=bearer(text)) as client:
            assert httpx.get(url).status_code == 401
            assert client.get(url).status_code == 200
            started = time.monotonic()
            store.revoke(key.id)
            assert client.get(url).status_code == 401
            assert time.monotonic() - started < 1
    finally:
        assert server.stop() == 0
    assert text not in server.log.read_text()
    assert "Authorization: Bearer $KEY" not in server.greeting


def test_the_greeting_shows_how_to_send_a_key(tmp_path):
    KeyStore(tmp_path / "data").create("a", ["read"])
    server = Server(tmp_path / "data")
    assert server.stop() == 0
    assert server.greeting.count('-H "Authorization: Bearer $KEY" ') == 2


# The audit log


async def test_requests_that_need_admin_and_denied_requests_are_audited(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    async with with_keys(tmp_path, trusted_proxies=1) as (run, store, keys):
        caplog.clear()
        admin = bearer(keys["admin"]) | {"X-Forwarded-For": "203.0.113.9"}
        await run.client.put(SHOP, headers=bearer(keys["write"]))
        await run.client.get(SHOP, headers=bearer(keys["read"]))
        await run.client.delete("/v1/collections/shop", headers=admin | {"X-Request-ID": "one"})
        await run.client.delete("/v1/collections/none", headers=admin)
        await run.client.delete("/v1/collections/shop", headers=bearer(keys["write"]))
        await run.client.get("/v1/nothing?key=secret")
        await run.client.post(EMBED, headers=bearer(wrong_secret(keys["read"])))
        await run.client.post(EMBED, headers=bearer(keys["read"]) | {"Origin": "https://evil.example"})
        ids = {key.name: key.id for key in store.all_keys()}
    lines = audited(caplog)
    wanted = ("message", "key_id", "method", "route", "path_params", "status", "needs", "code", "reason")
    delete = ("DELETE", "/v1/collections/{name}")
    assert [tuple(line.get(field) for field in wanted) for line in lines] == [
        ("admin request", ids["admin"], *delete, {"name": "shop"}, 200, "admin", None, None),
        ("admin request", ids["admin"], *delete, {"name": "none"}, 404, "admin", "collection_not_found", None),
        ("denied", ids["write"], *delete, {"name": "shop"}, 403, "admin", "missing_scope", None),
        ("denied", None, "GET", "unmatched", None, 401, None, "unauthenticated", "no key"),
        ("denied", ids["read"], "POST", EMBED, None, 401, "read", "unauthenticated", "wrong secret"),
        ("denied", None, "POST", EMBED, None, 403, None, "cross_origin", None),
    ]
    assert (lines[0]["request_id"], lines[0]["client"], lines[0]["key_name"]) == ("one", "203.0.113.9", "admin")
    everything = caplog.text + json.dumps([JsonLines().format(record) for record in caplog.records])
    for key in keys.values():
        assert key not in everything
        assert key[15:58] not in everything
    access = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "service.access"]
    assert access[0]["key"] == ids["write"]


async def test_admin_requests_are_audited_without_keys_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    async with running(tmp_path) as run:
        await run.client.put(SHOP)
        await run.client.delete(SHOP)
    assert [(line["message"], line["status"], "key_id" in line) for line in audited(caplog)] == [
        ("admin request", 200, False)
    ]


def test_the_audit_log_is_written_at_every_level_and_to_its_file(tmp_path, capsys, monkeypatch):
    root, audit = logging.getLogger(), logging.getLogger("audit")
    before = root.handlers[:], root.level
    try:
        file = tmp_path / "logs" / "audit.jsonl"
        configure_logging("error", file)
        audit.info("denied", extra={"fields": {"status": 401}})
        logging.getLogger("service").info("not written")
        root.setLevel(logging.INFO)
        logging.getLogger("faiss.loader").info("the builds of faiss that were tried are not written at any level")
        file.rename(tmp_path / "old.jsonl")  # as logrotate does
        audit.info("denied", extra={"fields": {"status": 403}})
    finally:
        for handler in audit.handlers:
            handler.close()
        audit.handlers[:] = []
        root.handlers[:], root.level = before
        logging.captureWarnings(False)
    shown = [json.loads(line)["status"] for line in capsys.readouterr().err.splitlines()]
    assert shown == [401, 403]
    assert json.loads((tmp_path / "old.jsonl").read_text())["status"] == 401
    assert json.loads(file.read_text())["status"] == 403


# Pages of other origins

OWN = {"Host": "service", "Origin": "http://service"}
EVIL = {"Host": "service", "Origin": "https://evil.example"}


@pytest.mark.parametrize(
    ("headers", "cors", "refused"),
    [
        ({}, None, False),
        (OWN, None, False),
        ({"Host": "Service", "Origin": "https://service"}, None, False),  # a proxy adds TLS
        (EVIL, None, True),
        ({"Host": "service", "Origin": "http://service:81"}, None, True),
        ({"Host": "service", "Origin": "null"}, None, True),
        ({"Host": "service", "Origin": ""}, None, True),
        (OWN | {"Sec-Fetch-Site": "same-origin"}, None, False),
        ({"Host": "inner", "Origin": "https://outer.example", "Sec-Fetch-Site": "same-origin"}, None, False),
        (EVIL | {"Sec-Fetch-Site": "cross-site"}, None, True),
        (OWN | {"Sec-Fetch-Site": "same-site"}, None, True),
        ({"Host": "service", "Sec-Fetch-Site": "cross-site"}, None, True),
        ({"Host": "service", "Sec-Fetch-Site": "same-site"}, None, True),
        ({"Host": "service", "Sec-Fetch-Site": "none"}, None, False),
        ({"Host": "service", "Sec-Fetch-Site": "new-value"}, None, True),
        (EVIL, "https://evil.example", False),
        (EVIL | {"Sec-Fetch-Site": "cross-site"}, "https://evil.example", False),
        (EVIL, "https://good.example", True),
        ({"Host": "service", "Sec-Fetch-Site": "cross-site"}, "https://good.example", True),
        (EVIL | {"Sec-Fetch-Site": "cross-site"}, "*", False),
    ],
)
async def test_a_page_of_another_origin_cannot_write(tmp_path, headers, cors, refused):
    async with running(tmp_path, cors_origins=cors) as run:
        form = await run.client.post(SHOP + "/items", files={"file": photo()}, headers=headers)
        put = await run.client.put("/v1/collections/other", headers=headers)
        read = await run.client.get("/v1/collections", headers=headers)
        assert read.status_code == 200
        found = {row["name"] for row in read.json()["data"]}
    if refused:
        assert [(answer.status_code, answer.json()["code"]) for answer in (form, put)] == [(403, "cross_origin")] * 2
        assert found == set()
    else:
        assert [form.status_code, put.status_code] == [200, 201]
        assert found == {"shop", "other"}


async def test_a_page_of_another_origin_cannot_write_with_a_key_either(tmp_path):
    async with with_keys(tmp_path) as (run, _, keys):
        answer = await run.client.put(SHOP, headers=EVIL | bearer(keys["admin"]))
    assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin")


async def test_no_page_of_another_origin_reaches_a_route_that_may_change_something(tmp_path):
    routes = [(method, filled(template)) for method, template in ROUTES if method != "GET"]
    async with running(tmp_path) as run:
        for headers in (EVIL, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site", "Origin": "null"}):
            answers = [await run.client.request(method, path, headers=headers) for method, path in routes]
            assert {(answer.status_code, code_of(answer)) for answer in answers} == {(403, "cross_origin")}


async def test_no_route_answers_under_a_name_that_resolves_to_this_machine(tmp_path):
    async with running(tmp_path) as run:
        for method, template in ROUTES:
            answer = await begin(run.app, method, filled(template), {"Host": "rebound.example.com"})
            assert (answer.status_code == 421) == (template not in ("/livez", "/readyz")), template


def code_of(answer: httpx.Response) -> str:
    body = answer.json()
    return body["error"]["code"] if "error" in body else body["code"]


async def test_nothing_of_a_body_is_read_from_a_page_of_another_origin(tmp_path):
    async with running(tmp_path) as run:
        sent = []

        async def receive():
            raise AssertionError("the body was read")

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"service"), (b"origin", b"https://evil.example")]
        scope = {"type": "http", "method": "POST", "path": EMBED, "query_string": b"", "headers": headers}
        await run.app(scope, receive, send)
    assert sent[0]["status"] == 403


ATTACK = """<!doctype html><title>waiting</title><pre id=out></pre><iframe name=hidden></iframe>
<form id=form action="URL/v1/collections/form/items" method=post enctype="multipart/form-data" target=hidden>
<input name=metadata value="{}"></form><script>
const image = Uint8Array.from(atob("IMAGE"), c => c.charCodeAt(0));
function upload() { const form = new FormData(); form.append("file", new Blob([image]), "a.png"); return form; }
async function attempt(path, options) {
  try { await fetch("URL" + path, {mode: "no-cors", ...options}); return "sent"; } catch (error) { return error.name; }
}
async function call() {
  const ways = [
    await attempt("/v1/collections/fetch/items", {method: "POST", body: upload()}),
    await attempt("/v1/collections/text/items", {method: "POST", body: '{"items": []}'}),
    await attempt("/v1/collections/put", {method: "PUT", mode: "cors"}),
    navigator.sendBeacon("URL/v1/collections/beacon/items", upload()) ? "sent" : "not sent"];
  const files = new DataTransfer();
  files.items.add(new File([image], "a.png"));
  const input = document.createElement("input");
  input.type = "file"; input.name = "file"; input.files = files.files;
  document.getElementById("form").append(input);
  const shown = new Promise(done => document.querySelector("iframe").addEventListener("load", done));
  document.getElementById("form").submit();
  await shown;
  return ways.join(", ");
}
call().then(text => { document.getElementById("out").textContent = text; });
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("allowed", [True, False])
def test_a_page_in_a_browser_cannot_write(tmp_path: Path, allowed: bool) -> None:
    """The page tries five ways to write. Three of them send a request without asking first, so that only the service
    itself can refuse it."""
    with served_page() as (origin, show):
        audit = tmp_path / "audit.jsonl"
        settings = {"DINOV2_AUDIT_LOG": str(audit)} | ({"DINOV2_CORS_ORIGINS": origin} if allowed else {})
        server = Server(tmp_path / "data", **settings)
        try:
            show(ATTACK.replace("URL", server.url).replace("IMAGE", base64.b64encode(photo()).decode()))
            text = page_in_browser(origin, tmp_path / "profile")
            found = {row["name"] for row in httpx.get(f"{server.url}/v1/collections").json()["data"]}
        finally:
            assert server.stop() == 0
    denied = [json.loads(line) for line in audit.read_text().splitlines()]
    if allowed:
        assert found == {"fetch", "put", "beacon", "form"}, text
        assert denied == []
    else:
        assert found == set()
        assert {line["code"] for line in denied} == {"cross_origin"}
        assert len(denied) == 4, "the request with PUT is not sent, because the browser asks before it"
        assert text == "sent, sent, TypeError, sent"


# The OpenAPI document


async def test_the_document_says_what_each_route_needs(tmp_path):
    async with running(tmp_path) as run:
        document = (await run.client.get("/openapi.json")).json()
    scheme = document["components"]["securitySchemes"]["apiKey"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            [need] = {
                need
                for (other, template), need in ROUTES.items()
                if other == method.upper() and template.replace(":path", "") == path
            }
            word = "read" if need == "metrics" else need
            assert operation["security"] == ([{}] if need == "open" else [{}, {"apiKey": [word]}])
            assert ("401" in operation["responses"]) == (need != "open")
            changes = method != "get"
            assert ("403" in operation["responses"]) == (changes or need in ("write", "admin"))


async def test_openais_client_sends_its_key_and_understands_the_refusal(tmp_path):
    openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[test]'")
    async with with_keys(tmp_path) as (run, _, keys):
        for key, allowed in ((keys["read"], True), ("sk-none", False)):
            client = openai.AsyncOpenAI(
                base_url="http://service/v1",
                api_key=key,
                max_retries=0,
                http_client=httpx.AsyncClient(transport=httpx.ASGITransport(run.app)),
            )
            image = base64.b64encode(photo()).decode()
            if allowed:
                answer = await client.embeddings.create(model="auto", input=[image])
                assert len(answer.data[0].embedding) == 8
            else:
                with pytest.raises(openai.AuthenticationError, match="malformed") as refused:
                    await client.embeddings.create(model="auto", input=[image])
                assert refused.value.code == "unauthenticated"


def test_an_application_without_the_folder_of_the_keys_opens_nothing(tmp_path):
    create_app(Settings(data_dir=tmp_path / "data"), fake_artifact(), FakeEngine())
    assert not (tmp_path / "data").exists(), "only the start of the application may create files"
