"""Decode images, and convert the errors of `model.decode` into errors of the service."""

from model.decode import DEFAULT_LIMITS, Broken, DecodeError, DecodeLimits, OnSize, Pixels, TooLarge, Unsupported
from model.decode import decode as decode_image
from service.costs import TooCostly
from service.errors import BrokenImage, ImageTooLarge, RequestTooCostly, ServiceError, UnsupportedImage

_ERRORS: dict[type[DecodeError], type[ServiceError]] = {
    TooLarge: ImageTooLarge,
    Unsupported: UnsupportedImage,
    Broken: BrokenImage,
    TooCostly: RequestTooCostly,
}


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS, *, on_size: OnSize | None = None) -> Pixels:
    """Decode an image with `model.decode.decode` and return its pixels, uint8 [H, W, 3].

    Raises:
        ImageTooLarge, UnsupportedImage, BrokenImage: the image is too large, has an unsupported format, or is damaged.
        RequestTooCostly: `on_size` raised TooCostly.
    """
    try:
        return decode_image(data, limits, on_size=on_size)
    except DecodeError as error:
        raise _ERRORS[type(error)](str(error)) from error
