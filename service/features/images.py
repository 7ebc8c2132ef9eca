"""Decode images, in this process or in another one, and convert the errors of `model.decode` into errors of the
service."""

import traceback
from typing import NamedTuple

from model.decode import (
    DEFAULT_LIMITS,
    Broken,
    DecodeError,
    DecodeLimits,
    OnMemory,
    OnSize,
    Pixels,
    TooLarge,
    Unsupported,
    sniff,
)
from model.decode import decode as decode_image
from service.costs import TooCostly
from service.errors import BrokenImage, ImageTooLarge, RequestTooCostly, ServiceError, UnsupportedImage
from service.features.decode_memory import DecodeMemory, MustWait
from service.features.decode_processes import ISOLATED, DecodeProcesses

_ERRORS: dict[type[DecodeError], type[ServiceError]] = {
    TooLarge: ImageTooLarge,
    Unsupported: UnsupportedImage,
    Broken: BrokenImage,
    TooCostly: RequestTooCostly,
}


class Decoding(NamedTuple):
    """What all decodings of a process share. `processes` decode the formats in `ISOLATED`."""

    memory: DecodeMemory
    processes: DecodeProcesses


def decode(
    data: bytes,
    limits: DecodeLimits = DEFAULT_LIMITS,
    *,
    on_size: OnSize | None = None,
    on_memory: OnMemory | None = None,
    processes: DecodeProcesses | None = None,
) -> Pixels:
    """Decode an image with `model.decode.decode` and return its pixels, uint8 [H, W, 3]. `processes` decode the formats
    that need it.

    Raises:
        ImageTooLarge, UnsupportedImage, BrokenImage: the image is too large, has an unsupported format, or is damaged.
        RequestTooCostly: `on_size` raised TooCostly.
        MustWait: `on_memory` raised it.
    """
    try:
        if processes is not None and sniff(data) in ISOLATED:
            return processes.decode(data, limits, on_size=on_size, on_memory=on_memory)
        return decode_image(data, limits, on_size=on_size, on_memory=on_memory)
    except MustWait:
        raise
    except DecodeError as error:
        raise _ERRORS[type(error)](str(error)) from error


def forget_frames(error: BaseException) -> None:
    """Delete the local variables of the functions that raised an error. Otherwise the error, which lives until the
    request is answered, would keep the pixels of its image."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
