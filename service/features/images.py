"""Decode images, and convert the errors of `model.decode` into errors of the service."""

from model.decode import DEFAULT_LIMITS, Broken, DecodeError, DecodeLimits, Pixels, TooLarge, Unsupported
from model.decode import decode as decode_image
from service.errors import BrokenImage, ImageTooLarge, ServiceError, UnsupportedImage

_ERRORS: dict[type[DecodeError], type[ServiceError]] = {
    TooLarge: ImageTooLarge,
    Unsupported: UnsupportedImage,
    Broken: BrokenImage,
}


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Pixels:
    """Decode an image with `model.decode.decode` and return its pixels, uint8 [H, W, 3].

    Raises:
        ImageTooLarge, UnsupportedImage, BrokenImage: the image is too large, has an unsupported format, or is damaged.
    """
    try:
        return decode_image(data, limits)
    except DecodeError as error:
        raise _ERRORS[type(error)](str(error)) from error
