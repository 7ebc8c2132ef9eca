"""Parse the URL of an image in a request, and the operator's list of hosts from which images may be fetched.

Programs disagree about unusual URLs. If one of them checked a URL and another one requested it, they could see two
different hosts. So a URL is parsed only once, by strict rules, and all later steps use the parsed parts. Whatever has
several readings is refused: user names, backslashes, fragments, hosts that are numbers, and names with a final dot.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

MAX_URL_CHARACTERS: Final = 2048
HTTPS_PORT: Final = 443
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.ASCII | re.IGNORECASE)
_AUTHORITY: Final = re.compile(r"([^:]*)(?::([0-9]{1,5}))?", re.ASCII)
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?", re.ASCII)
"""A host name in lower case with at least two labels. The last label begins with a letter. Otherwise the system could
read the name as an IPv4 address, such as `127.1`, `0x7f.1` or `2130706433`."""
_MAX_NAME: Final = 253
_ENTRY: Final = re.compile(r"(\*\.)?([^:*]+)(?::([0-9]{1,5}))?", re.ASCII)
_TARGET: Final = "/?%:@!$&'()*+,;=-._~"  # characters that stay as they are in the path and the query
_ADVICE: Final = "write names such as images.example.com, *.example.com or images.example.com:8443, or * for all hosts"


@dataclass(frozen=True)
class ImageUrl:
    """A parsed https URL. `host` is a name in lower case, never an address. `target` is the path with the query, as it
    is sent to the server."""

    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """The value of the header Host: the name, and the port unless it is 443."""
        return self.host if self.port == HTTPS_PORT else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"https://{self.origin}{self.target}"


def parse_image_url(text: str) -> ImageUrl:
    """Parse the URL of an image. Characters of the path and the query that are not ASCII are percent-encoded as UTF-8.

    Raises:
        ValueError: the URL is not accepted. The message depends only on `text`.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_URL_CHARACTERS} are allowed")
    if "\\" in text or " " in text or not text.isprintable():
        raise ValueError("it contains a backslash, a space or a control character; percent-encode it")
    scheme = _SCHEME.match(text)
    if scheme is None or scheme[0].lower() != "https://":
        raise ValueError("it must begin with https://")
    rest = text[scheme.end() :]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        raise ValueError("it contains a user name or a password; leave them out")
    if "#" in rest:
        raise ValueError("it contains a fragment; leave out the # and what follows it")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise ValueError("the host and the port are invalid; the form is https://images.example.com/image.jpg")
    target = rest[len(authority) :]
    return ImageUrl(
        _host(parts[1]),
        HTTPS_PORT if parts[2] is None else _port(parts[2]),
        quote(target if target.startswith("/") else f"/{target}", safe=_TARGET),
    )


def _host(text: str) -> str:
    name = text.lower()
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(
            f"the host {text[:80]!r} is not a name such as images.example.com; addresses are not allowed, and a name "
            "with other letters than a to z must be written in its xn-- form"
        )
    return name


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise ValueError(f"the port {text} is not from 1 to 65535")
    return int(text)


@dataclass(frozen=True)
class AllowedHosts:
    """The hosts from which images may be fetched, each with its port. All names below a domain are allowed, but not the
    domain itself."""

    names: frozenset[tuple[str, int]]
    domains: frozenset[tuple[str, int]]
    everything: bool  # all hosts, on port 443

    def allows(self, url: ImageUrl) -> bool:
        """Return whether the list contains the host and the port of `url`. An entry without a port means port 443."""
        if self.everything and url.port == HTTPS_PORT:
            return True
        labels = url.host.split(".")
        domains = {(".".join(labels[i:]), url.port) for i in range(1, len(labels))}
        return (url.host, url.port) in self.names or not domains.isdisjoint(self.domains)


def parse_hosts(text: str) -> AllowedHosts:
    """Parse a comma-separated list of hosts: names, `*.` with a name for all names below it, either with or without a
    port, and `*` for all hosts on port 443.

    Raises:
        ValueError: the list is empty, or an entry is not allowed.
    """
    names: set[tuple[str, int]] = set()
    domains: set[tuple[str, int]] = set()
    everything = False
    entries = [entry for part in text.split(",") if (entry := part.strip())]
    if not entries:
        raise ValueError(f"the list of hosts is empty: {_ADVICE}")
    for entry in entries:
        if entry == "*":
            everything = True
            continue
        match = _ENTRY.fullmatch(entry)
        try:
            if match is None:
                raise ValueError("it is not a name with or without a port")
            host = _host(match[2]), _port(match[3] or str(HTTPS_PORT))
        except ValueError as error:
            raise ValueError(f"{entry[:200]!r} is not allowed in the list of hosts: {error}; {_ADVICE}") from None
        (domains if match[1] else names).add(host)
    return AllowedHosts(frozenset(names), frozenset(domains), everything)
