"""How images arrive: in JSON as data URLs or base64, as files of a form, or as a raw body. One function reads them all.

Images that cannot be read (not base64, a link) become errors of their own item, not of the request, so that
`on_error=partial` covers them. Sizes were limited while the body came in (`service/middleware.py`); a form's files stay
in memory, since a container's root is read-only and a photo should not touch the disk.
"""

import asyncio
import binascii
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import (
    BadRequest,
    BrokenImage,
    ImageTooLarge,
    InvalidRequest,
    UnsupportedMediaType,
)
from service.outcomes import Outcome, attempt, numbered
from service.settings import Settings
from service.state import Service

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

BIG_BODY = 2**18
"""Bytes from which parsing JSON and base64 would hold up the event loop noticeably."""
MAX_FORM_FIELDS = 32
MAX_FIELD_BYTES = 64 * 1024
MAX_JSON_VALUES = 1_000_000
"""In one body: each becomes an object of 60 bytes and more, so a body of commas takes 20 times its size in memory."""
MAX_FIELDS = 32
"""Beside each other in one object that is checked against a schema: every wrong one is an object of its own."""
MAX_PROBLEMS = 10
_FORM_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "iso-8859-1", "latin-1"})
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[^,]*)?,", re.ASCII | re.IGNORECASE)
_FORMS = "application/json, multipart/form-data, or the image itself as image/*"


@dataclass(frozen=True)
class Upload:
    """A request's body, read: its images in order, whatever stood beside them, and the files' names (of a form)."""

    images: list[Outcome[bytes]]
    fields: dict[str, Any]
    names: list[str] = field(default_factory=list)


def service_of(request: Request) -> Service:
    """The service that answers this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty when there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_upload(request: Request, *, key: str) -> Upload:
    """Read a body with images; `key` is the JSON field that holds them (a string or a list of strings).

    Raises:
        BadRequest, InvalidRequest, UnsupportedMediaType, PayloadTooLarge: what is wrong with the body.
    """
    settings = service_of(request).settings
    kind = media_type(request)
    if kind == "application/json":
        fields = await read_json(request)
        if key not in fields:
            raise InvalidRequest(f"{key} is missing: a data URL or base64, or a list of them", param=key)
        given = fields.pop(key)
        texts = given if isinstance(given, list) else [given]
        check_count(len(texts), settings, key)
        return Upload(await decode_texts(texts, settings), fields)
    if kind == "multipart/form-data":
        upload = await _read_form(request, settings)
        check_count(len(upload.images), settings, "file")
        return upload
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload(numbered([await request.body()]), query_fields(request))
    raise UnsupportedMediaType(f"content type {kind or 'missing'!r}: send {_FORMS}")


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        UnsupportedMediaType, BadRequest, InvalidRequest: another content type, not JSON, not an object.
    """
    kind = media_type(request)
    if kind != "application/json":
        raise UnsupportedMediaType(f"content type {kind or 'missing'!r}: send application/json")
    return await json_of(request)


