"""Tests of the parser of image URLs, of the list of allowed hosts, and of the rule for public addresses."""

import random
import re
from ipaddress import IPv4Address, IPv6Address

import pytest

from service import public_addresses
from service.image_urls import MAX_URL_CHARACTERS, ImageUrl, parse_hosts, parse_image_url
from service.public_addresses import why_not_public
from service.settings import Settings
from tests.hostile_urls import ADDRESSES, FORMS


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("https://images.example.com/a.jpg", ImageUrl("images.example.com", 443, "/a.jpg")),
        ("HTTPS://Images.Example.COM:443/A.jpg", ImageUrl("images.example.com", 443, "/A.jpg")),
        ("https://images.example.com", ImageUrl("images.example.com", 443, "/")),
        ("https://images.example.com?id=1", ImageUrl("images.example.com", 443, "/?id=1")),
        ("https://images.example.com:8443/a", ImageUrl("images.example.com", 8443, "/a")),
        (
            "https://my_bucket.s3.example.com/a%20b/%C3%A9.jpg?X-Sign=a%2Fb%3D&t=1+2~(3)",
            ImageUrl("my_bucket.s3.example.com", 443, "/a%20b/%C3%A9.jpg?X-Sign=a%2Fb%3D&t=1+2~(3)"),
        ),
        ("https://xn--bcher-kva.example/ü|?ö", ImageUrl("xn--bcher-kva.example", 443, "/%C3%BC%7C?%C3%B6")),
        ("https://1.2.3.4.nip.example/", ImageUrl("1.2.3.4.nip.example", 443, "/")),
        (
            "https://images.example.com/?next=https://a@b:1/",
            ImageUrl("images.example.com", 443, "/?next=https://a@b:1/"),
        ),
    ],
)
def test_url_is_parsed_into_host_port_and_target(text, parsed):
    assert parse_image_url(text) == parsed
    assert parse_image_url(str(parsed)) == parsed


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"another port"}))
def test_hostile_forms_are_refused(name):
    with pytest.raises(ValueError, match=r"^(it|the) ") as caught:
        parse_image_url(FORMS[name])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("user", "user name or a password"),
        ("fragment", "fragment"),
        ("tab", "backslash, a space or a control character"),
        ("loopback, decimal", "the host '2130706433' is not a name"),
        ("IPv6 loopback", "the host and the port are invalid"),
        ("large port", "the port 65979 is not from 1 to 65535"),
        ("http", "must begin with https://"),
    ],
)
def test_error_says_what_is_wrong_with_a_url(name, words):
    with pytest.raises(ValueError, match=words):
        parse_image_url(FORMS[name])


def test_other_ports_must_be_in_the_list():
    url = parse_image_url(FORMS["another port"])
    assert url.port == 22
    assert not parse_hosts("*, images.example.com").allows(url)
    assert parse_hosts("images.example.com:22").allows(url)


def test_length_is_limited_to_that_of_a_source():
    url = "https://images.example.com/" + "a" * (MAX_URL_CHARACTERS - 27)
    assert parse_image_url(url).target == "/" + "a" * (MAX_URL_CHARACTERS - 27)
    with pytest.raises(ValueError, match="2049 characters"):
        parse_image_url(f"{url}a")


@pytest.mark.parametrize(
    ("hosts", "allowed", "refused"),
    [
        ("a.example.com", "a.example.com", "example.com b.a.example.com a.example.com:8443"),
        ("*.example.com", "a.example.com a.b.example.com", "example.com aexample.com a.example.com.evil.org"),
        (" A.example.com , b.example.com:8443,", "a.example.com b.example.com:8443", "b.example.com c.example.com"),
        ("*.example.com:8443", "a.example.com:8443", "a.example.com"),
        ("*", "a.example.com b.org", "a.example.com:8443"),
        ("*,a.example.com:8443", "b.org a.example.com:8443", "b.org:8443"),
    ],
)
def test_list_of_hosts(hosts, allowed, refused):
    chosen = parse_hosts(hosts)
    assert [host for host in allowed.split() if not chosen.allows(parse_image_url(f"https://{host}/"))] == []
    assert [host for host in refused.split() if chosen.allows(parse_image_url(f"https://{host}/"))] == []


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (",", "the list of hosts is empty"),
        ("https://images.example.com", "'https://images.example.com' is not allowed in the list of hosts"),
        ("images.example.com/a", "is not a name"),
        ("10.0.0.1", "addresses are not allowed"),
        ("[::1]", "'[::1]' is not allowed"),
        ("localhost", "is not a name"),
        ("images.example.com.", "is not a name"),
        ("a.example.com b.example.com", "is not a name"),
        ("images.*.com", "is not a name with or without a port"),
        ("*.", "is not a name"),
        ("*:8443", "is not a name"),
        ("images.example.com:0", "the port 0 is not from 1 to 65535"),
        ("images.example.com:99999", "the port 99999"),
        ("bücher.example", "xn-- form"),
    ],
)
def test_bad_list_of_hosts_stops_the_start(hosts, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        Settings(image_urls=hosts)
    assert "write names such as images.example.com" in str(caught.value)


def test_image_urls_are_off_by_default():
    assert Settings().image_urls is None
    assert Settings(image_urls="").image_urls is None


@pytest.mark.parametrize("address", ADDRESSES)
def test_special_addresses_are_not_public(address):
    assert why_not_public(address) is not None


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "168.63.129.17",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2606:4700:4700::1111",
        "2a00:1450:4001:80b::200e",
        "2001:4860:4860::8888",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_public_addresses(address):
    assert why_not_public(address) is None


def test_first_and_last_address_of_each_special_network_are_refused_in_every_form():
    for network in public_addresses._SPECIAL_IPV4:
        for number in (int(network.network_address), int(network.broadcast_address)):
            assert why_not_public(str(IPv4Address(number))) is not None
            for prefix in (0, 0xFFFF << 32, 0xFFFF << 48, 0x0064FF9B << 96, 0x0064FF9B0001 << 80):
                assert why_not_public(str(IPv6Address(prefix | number))) is not None
            assert why_not_public(str(IPv6Address(0x2002 << 112 | number << 80))) is not None
            assert why_not_public(str(IPv6Address(0x20010000 << 96 | number ^ 0xFFFFFFFF))) is not None
            assert why_not_public(str(IPv6Address(0x2606 << 112 | 0x5EFE << 32 | number))) is not None


def test_rule_is_at_least_as_strict_as_python():
    rng = random.Random(0)
    public = 0
    for _ in range(5000):
        for address in (IPv4Address(rng.getrandbits(32)), IPv6Address(rng.getrandbits(128) >> 3 * rng.getrandbits(1))):
            if why_not_public(str(address)) is None:
                public += 1
                assert address.is_global
                assert not address.is_multicast
                assert not address.is_reserved
    assert public > 4000


def test_address_with_a_zone_is_refused():
    assert why_not_public("2606:4700:4700::1111%eth0") == "2606:4700:4700::1111%eth0 has a zone"


def test_what_is_not_an_address_is_an_error():
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        why_not_public("images.example.com")
