"""Addresses of Redis and Milvus: read, checked, and shown without their passwords.

An unencoded `/`, `?` or `#` in a password moves the rest of it into another part of the URL. So each part is checked,
and no message quotes one, nor urllib's messages, which do.
"""

import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

_REDIS_FORM: Final = (
    "not a valid URL: {}; redis://[[user]:password@]host[:port][/db] is, with special characters of the password "
    "percent-encoded"
)
_MILVUS_FORM: Final = (
    "not a valid URL: {}; milvus://[user:password@]host[:port][/database] is, with special characters of the password "
    "percent-encoded"
)


def redis_parts(url: str) -> SplitResult:
    """The parts of a Redis URL, each checked.

    Raises:
        ValueError: it is no URL of Redis; the message shows no more than the scheme.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in ("redis", "rediss", "unix"):
        shown = f"{scheme}://" if separator else "a value without ://"
        raise ValueError(f"must start with redis://, rediss:// or unix://, not with {shown}")
    parts = _split(url, _REDIS_FORM)
    if scheme != "unix" and not parts.hostname:
        raise ValueError(_REDIS_FORM.format("the host is missing"))
    if scheme != "unix" and not re.fullmatch(r"/?|/[0-9]+", parts.path):
        raise ValueError(_REDIS_FORM.format("what follows the host is not the number of a database"))
    if scheme == "unix" and (parts.hostname or not parts.path):
        raise ValueError("not a valid URL: unix:///path/of/the/socket is")
    return parts


def milvus_parts(url: str) -> SplitResult:
    """The parts of a Milvus address, each checked.

    Raises:
        ValueError: it is no address of Milvus; the message shows no more than the scheme.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in ("milvus", "milvus+tls"):
        shown = f"{scheme}://" if separator and re.fullmatch("[a-z0-9+]{1,16}", scheme) else "a value without a scheme"
        raise ValueError(f"must be embedded, or start with milvus:// or milvus+tls://, not with {shown}")
    parts = _split(url, _MILVUS_FORM)
    if not parts.hostname or not re.fullmatch(r"[A-Za-z0-9._:-]+", parts.hostname):
        raise ValueError(_MILVUS_FORM.format("the host is missing or cannot be one"))
    if bool(parts.username) != bool(parts.password):
        raise ValueError(_MILVUS_FORM.format("user and password go together"))
    if not re.fullmatch(r"/?|/[A-Za-z_][A-Za-z0-9_]*", parts.path):
        raise ValueError(_MILVUS_FORM.format("what follows the host is not the name of a database"))
    return parts


def masked_url(url: str) -> str:
    """Scheme, host, port and database of a Redis URL, for the log: built from these, so that nothing else is shown.

    Raises:
        ValueError: it is no URL of Redis; the message shows no more than the scheme.
    """
    parts = redis_parts(url)
    return f"unix://{parts.path}" if parts.scheme == "unix" else _masked(parts)


def masked_milvus_url(url: str) -> str:
    """Scheme, host, port and database of a Milvus address, for the log.

    Raises:
        ValueError: it is no address of Milvus; the message shows no more than the scheme.
    """
    return _masked(milvus_parts(url))


def bracketed_host(parts: SplitResult) -> str:
    """The host, in brackets if it is an IPv6 address."""
    return f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""


def _split(url: str, form: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(form.format("host or port cannot be read")) from None
    if parts.query or parts.fragment:
        raise ValueError(form.format("options after ? or # are not taken"))
    return parts


def _masked(parts: SplitResult) -> str:
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{bracketed_host(parts)}{port}{parts.path}"
