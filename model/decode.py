"""Decodes untrusted bytes to RGB pixels for serving, indexing, training and evaluation.

The steps are: byte limit -> format from the first bytes (allow-list) -> number of parts (model/image_structure) ->
header -> pixel and shape limits -> pixels -> 8-bit RGB -> EXIF orientation. No pixel is decompressed until the limits
have been checked. Pillow reads the files. Hostile bytes can make Pillow raise almost any exception. `_translated` turns
each exception into one of three errors:

    TooLarge     too many bytes, pixels or parts such as JPEG scans, or too extreme an aspect ratio
    Unsupported  an unknown format or pixel type
    Broken       damaged or truncated data in a known format

How pixels are interpreted:
- Transparency (alpha channels, transparent palette entries, PNG's tRNS) is composited on white.
- Channels of 16 and 12 bits are reduced to their high 8 bits, as Pillow does for 16-bit colour. (For 16-bit greyscale,
  Pillow would clip instead, which would turn every value above 255 white.)
- Float and 32-bit integer TIFFs raise Unsupported, because they do not define which value is white.
- ICC profiles are not applied: the reference pipelines (torchvision's loader, transformers) use the stored pixels, and
  features must match theirs. CMYK is converted without a profile for the same reason.
- Only the first frame of an animation or a multi-page file is decoded.
- The orientation in EXIF (or XMP) is applied in every format. Unreadable EXIF is ignored, because the pixels are
  intact. For the same reason, a PNG's texts and colour profile are ignored, and so are its damaged optional chunks of
  up to 1 MiB. HEIC files describe the orientation outside EXIF, and their decoder applies it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, ExifTags, Image, UnidentifiedImageError, features

from model.image_structure import checked
from model.image_structure.limits import Broken as Broken
from model.image_structure.limits import DecodeError as DecodeError
from model.image_structure.limits import TooLarge as TooLarge
from model.image_structure.limits import Unsupported as Unsupported

Pixels = npt.NDArray[np.uint8]  # RGB [H, W, 3], upright


# Format -> its signatures as (offset, bytes). A file has the format if one of them matches.
SIGNATURES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "JPEG": ((0, b"\xff\xd8\xff"),),
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "WEBP": ((8, b"WEBP"),),
    "GIF": ((0, b"GIF87a"), (0, b"GIF89a")),
    "BMP": ((0, b"BM"),),
    "TIFF": ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
    "AVIF": ((4, b"ftypavif"), (4, b"ftypavis")),
}
BUILD_FEATURES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif"}  # optional parts of a Pillow build
HEIC, HEIC_EXTRA = "HEIC", "pip install 'dinov2-service[heif]'"


def _has_heic() -> bool:
    """Return whether HEIC images can be decoded, and if so, make Pillow able to open them.

    Before pi-heif decodes an image, it compares the coded size with the size in the header. The service decodes several
    images in parallel, so pi-heif uses only one thread for each.
    """
    try:
        import pi_heif
    except ImportError:
        return False
    pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return True


FORMATS = (
    *(name for name in SIGNATURES if name not in BUILD_FEATURES or features.check(BUILD_FEATURES[name])),
    *([HEIC] if _has_heic() else []),
)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as for HEIC
PILLOW_NAMES = {HEIC: "HEIF"}  # the formats for which Pillow has another name
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

ORIENTATIONS = {  # EXIF tag 0x0112 -> the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 258, 262, 322, 323
TIFF_WHITE_IS_ZERO = 0
PILLOW_MAX_PIXELS = 178_956_970  # Pillow's own limit (twice its MAX_IMAGE_PIXELS); it refuses larger images


# Bytes per pixel that a decoder takes besides Pillow's image: while it decodes, and while the image is converted to
# RGB. docs/decisions/0044-decoding-hostile-images.md has the measurements.
DECODER_BYTES: dict[str, tuple[int, int]] = {
    "JPEG": (6, 0),  # coefficients of 16 bits, if there are several scans
    "PNG": (0, 0),
    "WEBP": (14, 8),  # two canvases, and a copy of the frame
    "GIF": (0, 0),
    "BMP": (0, 0),
    "TIFF": (8, 0),  # a strip of the whole image with 4 samples of 16 bits
    "AVIF": (16, 8),  # planes of 10 bits with alpha, RGB, and a copy of it
    "HEIC": (16, 8),
}
STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # per pixel in Pillow; the other modes: 4
CONVERSION_BYTES = {"RGB": 0, "1": 4, "L": 4, "P": 4, "CMYK": 4, "YCbCr": 4, "RGBA": 5, "LA": 9}
"""Bytes per pixel that the conversion to RGB takes besides Pillow's image, for images without transparency, for RGBA
and for LA."""
_TRANSPARENT_BYTES, _OTHER_BYTES, _ARRAY_BYTES = 9, 13, 8  # the last: to turn the image upright, and for the array


@dataclass(frozen=True)
class DecodeLimits:
    """The limits on the size and shape of an image. They are checked before any pixel is decompressed.

    `on_memory` of `decode` says how much memory an image takes.

    Raises:
        ValueError: a limit is out of range.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 64_000_000
    max_aspect_ratio: float = 100.0  # long side / short side

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}; it must be at least 1")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}; it must be from 1 to {PILLOW_MAX_PIXELS}")
        if not self.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio is {self.max_aspect_ratio}; it must be at least 1")


