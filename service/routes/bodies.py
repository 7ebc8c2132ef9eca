"""Read request bodies: a JSON object, a form with files, or an image as the raw body.

`service/middleware.py` limits the size of a body while it arrives. The files of a form are never written to disk,
because the container's root file system is read-only and clients' images should not be on the disk.
"""

import re
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.data_urls import check_count, decode_texts
from service.errors import BadRequest, InvalidRequest, UnsupportedMediaType
from service.off_loop import BIG_BODY, off_loop
from service.outcomes import Outcome, numbered
from service.routes.direct import service_of
from service.schema_base import Schema
from service.search.checks import loads_exactly, may_have_lost_digits
from service.settings import Settings

MAX_FORM_FIELDS: Final = 32
MAX_FIELD_BYTES: Final = 64 * 1024
MAX_JSON_VALUES: Final = 1_000_000
"""The highest number of JSON values in one body. Each value becomes a Python object of at least 60 bytes. Without a
limit, a body that consists mostly of commas would take more than 20 times its size in memory."""
_FORM_CHARSETS: Final = frozenset({"utf-8", "utf8", "us-ascii", "iso-8859-1", "latin-1"})
_FILES: Final = ("file", "files", "file[]", "files[]")
_EXTENDED_FILENAME: Final = re.compile(rb";\s*filename\*\s*=\s*\"?([\w.-]*)'[^']*'([^;\"\s]*)", re.IGNORECASE)
_FORMS: Final = "application/json, multipart/form-data, or the image itself as image/*"


@dataclass(frozen=True)
class Upload:
    """A parsed request body: its images in order, its other fields, and the file names if it is a form."""

    images: list[Outcome[bytes]]
    fields: dict[str, Any]
    names: list[str] = field(default_factory=list)


def media_type(request: Request) -> str:
    """Return the Content-Type of a request in lower case and without parameters. Return an empty string if the request
    has no Content-Type."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_upload(request: Request, settings: Settings, *, key: str, fields_per_image: int = 0) -> Upload:
    """Read a request body with images and return its parts. In a JSON body, the field `key` contains the images: one
    string or object, or a list of them. `fields_per_image` is the number of form fields that may occur once for each
    image.

    Raises:
        BadRequest, InvalidRequest, UnsupportedMediaType, PayloadTooLarge: the body is not accepted.
    """
    kind = media_type(request)
    if kind == "application/json":
        fields = await read_json(request)
        if key not in fields:
            raise InvalidRequest(f"{key} is missing: send a data URL or base64, or a list of them", param=key)
        images = fields.pop(key)
        texts = images if isinstance(images, list) else [images]
        check_count(len(texts), settings, key)
        return Upload(await decode_texts(texts, settings, service_of(request).web_images), fields)
    if kind == "multipart/form-data":
        max_fields = MAX_FORM_FIELDS + fields_per_image * settings.items_per_request
        upload = await _read_form(request, settings, max_fields)
        check_count(len(upload.images), settings, "file")
        return upload
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload(numbered([await request.body()]), query_fields(request))
    raise UnsupportedMediaType(f"content type {kind!r} is not accepted: send {_FORMS}")


async def read_json(request: Request) -> dict[str, Any]:
    """Parse the body of a request and return its JSON object.

    Raises:
        UnsupportedMediaType: the content type is not application/json.
        BadRequest: the body is not JSON.
        InvalidRequest: the JSON is not an object, or it has too many values.
    """
    kind = media_type(request)
    if kind != "application/json":
        raise UnsupportedMediaType(f"content type {kind!r} is not accepted: send application/json")
    return await json_of(request)


async def json_of(request: Request) -> dict[str, Any]:
    """Parse the body of a request and return its JSON object. The content type is not checked. A byte order mark at the
    start is ignored, as RFC 8259 allows.

    Raises:
        BadRequest: the body is not JSON.
        InvalidRequest: the JSON is not an object, or it has too many values.
    """
    body = await request.body()
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_JSON_VALUES:
        raise InvalidRequest(f"the body has more than {MAX_JSON_VALUES:,} JSON values")
    if len(body) >= BIG_BODY and (b"\\u" in body or not body.isascii()):
        request.state.hold(3 * len(body))  # Python stores a text with a rare character in 4 bytes per character
    try:
        value = await off_loop(len(body), lambda: orjson.loads(body.removeprefix(BOM_UTF8)))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


async def read_exact_json(request: Request, metadata_in: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Parse the body of a request and return its JSON object, like `read_json`. orjson converts an integer beyond 64
    bits to a float without an error. If this may have happened in the part of the body that `metadata_in` returns, the
    body is parsed again without this conversion, so stores can refuse such integers.

    Raises:
        ServiceError: the same errors as those of `read_json`.
    """
    fields = await read_json(request)
    body = await request.body()

    def exact() -> dict[str, Any]:
        whole: dict[str, Any] = loads_exactly(body) if may_have_lost_digits(metadata_in(fields)) else fields
        return whole

    return await off_loop(len(body), exact)


