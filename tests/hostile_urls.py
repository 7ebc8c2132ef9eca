"""URLs that try to make the service connect to its own network, and the count of those that succeed.

`count_escapes` sends each URL through the guard of `service.web_images`. An escape is a connection to an address that
is not public or to a port that is not allowed, or an answer with an image. `benchmarks/hostile_urls.py` prints the
counts.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from service.buffer import Buffer
from service.settings import Settings
from tests.image_servers import PUBLIC, open_network, redirect

HOST = "images.example.com"
NAME = "evil.images.example.com"

FORMS = {
    "loopback": "https://127.0.0.1/",
    "loopback with two parts": "https://127.1/",
    "loopback with three parts": "https://127.0.1/",
    "loopback, decimal": "https://2130706433/",
    "loopback, hexadecimal": "https://0x7f000001/",
    "loopback, hexadecimal parts": "https://0x7f.0x0.0x0.0x1/",
    "loopback, hexadecimal last part": "https://127.0.0.0x1/",
    "loopback, octal": "https://017700000001/",
    "loopback, octal part": "https://0177.0.0.1/",
    "loopback, overflowing": "https://127.0.0.1.0x100000000/",
    "loopback, final dot": "https://127.0.0.1./",
    "loopback, fullwidth digits": "https://\uff11\uff12\uff17.0.0.1/",
    "loopback, ideographic stops": "https://127\u30020\u30020\u30021/",
    "loopback, circled digits": "https://\u2460\u2461\u2466.0.0.1/",
    "this host": "https://0/",
    "metadata": "https://169.254.169.254/latest/meta-data/",
    "metadata, decimal": "https://2852039166/latest/meta-data/",
    "IPv6 loopback": "https://[::1]/",
    "IPv6 unspecified": "https://[::]/",
    "IPv6 link-local with a zone": "https://[fe80::1%25eth0]/",
    "IPv4-mapped": "https://[::ffff:127.0.0.1]/",
    "IPv4-mapped, hexadecimal": "https://[::ffff:a9fe:a9fe]/",
    "NAT64": "https://[64:ff9b::7f00:1]/",
    "unclosed bracket": "https://[::1/",
    "localhost": "https://localhost/",
    "localhost, final dot": "https://localhost./",
    "final dot": f"https://{HOST}./",
    "two dots": "https://images..example.com/",
    "user": f"https://{HOST}@127.0.0.1/",
    "user and password": f"https://{HOST}:443@127.0.0.1/",
    "two users": f"https://a@{HOST}@127.0.0.1/",
    "user of the right host": f"https://127.0.0.1@{HOST}/",
    "encoded user": f"https://{HOST}%40127.0.0.1/",
    "backslash before the user": f"https://127.0.0.1\\@{HOST}/",
    "backslash after the host": f"https://{HOST}\\.127.0.0.1/",
    "backslashes as slashes": "https:\\\\127.0.0.1/",
    "fragment with the host": f"https://127.0.0.1#@{HOST}/",
    "fragment": f"https://{HOST}/#@127.0.0.1/",
    "query with the host": f"https://127.0.0.1?@{HOST}/",
    "encoded slash": f"https://{HOST}%2f@127.0.0.1/",
    "encoded host": "https://%31%32%37.0.0.1/",
    "encoded zero": f"https://127.0.0.1%00.{HOST}/",
    "zero": f"https://127.0.0.1\0.{HOST}/",
    "tab": f"https://127.0.0.1\t.{HOST}/",
    "line break and header": f"https://{HOST}/\r\nHost: 127.0.0.1",
    "space": f"https://{HOST} 127.0.0.1/",
    "zero-width space": f"https://127.0.0.1\u200b.{HOST}/",
    "soft hyphen": f"https://local\u00adhost.{HOST}/",
    "right to left": f"https://{HOST}\u202e/",
    "fraction slash": f"https://127.0.0.1\u2044.{HOST}/",
    "expanding letter": f"https://127.0.0.1\u2100.{HOST}/",
    "no host": "https:///127.0.0.1/",
    "one slash": "https:/127.0.0.1/",
    "no slashes": "https:127.0.0.1",
    "no scheme": "//127.0.0.1/",
    "another port": f"https://{HOST}:22/",
    "port 0": f"https://{HOST}:0/",
    "large port": f"https://{HOST}:65979/",
    "two ports": f"https://{HOST}:443:22/",
    "fullwidth port": f"https://{HOST}:\uff14\uff14\uff13/",
    "signed port": f"https://{HOST}:+443/",
    "http": f"http://{HOST}/",
    "file": "file:///etc/passwd",
    "ftp": f"ftp://{HOST}/",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "unix socket": "unix:///var/run/docker.sock",
    "jar": "jar:https://127.0.0.1!/",
    "long": f"https://{HOST}/{'a' * 2100}",
}
"""URLs that must be refused as they are written."""

ADDRESSES = (
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "233.252.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",  # IPv4-compatible
    "::ffff:127.0.0.1",  # IPv4-mapped
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",  # IPv4-translated
    "64:ff9b::127.0.0.1",  # NAT64
    "64:ff9b::169.254.169.254",
    "64:ff9b::224.0.0.1",
    "64:ff9b:1::127.0.0.1",  # NAT64 for local use, with a prefix of 96 bits
    "64:ff9b:1:7f00:0:100::",  # the same with a prefix of 48 bits
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:0:5db8:d822::80ff:fffe",  # Teredo; the last 32 bits are those of 127.0.0.1, inverted
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",  # 6to4
    "2002:a9fe:a9fe::",
    "2002:a00:1::1",
    "2606:2800:220:1:0:5efe:7f00:1",  # ISATAP
    "2606:2800:220:1:200:5efe:a00:1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
)
"""Addresses that must be refused for any name."""

REDIRECTS = {
    "loopback": "https://127.0.0.1/",
    "loopback, no scheme": "//127.0.0.1/",
    "loopback, decimal": "https://2130706433/",
    "IPv6 loopback": "https://[::1]/",
    "metadata": "https://169.254.169.254/latest/meta-data/",
    "a name with a private address": "https://inner.images.example.com/",
    "a name without an address": "https://none.images.example.com/",
    "the same host on another port": f"https://{HOST}:8080/",
    "http": f"http://{HOST}/",
    "http and loopback": "http://127.0.0.1:6379/",
    "a file": "file:///etc/passwd",
    "user": f"https://{HOST}@127.0.0.1/",
    "backslashes": "\\\\127.0.0.1\\",
    "backslash after a slash": "/\\127.0.0.1/",
    "itself, whose address has changed": f"https://rebound.{HOST}/",
    "a chain that ends at loopback": f"/to/{quote('/to/' + quote('https://127.0.0.1/', ''), '')}",
    "itself": "/loop",
}
"""Targets of redirects from a public server."""


@dataclass(frozen=True)
class Case:
    """A hostile URL. `addresses` are those of the host `NAME`: a list, or one list for each time it is resolved."""

    name: str
    url: str
    addresses: Sequence[Any] = ()


def cases() -> list[Case]:
    public = PUBLIC[0]
    return [
        *(Case(f"form: {name}", url) for name, url in FORMS.items()),
        *(Case(f"address: {address}", f"https://{NAME}/", [address]) for address in ADDRESSES),
        Case("address: the second one is private", f"https://{NAME}/", [public, "10.0.0.1"]),
        Case("address: the first one is private", f"https://{NAME}/", ["10.0.0.1", public]),
        Case("address: the IPv6 address is private", f"https://{NAME}/", [public, "fd00::1"]),
        Case("address: none", f"https://{NAME}/", []),
        *(Case(f"redirect: {name}", f"https://{HOST}/to/{quote(url, '')}") for name, url in REDIRECTS.items()),
        Case("rebinding: to loopback at a redirect", f"https://{NAME}/to/%2Fagain", [[public], ["127.0.0.1"]]),
        Case("rebinding: to IPv4-mapped loopback", f"https://{NAME}/to/%2Fagain", [[public], ["::ffff:127.0.0.1"]]),
        Case("rebinding: to metadata", f"https://{NAME}/to/%2Fagain", [[public], ["169.254.169.254"]]),
    ]


@dataclass(frozen=True)
class Count:
    """The number of hostile URLs, and the names of those that escaped."""

    urls: int
    escaped: list[str]


async def count_escapes() -> Count:
    """Send each hostile URL through the guard, and count the escapes."""
    chosen = cases()
    escaped = await asyncio.gather(*map(_escapes, chosen))
    return Count(len(chosen), [case.name for case, has_escaped in zip(chosen, escaped, strict=True) if has_escaped])


async def _escapes(case: Case) -> bool:
    """Send one URL through the guard, with servers and a resolver of its own. Return whether it escaped."""
    async with open_network(inner_images_example_com=["192.168.0.1"]) as network:
        network.names |= {NAME: case.addresses, f"rebound.{HOST}": ["127.0.0.1"]}
        network.answers["/loop"] = redirect("/loop")
        web = network.web(Settings(image_urls="*"), Buffer(2**30))
        [outcome] = (await web.fetch_all([case.url])).values()
        await web.close()
    is_public = all(address in PUBLIC and port == 443 for address, port in network.dialled)
    return bool(network.trapped) or not is_public or outcome.error is None
