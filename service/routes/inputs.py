"""Requests with images to bytes and options: the one reader of the three bodies that every image route takes.

- `application/json`: images as data URLs or plain base64, options as fields.
- `multipart/form-data`: images as files (any field name), options as form fields.
- a raw image: the body is one image, options as query parameters.

An image that cannot be read here (bad base64) becomes the `ServiceError` of its own item; the rest of the request goes
on, and the pipeline passes the error through.
"""

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from service.errors import BrokenImage, InvalidRequest, ServiceError, UnsupportedMediaType
from service.state import Service

OFF_LOOP_BYTES = 2**18
"""JSON bodies from this size on are parsed and decoded in a thread: the event loop serves others meanwhile."""

Model = TypeVar("Model", bound=BaseModel)
ImageBytes = bytes | ServiceError


@dataclass(frozen=True)
class Upload:
    """One image of a form or a raw body; `name` is the file's, empty for a raw body."""

    name: str
    data: bytes


def service_of(request: Request) -> Service:
    """The running service behind a request."""
    service: Service = request.app.state.service
    return service


def media_type(request: Request) -> str:
    """The Content-Type without parameters, lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def validated(model: type[Model], values: Any) -> Model:
    """A request body or its options, checked.

    Raises:
        InvalidRequest: names every field at fault and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False)) from error


def invalid(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """Pydantic's list of faults as one error."""
    faults = [(".".join(str(part) for part in fault["loc"] if part != "body"), fault["msg"]) for fault in errors]
    detail = "; ".join(f"{name}: {message}" if name else message for name, message in faults[:10])
    return InvalidRequest(detail, param=faults[0][0] or None)


async def read_json(request: Request) -> Any:
    """The JSON body.

    Raises:
        InvalidRequest: not JSON.
    """
    body = await request.body()
    try:
        return orjson.loads(body) if len(body) < OFF_LOOP_BYTES else await asyncio.to_thread(orjson.loads, body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


async def read_uploads(request: Request) -> tuple[list[Upload], dict[str, Any]]:
    """The files and fields of a form, or the one raw image and the query's parameters.

    Raises:
        UnsupportedMediaType: neither a form nor an image.
        InvalidRequest: a broken form, no file, too many, or a field given twice.
    """
    service = service_of(request)
    kind = media_type(request)
    if kind == "multipart/form-data":
        return await _read_form(request, service.settings.items_per_request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [Upload("", await request.body())], dict(request.query_params)
    raise UnsupportedMediaType(
        f"Content-Type {kind or 'missing'!r}: send application/json, multipart/form-data, or an image as image/*"
    )


async def _read_form(request: Request, max_files: int) -> tuple[list[Upload], dict[str, Any]]:
    limit = service_of(request).settings.max_image_bytes
    try:
        form = await request.form(max_files=max_files, max_fields=32, max_part_size=2**16)
    except HTTPException as error:
        raise InvalidRequest(f"the form cannot be read: {error.detail}") from error
    uploads: list[Upload] = []
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                # One byte past the limit is enough for the decoder to refuse the image by its size.
                uploads.append(Upload(value.filename or "", await value.read(limit + 1)))
            elif name in fields:
                raise InvalidRequest(f"field {name} is given twice", param=name)
            else:
                fields[name] = value
    finally:
        await form.close()
    if not uploads:
        raise InvalidRequest("the form holds no file", param="file")
    return uploads, fields


async def decode_images(texts: Sequence[str]) -> list[ImageBytes]:
    """Data URLs or plain base64 to bytes."""

    def decode_all() -> list[ImageBytes]:
        return [decode_image(text) for text in texts]

    size = sum(len(text) for text in texts)
    return decode_all() if size < OFF_LOOP_BYTES else await asyncio.to_thread(decode_all)


def decode_image(text: str) -> ImageBytes:
    """One data URL (`data:image/...;base64,...`) or plain base64; an error for its item otherwise."""
    payload = text
    if text[:5].lower() == "data:":
        head, comma, payload = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            return BrokenImage("a data URL must be of the form data:image/...;base64,...")
    elif text[:8].lower().startswith(("http://", "https://")):
        return BrokenImage("this service does not fetch URLs: send the image as a data URL or base64")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        return BrokenImage("neither a data URL nor base64")


def check_count(count: int, service: Service, param: str) -> None:
    """Refuse a request without images or with too many.

    Raises:
        InvalidRequest: names the number and the limit.
    """
    limit = service.settings.items_per_request
    if not 1 <= count <= limit:
        raise InvalidRequest(f"{param} holds {count} images: 1 to {limit} are allowed", param=param)