async def read_optional_json(request: Request) -> dict[str, Any]:
    """Parse the body of a request and return its JSON object. Return an empty dictionary if the request has no body."""
    return await read_json(request) if await request.body() else {}


def refuse_query_options(request: Request, options: type[Schema]) -> None:
    """Check that a request with a form or a JSON body has no options in its query string, where they would be ignored.

    Raises:
        InvalidRequest: the query string contains an option in `options`.
    """
    kind = media_type(request)
    places = {"application/json": "a JSON field", "multipart/form-data": "a form field"}
    if kind in places:
        for name in request.query_params:
            if name in options.model_fields:
                raise InvalidRequest(f"{name} is in the query string: send it as {places[kind]}", param=name)


def query_fields(request: Request) -> dict[str, Any]:
    """Return the query parameters as a dictionary. The value of a repeated parameter is the list of its values."""
    return _grouped(request.query_params.multi_items())


class _MemoryParser(MultiPartParser):
    """A form parser that differs from Starlette's in three ways. First, it keeps files in memory and never writes them
    to disk. The size limit for the body also limits this memory. Second, it records in `ended` whether the form is
    complete, because Starlette's parser silently drops an incomplete last part. Third, a part without the parameter
    `filename` can also be a file. This is the case if it has the parameter `filename*`, which older clients send for
    names that are not ASCII, if its content type is that of an image, or if its content type is
    `application/octet-stream` and its name is in `_FILES`."""

    spool_max_size = 2**62
    ended = False

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        filename = None
        if b"filename" not in (options := parse_options_header(disposition)[1]):
            filename = _extended_filename(disposition)
            kind = dict(part.item_headers).get(b"content-type", b"").partition(b";")[0].strip().lower()
            is_binary = kind == b"application/octet-stream" and options.get(b"name", b"").decode("latin-1") in _FILES
            if filename is not None or is_binary or kind.startswith(b"image/"):
                part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()
        if filename is not None and part.file is not None:
            part.file.filename = filename

    def on_end(self) -> None:
        self.ended = True
        super().on_end()


def _extended_filename(disposition: bytes) -> str | None:
    """Return the value of the parameter `filename*` (RFC 5987) of the header Content-Disposition, or None if there is
    no such parameter. Bytes that cannot be decoded become U+FFFD."""
    match = _EXTENDED_FILENAME.search(disposition)
    if match is None:
        return None
    encoding = "latin-1" if match[1].lower() == b"iso-8859-1" else "utf-8"
    return unquote_to_bytes(match[2]).decode(encoding, errors="replace")


async def _read_form(request: Request, settings: Settings, max_fields: int) -> Upload:
    """Read a form with image files and at most `max_fields` text fields, and return its parts."""
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8").decode("latin-1")
    if (
        charset.lower() not in _FORM_CHARSETS
    ):  # others (utf-7, unicode_escape) may decode to text that JSON cannot encode
        raise BadRequest(f"the form's charset {charset[:80]!r} is not accepted: send utf-8")

    async def whole_form() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        if not parser.ended:  # raised inside the parser, which then closes its files
            raise MultiPartException("it ends before its last boundary")

    parser = _MemoryParser(
        request.headers,
        whole_form(),
        max_files=settings.items_per_request + 1,  # one more, so that one file too many gets the same error as in JSON
        max_fields=max_fields,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadRequest(f"the form cannot be read: {error.message}") from error
    try:
        files: list[bytes] = []
        names, texts = [], []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                if name in _FILES:
                    raise InvalidRequest(
                        f"form field {name!r} is text: a file needs a file name, or a content type such as image/jpeg",
                        param=name,
                    )
                texts.append((name, value))
            elif name in _FILES:
                files.append(await value.read())
                names.append(value.filename or "")
            else:
                raise InvalidRequest(f"form field {name!r} has a file: name the field file or files", param=name[:64])
    finally:
        await form.close()
    return Upload(numbered(files), _grouped(texts), names)


def _grouped(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return (name, value) pairs as a dictionary. The value of a repeated name is the list of its values."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            fields[name] = [*(fields[name] if isinstance(fields[name], list) else [fields[name]]), value]
        else:
            fields[name] = value
    return fields
