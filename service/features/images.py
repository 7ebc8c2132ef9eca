"""Decode images with the service's errors. This is the border between `model.decode` and all code that answers
clients."""

from model.decode import DEFAULT_LIMITS, Broken, DecodeError, DecodeLimits, Pixels, TooLarge, Unsupported
from model.decode import decode as decode_image
from service.errors import BrokenImage, ImageTooLarge, ServiceError, UnsupportedImage

_ERRORS: dict[type[DecodeError], type[ServiceError]] = {
    TooLarge: ImageTooLarge,
    Unsupported: UnsupportedImage,
    Broken: BrokenImage,
}


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Pixels:
    """Decode an image, see `model.decode.decode`.

    Raises:
        ImageTooLarge, UnsupportedImage, BrokenImage: the decoder raised the matching error.
    """
    try:
        return decode_image(data, limits)
    except DecodeError as error:
        raise _ERRORS[type(error)](str(error)) from error
