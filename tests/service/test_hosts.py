"""Tests of the names by which the service may be called."""

import pytest

from service.hosts import Hosts, parse_names
from service.keys import KeyStore
from service.settings import Settings
from tests.fakes import running

MODELS = "/v1/models"
REBOUND = {"Host": "rebound.example.com:8000", "Origin": "http://rebound.example.com:8000"}


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("10.1.2.3:8000", True),  # a probe of Kubernetes
        ("[::1]:8000", True),
        ("[fe80::1%25eth0]:80", True),
        ("localhost", True),
        ("LocalHost:8000", True),
        ("app.localhost:8000", True),
        ("backend", True),  # a container
        ("service:8000", True),
        ("images.example.com", True),
        ("Images.Example.com:443", True),
        ("a.b.shop.example.org", True),
        ("shop.example.org", False),
        ("evil-shop.example.org", False),
        ("other.example.com", False),
        ("images.example.com.evil.example", False),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1.nip.io:8000", False),
        ("localhost.evil.example", False),
        ("evillocalhost.example", False),
        ("com.", False),
        ("1.2.3.4.5", False),
    ],
)
def test_addresses_local_names_and_listed_names_are_allowed(host, allowed):
    hosts = Hosts(parse_names("images.example.com, *.shop.example.org"))
    for _ in range(2):
        assert hosts.allows(host.encode()) == allowed


def test_a_star_allows_every_name():
    assert Hosts(parse_names("*")).allows(b"evil.example")


def test_remembering_names_takes_no_endless_memory():
    hosts = Hosts(frozenset())
    for i in range(3000):
        assert not hosts.allows(b"a%d.example" % i)
    assert len(hosts._remembered) <= 1024


@pytest.mark.parametrize(
    "text", ["http://a.example", "a.example:8000", "a..b", "a b", "*.*.example", "*example.com", "ä.de"]
)
def test_what_is_not_a_name_is_told(text):
    with pytest.raises(ValueError, match=r"is not a host name: write names without a port"):
        parse_names(text)
    with pytest.raises(ValueError, match="hosts"):
        Settings(hosts=text)


async def test_a_page_that_lets_its_name_resolve_to_this_machine_reads_and_changes_nothing(tmp_path):
    async with running(tmp_path) as run:
        answers = [
            await run.client.get(MODELS, headers=REBOUND),
            await run.client.get("/openapi.json", headers=REBOUND),
            await run.client.put("/v1/collections/shop", headers=REBOUND),
            await run.client.delete("/v1/collections/shop", headers=REBOUND),
        ]
        found = (await run.client.get("/v1/collections")).json()["data"]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(421, "host_not_allowed")] * 4
    assert "add this name to DINOV2_HOSTS" in answers[0].json()["detail"]
    assert found == []


async def test_probes_may_use_any_name(tmp_path):
    async with running(tmp_path, hosts="images.example.com") as run:
        for path in ("/livez", "/readyz"):
            assert (await run.client.get(path, headers={"Host": "probe.example"})).status_code == 200


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, False),
        ({"hosts": "images.example.com"}, False),
        ({"hosts": "*.example.com"}, True),
        ({"hosts": "*"}, True),
        ({"publish": "rebound.example.com:8000"}, True),
        ({"host": "rebound.example.com"}, True),
        ({"trusted_proxies": 1}, True),  # the proxy knows the names
        ({"trusted_proxies": 1, "hosts": "images.example.com"}, False),
    ],
)
async def test_the_settings_decide_about_names(tmp_path, settings, allowed):
    async with running(tmp_path, **settings) as run:
        answer = await run.client.get(MODELS, headers=REBOUND)
    assert answer.status_code == (200 if allowed else 421)


async def test_keys_protect_a_service_with_any_name(tmp_path):
    key, _ = KeyStore(tmp_path).create("reader", ["read"])
    async with running(tmp_path) as run:
        without = await run.client.get(MODELS, headers=REBOUND)
        with_key = await run.client.get(MODELS, headers=REBOUND | {"Authorization": f"Bearer {key}"})
    assert (without.status_code, with_key.status_code) == (401, 200)


async def test_a_listed_name_is_required_even_with_keys(tmp_path):
    key, _ = KeyStore(tmp_path).create("reader", ["read"])
    async with running(tmp_path, hosts="images.example.com") as run:
        headers = REBOUND | {"Authorization": f"Bearer {key}"}
        assert (await run.client.get(MODELS, headers=headers)).status_code == 421
        headers["Host"] = "images.example.com"
        assert (await run.client.get(MODELS, headers=headers)).status_code == 200