async def json_of(request: Request) -> dict[str, Any]:
    """As `read_json`, whatever the content type."""
    body = await request.body()
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_JSON_VALUES:
        raise InvalidRequest(f"the body holds more than {MAX_JSON_VALUES:,} JSON values")
    try:
        value = await off_loop(len(body), lambda: orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


async def read_optional_json(request: Request) -> dict[str, Any]:
    """As `read_json`; no body at all is an empty object."""
    return await read_json(request) if await request.body() else {}


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which goes over `size` bytes: on a thread if the event loop would notice."""
    return work() if size < BIG_BODY else await asyncio.to_thread(work)


async def decode_texts(texts: list[Any], settings: Settings) -> list[Outcome[bytes]]:
    """Bytes of data URLs or base64, in order; what cannot be read is its item's error."""

    def work() -> list[Outcome[bytes]]:
        return [attempt(i, image_from_text, text, settings.max_image_bytes) for i, text in enumerate(texts)]

    return await off_loop(sum(len(text) for text in texts if isinstance(text, str)), work)


def image_from_text(text: Any, max_bytes: int) -> bytes:
    """Bytes of one data URL or plain base64 (line breaks, URL-safe letters and missing padding are forgiven).

    Raises:
        InvalidRequest: not a string, or a link.
        ImageTooLarge, BrokenImage: more than `max_bytes`, not base64.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"an image is a string (data URL or base64), not {type(text).__name__}")
    if text[:8].lower().startswith(("http://", "https://")):
        raise InvalidRequest("links are not fetched: send the image itself, as a data URL or base64")
    start = 0
    if text[:1].isspace():
        text = text.lstrip()
    if text[:5].lower() == "data:":
        match = _DATA_URL.match(text)
        if match is None or not (match[2] or "").lower().endswith(";base64"):
            raise InvalidRequest("a data URL must look like data:image/jpeg;base64,...")
        start = match.end()
    if (len(text) - start) // 4 * 3 > max_bytes + 2:
        raise ImageTooLarge(f"the image has about {(len(text) - start) // 4 * 3} bytes; the limit is {max_bytes}")
    payload = text[start:] if start else text
    try:
        try:
            return binascii.a2b_base64(payload, strict_mode=True)
        except binascii.Error:
            plain = "".join(payload.split()).replace("-", "+").replace("_", "/").rstrip("=")
            return binascii.a2b_base64(plain + "=" * (-len(plain) % 4), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BrokenImage(f"not base64: {error}") from error


def check_count(count: int, settings: Settings, param: str) -> None:
    """Refuse a request with no image or with more than one request may bring."""
    limit = settings.items_per_request
    if not 1 <= count <= limit:
        raise InvalidRequest(f"{count} images in {param}: a request takes 1 to {limit}", param=param)


def query_fields(request: Request) -> dict[str, Any]:
    """Query parameters; one given several times becomes a list."""
    return _grouped(request.query_params.multi_items())


def parse_options(model: type[Model], fields: dict[str, Any]) -> Model:
    """Check fields against a schema.

    Raises:
        InvalidRequest: the message names each field at fault, its value's problem and what is allowed.
    """
    check_fields(fields, "the request")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        texts = [_problem(model, problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            texts.append(f"and {len(problems) - MAX_PROBLEMS} more")
        param = str(problems[0]["loc"][0])[:80] if problems[0]["loc"] else None
        raise InvalidRequest("; ".join(texts), param=param) from error


def check_fields(fields: dict[str, Any], where: str) -> None:
    """Refuse an object of very many fields before a schema makes an error of each."""
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(f"{where} has {len(fields):,} fields; at most {MAX_FIELDS} are accepted")


def _problem(model: type[BaseModel], problem: ErrorDetails) -> str:
    """One fault: where, what is allowed, what was given."""
    where = ".".join(str(part)[:80] for part in problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden":
        known = f"; known are {', '.join(model.model_fields)}" if len(problem["loc"]) == 1 else ""
        return f"{where}: unknown field{known}"
    text = problem["msg"]
    if problem["type"] in ("model_type", "dict_type"):
        text = "Input should be an object"  # pydantic's own words name a class of ours
    elif problem["type"].startswith(("int_", "float_")) and len(problem["loc"]) == 1:
        text = text.partition(", ")[0] + _limits(model.model_fields[str(problem["loc"][0])])
    told = problem["type"] in ("missing", "too_long", "too_short")  # how many there are is in pydantic's words
    return f"{where}: {text}" + ("" if told else f", not {reprlib.repr(problem['input'])}")


def _limits(field: FieldInfo) -> str:
    """What numbers a field takes, as far as it says."""
    low, high = ([getattr(one, name) for one in field.metadata if hasattr(one, name)] for name in ("ge", "le"))
    return f" from {low[0]} to {high[0]}" if low and high else ""


class _MemoryParser(MultiPartParser):
    """Starlette's parser that never spools a file to disk (the body's limit bounds the memory), and knows whether the
    form was cut off: what stood after the last whole part would be lost without a word."""

    spool_max_size = 2**62
    ended = False

    def on_end(self) -> None:
        self.ended = True
        super().on_end()


async def _read_form(request: Request, settings: Settings) -> Upload:
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _FORM_CHARSETS:  # others (utf-7, unicode_escape) decode to what no JSON can hold
        raise BadRequest(f"the form's charset {charset[:80]!r} is not accepted: send utf-8")
    parser = _MemoryParser(
        request.headers,
        request.stream(),
        max_files=settings.items_per_request + 1,  # one more, so that the usual excess is told as in JSON
        max_fields=MAX_FORM_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
        if not parser.ended:
            await form.close()
            raise MultiPartException("it ends before its last boundary")
    except MultiPartException as error:
        raise BadRequest(f"the form cannot be read: {error.message}") from error
    try:
        files: list[bytes] = []
        names, texts = [], []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((name, value))
            elif name in ("file", "files", "file[]", "files[]"):
                files.append(await value.read())
                names.append(value.filename or "")
            else:
                raise InvalidRequest(f"form file {name!r}: files are called file or files", param=name[:64])
    finally:
        await form.close()
    return Upload(numbered(files), _grouped(texts), names)


def _grouped(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            fields[name] = [*(fields[name] if isinstance(fields[name], list) else [fields[name]]), value]
        else:
            fields[name] = value
    return fields
