"""Tests of fetching images from URLs, with servers on the loopback address and a resolver of the tests."""

import asyncio
import gzip
import logging
import time

import pytest

from service import web_images
from service.buffer import Buffer
from service.errors import ImageTooLarge, ImageUrlFailed, InvalidRequest, PayloadTooLarge, QueueFull, Unavailable
from service.settings import Settings
from service.web_images import WebImages, resolve
from tests import hostile_urls
from tests.fakes import photo, until
from tests.image_servers import IMAGE, PUBLIC, answer, open_network, redirect

URL = "https://images.example.com/a.jpg"


@pytest.fixture(autouse=True)
def _failures_are_reported_at_once(monkeypatch):
    monkeypatch.setattr(web_images, "_STEP_S", 0.001)


def buffered() -> Buffer:
    return Buffer(2**30)


async def fetch(network, url: str = URL, **settings) -> bytes:
    web = network.web(Settings(**{"image_urls": "*", **settings}), buffered())
    try:
        return (await web.fetch_all([url]))[url].result()
    finally:
        await web.close()


async def reason_of_failure(network, caplog, url: str = URL, **settings) -> str:
    """Return the logged reason for which a URL fails."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "service.web_images"), pytest.raises(ImageUrlFailed) as caught:
        await fetch(network, url, **settings)
    assert caught.value.detail == web_images._FAILED
    [record] = [record for record in caplog.records if record.name == "service.web_images"]
    assert record.fields["host"] in url
    return record.fields["reason"]


async def test_image_is_fetched_from_the_pinned_address_with_the_name_of_the_host():
    async with open_network() as network:
        assert await fetch(network, "https://images.example.com/ä b.jpg?x=1&y=%2F".replace(" ", "%20")) == IMAGE
    assert network.dialled == [(PUBLIC[0], 443)]
    assert network.resolved == ["images.example.com"]
    [head] = network.heads
    lines = head.split("\r\n")
    assert lines[0] == "GET /%C3%A4%20b.jpg?x=1&y=%2F HTTP/1.1"
    assert sorted(lines[1:-2]) == [
        "Accept-Encoding: identity",
        "Accept: image/*",
        "Connection: close",
        "Host: images.example.com",
        "User-Agent: dinov2-service",
    ]


async def test_proxies_and_passwords_of_the_environment_are_not_used(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine images.example.com login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with open_network() as network:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{network.ports[False]}")
        assert await fetch(network) == IMAGE
        web = WebImages(Settings(image_urls="*"), buffered())  # with its own connections
        async with web._transport() as transport:
            assert type(transport._pool).__name__ == "AsyncConnectionPool"
    assert network.trapped == 0
    assert "Authorization" not in network.heads[0]


async def test_certificate_must_be_that_of_the_host(caplog):
    async with open_network(other_example_com=PUBLIC[:1]) as network:
        reason = await reason_of_failure(network, caplog, "https://other.example.com/")
    assert "CERTIFICATE_VERIFY_FAILED" in reason
    assert network.heads == []


async def test_own_connections_check_certificates_and_reach_no_private_server(monkeypatch):
    """Without the stand-in for connections, the guard alone keeps the service away from a server on loopback."""
    async with open_network() as network:
        port = network.ports[False]
        settings = Settings(image_urls=f"images.example.com:{port}")
        web = WebImages(settings, buffered(), resolve=lambda host, port: ["127.0.0.1"])
        url = f"https://images.example.com:{port}/"
        assert isinstance((await web.fetch_all([url]))[url].error, ImageUrlFailed)
        assert network.trapped == 0
        monkeypatch.setattr(web_images, "why_not_public", lambda address: None)
        assert isinstance((await web.fetch_all([url]))[url].error, ImageUrlFailed)
        assert network.trapped == 1  # the server could be reached, so the guard is what protects it


async def test_no_hostile_url_escapes():
    count = await hostile_urls.count_escapes()
    assert count.escaped == []
    assert count.urls == len({case.name for case in hostile_urls.cases()}) >= 140


async def test_escapes_are_noticed(monkeypatch):
    monkeypatch.setattr(web_images, "why_not_public", lambda address: None)
    escaped = set((await hostile_urls.count_escapes()).escaped)
    assert {name for name in escaped if name.startswith("form")} == set()
    assert {f"address: {address}" for address in hostile_urls.ADDRESSES} <= escaped
    assert {case.name for case in hostile_urls.cases() if case.name.startswith("rebinding")} <= escaped


async def test_name_is_resolved_once_for_each_request():
    """The second answer of the resolver would be a loopback address."""
    async with open_network(rebound_images_example_com=[PUBLIC[:1], ["127.0.0.1"]]) as network:
        assert await fetch(network, "https://rebound.images.example.com/") == IMAGE
    assert network.resolved == ["rebound.images.example.com"]
    assert network.dialled == [(PUBLIC[0], 443)]


async def test_address_of_the_other_kind_is_tried_if_the_first_is_unreachable(caplog):
    async with open_network(both_images_example_com=[PUBLIC[2], PUBLIC[0], PUBLIC[1]]) as network:
        network.unreachable = {PUBLIC[2]}
        assert await fetch(network, "https://both.images.example.com/") == IMAGE
        assert network.dialled == [(PUBLIC[2], 443), (PUBLIC[0], 443)]
        network.unreachable = set(PUBLIC)
        assert "ConnectError" in await reason_of_failure(network, caplog, "https://both.images.example.com/")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Again", "308 Moved"])
async def test_redirects_are_followed_to_other_hosts(status):
    async with open_network() as network:
        network.answers["/a.jpg"] = redirect("https://cdn.example.org/b.jpg", status)
        network.answers["/b.jpg"] = redirect("c.jpg", status)
        assert await fetch(network) == IMAGE
    assert [head.split(" ")[1] for head in network.heads] == ["/a.jpg", "/b.jpg", "/c.jpg"]
    assert ["Host: cdn.example.org" in head for head in network.heads] == [False, True, True]
    assert network.resolved == ["images.example.com", "cdn.example.org", "cdn.example.org"]


async def test_redirects_are_limited_in_number_and_to_the_list_of_hosts(caplog):
    async with open_network() as network:
        for i in range(4):
            network.answers[f"/{i}"] = redirect(f"/{i + 1}")
        assert await fetch(network, "https://images.example.com/1") == IMAGE
        assert await reason_of_failure(network, caplog, "https://images.example.com/0") == "more than 3 redirects"
        network.answers["/a.jpg"] = redirect("https://cdn.example.org/b.jpg")
        reason = await reason_of_failure(network, caplog, image_urls="images.example.com")
        assert reason == "a redirect to cdn.example.org, which is not in the list of hosts"
        network.answers["/a.jpg"] = answer(b"", "302 Found")
        assert await reason_of_failure(network, caplog) == "a redirect with 0 locations"
        network.answers["/a.jpg"] = answer(b"", "302 Found", location="/b.jpg\r\nlocation: /c.jpg")
        assert await reason_of_failure(network, caplog) == "a redirect with 2 locations"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (answer(status="404 Not Found"), "status 404"),
        (answer(status="206 Partial Content"), "status 206"),
        (answer(status="500 Oops"), "status 500"),
        (answer(status="304 Not Modified"), "status 304"),
        (answer(gzip.compress(IMAGE), content_encoding="gzip"), "content encoding 'gzip'"),
        (answer(IMAGE, content_encoding="br, identity"), "content encoding"),
        (
            answer(b"<html>" + b"x" * 300, content_type="image/png"),
            "not a known image; it starts with 3c 68",
        ),
        (answer(b"ok"), "not a known image; it starts with 6f 6b"),
        (answer(b""), "not a known image; it starts with "),
        (answer(IMAGE, content_length=str(len(IMAGE) + 1)), "RemoteProtocolError"),
        (answer(IMAGE, content_length="-5"), "RemoteProtocolError"),
        (answer(IMAGE, transfer_encoding="gzip"), "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000, "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
    ],
)
async def test_all_failures_of_a_server_look_alike(caplog, response, reason):
    async with open_network() as network:
        network.answers["/a.jpg"] = response
        assert (await reason_of_failure(network, caplog)).startswith(reason)


async def test_rest_of_a_response_that_is_not_an_image_is_not_read(caplog):
    ended = asyncio.Event()

    async def endless(writer):
        try:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n<html>")
            while True:
                writer.write(bytes(2**16))
                await writer.drain()
        finally:
            ended.set()

    async with open_network() as network:
        network.answers["/a.jpg"] = endless
        assert "not a known image" in await reason_of_failure(network, caplog)
        await asyncio.wait_for(ended.wait(), 5)


async def test_image_may_not_exceed_its_limit():
    big = photo(1, size=(300, 300))

    async def endless(writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE)
        while True:
            writer.write(bytes(2**16))
            await writer.drain()

    async with open_network() as network:
        network.answers |= {"/exact": answer(big), "/endless": endless}
        network.answers["/declared"] = answer(big[:1000], content_length="99999999999")
        assert await fetch(network, "https://images.example.com/exact", max_image_bytes=len(big)) == big
        for path in ("exact", "endless", "declared"):
            with pytest.raises(ImageTooLarge, match=f"more than {len(big) - 1} bytes"):
                await fetch(network, f"https://images.example.com/{path}", max_image_bytes=len(big) - 1)
        with pytest.raises(ImageTooLarge, match="more than 10 bytes"):
            await fetch(network, max_image_bytes=10)


async def test_images_of_a_request_count_as_its_body():
    urls = [f"https://images.example.com/{i}" for i in range(10)]
    counted = buffered()
    async with open_network() as network:
        settings = Settings(image_urls="*", max_image_bytes=len(IMAGE), max_body_bytes=3 * len(IMAGE))
        outcomes = await asyncio.create_task(network.web(settings, counted).fetch_all(urls))
        await until(lambda: counted.used == 0)  # because the task has ended
    good = [outcome.result() for outcome in outcomes.values() if outcome.error is None]
    assert good
    assert good == [IMAGE] * len(good)
    assert len(good) <= 3
    errors = {type(outcome.error) for outcome in outcomes.values() if outcome.error is not None}
    assert errors == {PayloadTooLarge}


async def test_memory_of_all_requests_is_limited_until_they_end():
    size, done = len(IMAGE), asyncio.Event()
    counted = Buffer(size)
    async with open_network() as network:
        settings = Settings(image_urls="*", max_image_bytes=size, max_body_bytes=size, max_buffered_bytes=size)
        web = network.web(settings, counted)

        async def request() -> None:
            assert (await web.fetch_all([URL]))[URL].result() == IMAGE
            await done.wait()

        task = asyncio.create_task(request())
        await until(lambda: counted.used == size)
        error = (await asyncio.create_task(web.fetch_all([URL])))[URL].error
        assert isinstance(error, Unavailable)
        assert error.headers == {"Retry-After": "1"}
        done.set()
        await task
        await until(lambda: counted.used == 0)
        assert (await asyncio.create_task(web.fetch_all([URL])))[URL].error is None


async def drip(writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE)
    while True:
        await asyncio.sleep(0.01)
        writer.write(b"\0")
        await writer.drain()


async def silence(writer) -> None:
    await asyncio.sleep(60)


async def test_slow_servers_are_given_up(monkeypatch, caplog):
    async with open_network() as network:
        network.answers |= {"/drip": drip, "/silence": silence}
        with monkeypatch.context() as patch:
            patch.setattr(web_images, "FETCH_S", 1)
            assert "not fetched after" in await reason_of_failure(network, caplog, "https://images.example.com/drip")
        monkeypatch.setattr(web_images, "FETCH_S", 30)
        monkeypatch.setattr(web_images, "_STALL_S", 1)
        assert "Timeout" in await reason_of_failure(network, caplog, "https://images.example.com/silence")


async def test_slow_urls_leave_half_of_the_deadline_to_the_others():
    async with open_network() as network:
        network.answers["/drip"] = drip
        web = network.web(Settings(image_urls="*", request_deadline_s=2.0), buffered())
        started = time.monotonic()
        slow, fast = (await web.fetch_all(["https://images.example.com/drip", URL])).values()
        assert time.monotonic() - started < 2
    assert isinstance(slow.error, ImageUrlFailed)
    assert fast.result() == IMAGE


async def test_slow_resolver_delays_no_other_work(monkeypatch):
    def slow(host: str, port: int) -> list[str]:
        time.sleep(1)
        return ["10.0.0.1"]

    monkeypatch.setattr(web_images, "FETCH_S", 0.1)
    web = WebImages(Settings(image_urls="*"), buffered(), resolve=slow)
    task = asyncio.create_task(web.fetch_all([f"https://{i}.example.com/" for i in range(40)]))
    started = time.monotonic()
    await asyncio.sleep(0.05)
    await asyncio.to_thread(int)  # the default threads are free
    assert time.monotonic() - started < 0.9
    assert {type(outcome.error) for outcome in (await task).values()} == {ImageUrlFailed}
    await web.close()


async def test_failures_take_a_multiple_of_a_step(monkeypatch):
    monkeypatch.setattr(web_images, "_STEP_S", 0.2)
    async with open_network(inner_example_com=["10.0.0.1"]) as network:
        network.answers["/404"] = answer(status="404 Not Found")
        for url in ("https://inner.example.com/", "https://none.example.com/", "https://images.example.com/404"):
            started = time.monotonic()
            with pytest.raises(ImageUrlFailed):
                await fetch(network, url)
            assert time.monotonic() - started > 0.19


async def test_connections_are_limited_for_each_request_address_and_process(monkeypatch):
    monkeypatch.setattr(web_images, "_PER_REQUEST", 3)
    monkeypatch.setattr(web_images, "_PER_ADDRESS", 4)
    monkeypatch.setattr(web_images, "_IN_PROCESS", 5)
    now, most, gate = [], [0], asyncio.Event()

    async def slow(writer):
        now.append(writer)
        most[0] = max(most[0], len(now))
        await gate.wait()
        now.remove(writer)
        writer.write(answer())

    def urls(host: str, of: int) -> list[str]:
        return [f"https://{host}/{of}-{i}" for i in range(4)]

    async with open_network() as network:
        for of in range(4):
            network.answers |= dict.fromkeys((f"/{of}-{i}" for i in range(4)), slow)
        web = network.web(Settings(image_urls="*"), buffered())
        tasks = [asyncio.create_task(web.fetch_all(urls("images.example.com", 0)))]
        await until(lambda: len(now) == 3)
        await asyncio.sleep(0.05)
        assert len(now) == 3
        tasks.append(asyncio.create_task(web.fetch_all(urls("images.example.com", 1))))
        await until(lambda: len(now) == 4)
        await asyncio.sleep(0.05)
        assert len(now) == 4
        tasks.append(asyncio.create_task(web.fetch_all(urls("cdn.example.org", 2))))
        await until(lambda: len(now) == 5)
        await asyncio.sleep(0.05)
        assert len(now) == 5
        gate.set()
        outcomes = [outcome for task in tasks for outcome in (await task).values()]
    assert [outcome.result() for outcome in outcomes] == [IMAGE] * 12
    assert most == [5]
    assert not web._slots_of_address


async def test_too_many_fetches_are_a_full_queue(monkeypatch):
    monkeypatch.setattr(web_images, "_IN_PROCESS", 1)
    monkeypatch.setattr(web_images, "_WAIT_S", 0.1)
    async with open_network() as network:
        network.answers["/silence"] = silence
        web = network.web(Settings(image_urls="*"), buffered())
        task = asyncio.create_task(web.fetch_all(["https://images.example.com/silence"]))
        await until(lambda: len(network.heads) == 1)
        error = (await web.fetch_all([URL]))[URL].error
        assert isinstance(error, QueueFull)
        task.cancel()  # as if the client had disconnected
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await web.fetch_all([URL]))[URL].result() == IMAGE


async def test_same_url_is_fetched_once_and_counted():
    results = []
    async with open_network() as network:
        web = network.web(Settings(image_urls="*"), buffered(), on_result=results.append)
        outcomes = await web.fetch_all([URL, URL, "https://none.example.com/", "http://images.example.com/"])
    assert len(network.heads) == 1
    assert [type(outcome.error) for outcome in outcomes.values()] == [type(None), ImageUrlFailed, InvalidRequest]
    assert sorted(results) == ["failed", "fetched"]


async def test_errors_of_the_text_say_what_is_wrong():
    async with open_network() as network:
        for url, words in (
            ("http://images.example.com/", "it must begin with https://"),
            ("https://cdn.example.org/", "cdn.example.org is not among the hosts of the setting image_urls"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                await fetch(network, url, image_urls="images.example.com")
        off = network.web(Settings(), buffered())
        with pytest.raises(InvalidRequest, match="setting image_urls is not set"):
            (await off.fetch_all([URL]))[URL].result()
    assert network.resolved == []


def test_resolver_uses_the_name_as_it_is(monkeypatch):
    asked = []

    def getaddrinfo(host, port, **options):
        asked.append((host, port))
        return [(2, 1, 6, "", ("93.184.216.34", port)), (10, 1, 6, "", ("fe80::1%lo", port, 0, 1))] * 2

    monkeypatch.setattr(web_images.socket, "getaddrinfo", getaddrinfo)
    assert resolve("images.example.com", 443) == ["93.184.216.34", "fe80::1%lo"]
    assert asked == [(b"images.example.com.", 443)]  # the final dot excludes local domains
