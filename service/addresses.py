"""Parse and check the addresses of Redis and Milvus servers and of OpenTelemetry collectors, and remove user names and
passwords before logging.

If a password contains an unencoded `/`, `?` or `#`, urllib parses pieces of the password as other parts of the URL, for
instance as the path. So every part is checked, and error messages contain no part of the URL except the scheme.
urllib's own error messages are not shown, because they may contain pieces of the password.
"""

import re
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit

_REDIS_FORM: Final = (
    "not a valid URL: {}; the form is redis://[[user]:password@]host[:port][/db], with special characters of the "
    "password percent-encoded"
)
_MILVUS_FORM: Final = (
    "not a valid URL: {}; the form is milvus://[user:password@]host[:port][/database], with special characters of the "
    "password percent-encoded"
)

_OTLP_FORM: Final = "not a valid URL: {}; the form is http://host[:port][/path]"


def redis_parts(url: str) -> SplitResult:
    """Split a Redis URL into its parts, check each part, and return the parts.

    Raises:
        ValueError: `url` is not a valid Redis URL. The message contains no part of `url` except the scheme.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in ("redis", "rediss", "unix"):
        shown = f"not with {scheme}://" if separator else "but contains no ://"
        raise ValueError(f"must start with redis://, rediss:// or unix://, {shown}")
    parts = _split(url, _REDIS_FORM)
    if scheme != "unix" and not parts.hostname:
        raise ValueError(_REDIS_FORM.format("the host is missing"))
    if scheme != "unix" and not re.fullmatch(r"/?|/[0-9]+", parts.path):
        raise ValueError(_REDIS_FORM.format("the part after the host is not a database number"))
    if scheme == "unix" and (parts.hostname or not parts.path):
        raise ValueError("not a valid URL: the form is unix:///path/of/the/socket")
    return parts


def with_redis_password(url: str, password: str) -> str:
    """Return a Redis URL with the password added.

    Raises:
        ValueError: `url` is not a valid Redis URL, has a password already, or names a socket.
    """
    parts = redis_parts(url)
    if parts.scheme == "unix":
        raise ValueError("the URL names a socket, to which a password from a file cannot be added: add it to the URL")
    if parts.password:
        raise ValueError("the URL contains a password, and redis_password_file is set too: remove one of them")
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.removesuffix(':')}:{quote(password, safe='')}@{place}").geturl()


def secret_in(file: Path) -> str:
    """Return the text in a file without the line break at its end.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{file} cannot be read: {reason}") from None
    if not text:
        raise ValueError(f"{file} is empty")
    return text


def milvus_parts(url: str) -> SplitResult:
    """Split a Milvus address into its parts, check each part, and return the parts.

    Raises:
        ValueError: `url` is not a valid Milvus address. The message contains no part of `url` except the scheme.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in ("milvus", "milvus+tls"):
        is_shown = separator and re.fullmatch("[a-z0-9+]{1,16}", scheme)
        shown = f"not with {scheme}://" if is_shown else "but has no valid scheme"
        raise ValueError(f"must be embedded, or start with milvus:// or milvus+tls://, {shown}")
    parts = _split(url, _MILVUS_FORM)
    if not parts.hostname or not re.fullmatch(r"[A-Za-z0-9._:-]+", parts.hostname):
        raise ValueError(_MILVUS_FORM.format("the host is missing or invalid"))
    if bool(parts.username) != bool(parts.password):
        raise ValueError(_MILVUS_FORM.format("user and password must be given together"))
    if not re.fullmatch(r"/?|/[A-Za-z_][A-Za-z0-9_]*", parts.path):
        raise ValueError(_MILVUS_FORM.format("the part after the host is not a database name"))
    return parts


def otlp_traces_url(url: str) -> str:
    """Return the URL to which OTLP over HTTP posts spans. `url` is the address of a collector.

    Raises:
        ValueError: `url` is not a valid address. The message contains no part of `url`.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    parts = _split(url, _OTLP_FORM)
    if not parts.hostname:
        raise ValueError(_OTLP_FORM.format("the host is missing"))
    if parts.username is not None:
        raise ValueError(_OTLP_FORM.format("put credentials into OTEL_EXPORTER_OTLP_HEADERS"))
    return f"{url.rstrip('/')}/v1/traces"


def masked_url(url: str) -> str:
    """Return a Redis URL without its user name and password, so that it can be logged.

    Raises:
        ValueError: `url` is not a valid Redis URL. The message contains no part of `url` except the scheme.
    """
    parts = redis_parts(url)
    return f"unix://{parts.path}" if parts.scheme == "unix" else _masked(parts)


def masked_milvus_url(url: str) -> str:
    """Return a Milvus address without its user name and password, so that it can be logged.

    Raises:
        ValueError: `url` is not a valid Milvus address. The message contains no part of `url` except the scheme.
    """
    return _masked(milvus_parts(url))


def bracketed_host(parts: SplitResult) -> str:
    """Return the host of a URL. If the host is an IPv6 address, put it in square brackets."""
    return f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""


def _split(url: str, form: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(form.format("host or port is invalid")) from None
    if parts.query or parts.fragment:
        raise ValueError(form.format("options after ? or # are not supported"))
    return parts


def _masked(parts: SplitResult) -> str:
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{bracketed_host(parts)}{port}{parts.path}"