DEFAULT_LIMITS = DecodeLimits()


class Stored(NamedTuple):
    """A decoded image before EXIF orientation is applied."""

    rgb: Image.Image
    orientation: int  # the EXIF orientation, 1 to 8
    size: tuple[int, int]  # (width, height) of the whole stored image
    box: tuple[float, float, float, float] | None  # the part of `rgb` that the image fills, if `rgb` is reduced
    mode: str  # Pillow's mode of the image in the file

    @property
    def aspect(self) -> float:
        """The width of the upright image divided by its height."""
        width, height = self.size
        return height / width if self.orientation in (5, 6, 7, 8) else width / height


OnSize = Callable[[int, int], None]
OnMemory = Callable[[int], None]

_BAND_PIXELS = 2**20  # pixels that are converted to an array at a time


def decode(
    data: bytes,
    limits: DecodeLimits = DEFAULT_LIMITS,
    *,
    on_size: OnSize | None = None,
    on_memory: OnMemory | None = None,
) -> Pixels:
    """Decode an image to RGB and return its pixels as a uint8 array [H, W, 3], contiguous and upright.

    The array may be read-only.

    `on_size` is called with the stored image's width and height when its header has been read, and then `on_memory`
    with the highest number of bytes that decoding takes, including the array. Both may raise a DecodeError to refuse
    the image before any pixel is decompressed. If a frame is larger than the header states, both are called again with
    the frame's numbers.

    Raises:
        TooLarge: the image exceeds one of `limits`, or it has too many parts, such as scans of a JPEG.
        Unsupported: the format or the pixel type is not supported.
        Broken: `data` is empty, damaged or truncated.
    """
    rgb, orientation, *_ = decode_stored(data, limits, on_size=on_size, on_memory=on_memory)
    with _translated("image", limits):
        rgb = upright(rgb, orientation)
        return _as_array(rgb)


def _as_array(rgb: Image.Image) -> Pixels:
    """Return the pixels of an image of mode RGB. Pillow's own conversion would copy a large image twice."""
    width, height = rgb.size
    if width * height <= 2 * _BAND_PIXELS:
        return np.ascontiguousarray(np.asarray(rgb))
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = np.asarray(rgb.crop((0, top, width, bottom)))
    return pixels


