"""Checks that training and serving decode the same pixels from every kind of file."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from service.features.images import decode as decode_for_serving
from training.data.dataset import decode as decode_for_training
from training.data.dataset import decode_square, squash

HEIGHT, WIDTH, SIDE = 24, 40, 16
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = Image.fromarray(np.stack([40 + 5 * X, 20 + 9 * Y, 230 - 2 * X - 4 * Y], -1).clip(0, 255).astype(np.uint8))
GREY = RGB.convert("L")


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(RGB, "PNG", exif=exif)


def transparent() -> Image.Image:
    image = RGB.convert("RGBA")
    image.putalpha(GREY)
    return image


def much_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 2**21, zip=True)
    return info


FILES = {
    "alpha": encode(transparent(), "PNG"),
    "alpha, WebP": encode(transparent(), "WEBP", lossless=True, exact=True),
    "grey with alpha": encode(GREY.convert("LA"), "PNG"),
    "palette": encode(RGB.quantize(16), "PNG"),
    "palette with a transparent colour": encode(RGB.quantize(16), "PNG", transparency=3),
    "16-bit grey": encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
    "16-bit grey TIFF": encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "TIFF"),
    "CMYK": encode(RGB.convert("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": encode(RGB.convert("CMYK"), "TIFF"),
    "grey": encode(GREY, "PNG"),
    "grey JPEG": encode(GREY, "JPEG"),
    "colour JPEG": encode(RGB, "JPEG", quality=95),
    "much text": encode(RGB, "PNG", pnginfo=much_text()),
    "large colour profile": encode(RGB, "PNG", icc_profile=np.random.default_rng(0).bytes(1_200_000)),
    "torn EXIF": encode(RGB, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xf0\xff\xff\xff"),
    "one bit": encode(RGB.convert("1"), "PNG"),
    **{f"EXIF orientation {orientation}": turned(orientation) for orientation in range(1, 9)},
}


@pytest.mark.parametrize("name", FILES)
def test_training_and_serving_decode_to_equal_pixels(name: str) -> None:
    served = decode_for_serving(FILES[name])
    np.testing.assert_array_equal(decode_for_training(FILES[name]), served)
    square, aspect = decode_square(FILES[name], SIDE)
    expected, expected_aspect = squash(served, SIDE)
    assert np.abs(square.astype(int) - expected).max() <= 1  # one level: a square is turned after its resize
    assert aspect == expected_aspect


def test_transparency_lies_on_white_and_16_bits_keep_the_high_byte() -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (10, 20, 30, 0))
    assert (decode_for_training(encode(clear, "PNG")) == 255).all()
    expected = np.repeat(np.asarray(GREY)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_for_training(FILES["16-bit grey"]), expected)


def test_a_turned_file_is_upright_on_both_sides() -> None:
    assert decode_for_training(FILES["EXIF orientation 6"]).shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_array_equal(decode_for_training(FILES["EXIF orientation 3"]), np.asarray(RGB)[::-1, ::-1])