def decode_stored(
    data: bytes,
    limits: DecodeLimits = DEFAULT_LIMITS,
    *,
    least_side: int | None = None,
    on_size: OnSize | None = None,
    on_memory: OnMemory | None = None,
) -> Stored:
    """Decode an image to RGB and return it without turning it upright.

    Args:
        data: the encoded image.
        limits: the limits on the image's size and shape.
        least_side: the minimum side, in pixels, of a JPEG that is decoded at reduced size. A JPEG is decoded at 1/2,
            1/4 or 1/8 of its size, which is faster, if both sides of the result are at least this long. If None, JPEGs
            are decoded at full size. Other formats are always decoded at full size.
        on_size, on_memory: as in `decode`, without `least_side`.

    Raises:
        TooLarge, Unsupported, Broken: for the same reasons as in `decode`.
    """
    if not data:
        raise Broken("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise TooLarge(f"the image has {len(data)} bytes; the limit is {limits.max_bytes}")
    name = sniff(data)
    if name not in FORMATS:
        raise Unsupported(_why_unsupported(data, name))
    data = checked(name, data)
    with _translated(name, limits), Image.open(BytesIO(data), formats=[PILLOW_NAMES.get(name, name)]) as image:
        _check_header(image, limits)
        size = image.size
        _announce(name, image, on_size, on_memory)
        drawn = None if least_side is None else image.draft(None, (least_side, least_side))
        image.load()
        _check_header(image, limits)  # a frame may be larger than the header states
        if drawn is None and image.size != size:
            _announce(name, image, on_size, on_memory)
        whole, box = (size, drawn[1]) if drawn else (image.size, None)
        return Stored(_to_rgb(image), _orientation(image), whole, box, image.mode)


def _announce(name: str, image: Image.Image, on_size: OnSize | None, on_memory: OnMemory | None) -> None:
    if on_size is not None:
        on_size(*image.size)
    if on_memory is not None:
        on_memory(_bytes_to_decode(name, image))


def sniff(data: bytes) -> str | None:
    """Detect the format of an image from its first bytes.

    Returns:
        The name of the format, such as "JPEG", or None if it is unknown.
    """
    for name, signatures in SIGNATURES.items():
        if any(data.startswith(magic, offset) for offset, magic in signatures):
            return name
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        box_bytes = int.from_bytes(data[:4], "big")
        compatible = data[16 : min(box_bytes, 256)]
        return "AVIF" if b"avif" in compatible else HEIC
    return None


def _why_unsupported(data: bytes, name: str | None) -> str:
    what = f"not a known image; it starts with {bytes(data[:8]).hex(' ')}"
    if name is not None:
        what = f"{name} images are not supported"
    if name == HEIC:
        what = f"HEIC images need the extra `heif` on the server: {HEIC_EXTRA}"
    return f"{what}; supported formats: {', '.join(FORMATS)}"


@contextmanager
def _translated(name: str, limits: DecodeLimits) -> Iterator[None]:
    """Convert every exception that Pillow raises in the `with` block to a subclass of DecodeError.

    `name` and `limits` are used in the error messages.
    """
    try:
        yield
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"the {name} has more pixels than the limit of {limits.max_pixels}") from error
    except MemoryError as error:
        raise TooLarge(f"the {name} needs more memory than is available") from error
    except UnidentifiedImageError as error:
        raise Broken(f"the {name}'s header is damaged, or its pixel type is not supported") from error
    except Exception as error:  # hostile bytes make Pillow raise almost anything: KeyError, struct.error, ...
        raise Broken(f"the {name} is damaged or cut off: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the message of an error as one line of at most 200 characters.

    If the message is empty, return the name of the error's class.
    """
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def _bytes_to_decode(name: str, image: Image.Image) -> int:
    """Return the highest number of bytes that decoding an image takes, from its header."""
    stored = STORED_BYTES.get(image.mode, 4)
    decoder, kept = DECODER_BYTES[name]
    conversion = CONVERSION_BYTES.get(image.mode, _OTHER_BYTES)
    if "transparency" in image.info:
        conversion = max(conversion, _TRANSPARENT_BYTES)
    width, height = image.size
    each = max(stored + decoder, stored + kept + conversion, _ARRAY_BYTES)
    tile_width, tile_height = _tile_size(image)
    return width * height * each + tile_width * tile_height * decoder


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of a TIFF's tiles, or (0, 0). libtiff allocates a whole tile, even for an image of
    one pixel."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TIFF_TILE_WIDTH, 0), tags.get(TIFF_TILE_LENGTH, 0)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def _check_header(image: Image.Image, limits: DecodeLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise Broken(f"the image has no pixels: {width} x {height}")
    _check_pixels("the image", width, height, limits)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        ratio = f"{limits.max_aspect_ratio:g}"
        raise TooLarge(f"the image is {width} x {height}: one side may be at most {ratio} times the other")
    _check_pixels("a tile", *_tile_size(image), limits)


def _check_pixels(what: str, width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"{what} has {width} x {height} pixels, {width * height} in total; the limit is {limits.max_pixels}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB and return it. `image` may have any mode in which Pillow opens a supported format.

    Raises:
        Unsupported: the pixels are 32-bit or signed integers, floats or CIELAB.
    """
    if image.mode.startswith("I;16"):
        image = _gray16_to_gray8(image)
    if image.mode in ("I", "F"):
        kind = "32-bit or signed integer" if image.mode == "I" else "float"
        raise Unsupported(f"{kind} pixels have no defined white and are not supported; convert them to 8 or 16 bits")
    if image.mode == "LAB":
        raise Unsupported("CIELAB pixels are not supported; convert to RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray16_to_gray8(image: Image.Image) -> Image.Image:
    """Convert an image of mode I;16 (16-bit PNG and TIFF, 12-bit TIFF) to mode L by keeping the high 8 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image)  # [H,W] uint16
    gray = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO:  # Pillow inverts 8-bit images, but not 16-bit ones
        gray = 255 - gray
    if "transparency" in image.info:  # PNG's tRNS: this value is transparent
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray)


def _on_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # the key has 16 bits, but the pixels have 8
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=alpha)
    return white


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, or 1 (upright) if the orientation is missing or unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  broken EXIF raises almost anything, and the pixels are intact
        return 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image upright according to its EXIF orientation (1 to 8), and return the result.

    For any other orientation, the image is returned unchanged.
    """
    method = ORIENTATIONS.get(orientation)
    return image if method is None else image.transpose(method)
