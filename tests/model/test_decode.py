"""Tests of `decode`: every format and mode gives the right pixels, and arbitrary bytes raise only the documented
errors.
"""

import contextlib
import io
import random
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from model.decode import (
    FORMATS,
    Broken,
    DecodeError,
    DecodeLimits,
    TooLarge,
    Unsupported,
    decode,
    decode_stored,
    sniff,
)
from model.image_structure.limits import LIMITS as PART_LIMITS

DATA = Path(__file__).parents[1] / "data"
OURS = (TooLarge, Unsupported, Broken)
JPEG_MAX_SCANS, JPEG_MAX_SEGMENTS = (PART_LIMITS["JPEG"][part].most for part in ("scans", "segments"))
NEEDS_AVIF = pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow is built without AVIF")


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(height: int = 24, width: int = 40) -> np.ndarray:
    """Return a smooth image without symmetry, uint8 [H, W, 3], so that a wrong rotation or channel order is visible."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [40 + 5 * x, 20 + 9 * y, 230 - 2 * x - 4 * y]
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


PHOTO = photo()
RGB = Image.fromarray(PHOTO)
GREY = RGB.convert("L")


def corpus() -> dict[str, bytes]:
    """Return valid images by name, one for each format, mode and compression that Pillow can write."""
    rgba = RGB.convert("RGBA")
    rgba.putalpha(GREY)
    grey16 = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    files = {
        "jpeg": encode(RGB, "JPEG", quality=95),
        "jpeg-progressive": encode(RGB, "JPEG", quality=95, progressive=True),
        "jpeg-grey": encode(GREY, "JPEG"),
        "jpeg-cmyk": encode(RGB.convert("CMYK"), "JPEG", quality=95),
        "png": encode(RGB, "PNG"),
        "png-rgba": encode(rgba, "PNG"),
        "png-la": encode(GREY.convert("LA"), "PNG"),
        "png-palette": encode(RGB.quantize(16), "PNG"),
        "png-palette-alpha": encode(RGB.quantize(16), "PNG", transparency=3),
        "png-1bit": encode(RGB.convert("1"), "PNG"),
        "png-16bit": encode(grey16, "PNG"),
        "webp": encode(RGB, "WEBP", quality=95),
        "webp-lossless": encode(RGB, "WEBP", lossless=True),
        "webp-alpha": encode(rgba, "WEBP", lossless=True, exact=True),
        "webp-animated": encode(RGB, "WEBP", save_all=True, append_images=[GREY.convert("RGB")] * 3, duration=10),
        "gif": encode(RGB.quantize(64), "GIF"),
        "gif-animated": encode(RGB.quantize(64), "GIF", save_all=True, append_images=[GREY.quantize(9)] * 3),
        "bmp": encode(RGB, "BMP"),
        "bmp-palette": encode(RGB.quantize(16), "BMP"),
        "tiff": encode(RGB, "TIFF"),
        "tiff-16bit": encode(grey16, "TIFF"),
        "tiff-cmyk": encode(RGB.convert("CMYK"), "TIFF"),
        "tiff-pages": encode(RGB, "TIFF", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
        **{f"tiff-{name}": encode(RGB, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")},
    }
    if "AVIF" in FORMATS:
        files["avif"] = encode(RGB, "AVIF", quality=95)
        files["avif-alpha"] = encode(rgba, "AVIF", quality=95)
    if "HEIC" in FORMATS:
        files["heic"] = (DATA / "photo.heic").read_bytes()
    return files


CORPUS = corpus()


@pytest.mark.parametrize("name", CORPUS)
def test_every_format_and_mode_becomes_rgb(name: str) -> None:
    pixels = decode(CORPUS[name])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (24, 40, 3)
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg-progressive", "jpeg-cmyk", "png", "webp", "webp-lossless", "webp-animated", "gif-animated",
             "bmp", "tiff", "tiff-cmyk", "tiff-pages", "tiff-tiff_lzw", "tiff-tiff_deflate", "tiff-jpeg",
             pytest.param("avif", marks=NEEDS_AVIF)],
)  # fmt: skip
def test_colours_survive(name: str) -> None:
    """Decoded pixels must equal the original ones, within the noise of a lossy codec. Animations yield their first
    frame.
    """
    error = np.abs(decode(CORPUS[name]).astype(int) - PHOTO)
    exact = name in ("png", "bmp", "webp-lossless", "tiff", "tiff-cmyk", "tiff-pages", "tiff-tiff_lzw")
    assert error.mean() <= (0 if exact else 6), name


# ---- orientation


def turned(orientation: int) -> np.ndarray:
    """Return PHOTO as an upright reader must show it for an orientation, by the table of EXIF 2.32: it says where the
    stored row 0 and column 0 belong.
    """
    return {
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO, -1),  # shown turned clockwise
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PHOTO),
    }[orientation]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 98, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        pytest.param("AVIF", {"quality": 98, "subsampling": "4:4:4"}, marks=NEEDS_AVIF),
    ],
)
def test_orientation_is_applied_once(image_format: str, options: dict[str, object], orientation: int) -> None:
    pixels = decode(encode(RGB, image_format, exif=exif(orientation), **options))
    expected = turned(orientation)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 4


def test_orientation_turns_grey_16_bit_and_alpha_too() -> None:
    sixteen = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    assert decode(encode(sixteen, "PNG", exif=exif(6))).shape == (40, 24, 3)
    assert decode(encode(RGB.convert("RGBA"), "PNG", exif=exif(6))).shape == (40, 24, 3)


@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(1)[:-9],
                                    exif(99), exif(0)])  # fmt: skip
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_image(image_format: str, broken: bytes) -> None:
    assert decode(encode(RGB, image_format, exif=broken)).shape == (24, 40, 3)


# ---- modes


def test_16_bit_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    for image_format in ("PNG", "TIFF"):
        pixels = decode(encode(Image.fromarray(ramp), image_format))
        np.testing.assert_array_equal(pixels, np.rint(ramp / 257)[..., None].repeat(3, -1))


def test_16_bit_white_is_zero_tiff_is_inverted() -> None:
    ramp = np.arange(256, dtype=np.uint16)[None].repeat(4, 0) << 8
    data = bytearray(encode(Image.fromarray(ramp), "TIFF"))
    at = data.index(struct.pack("<HHI", 262, 3, 1))  # photometric interpretation, SHORT, 1 value
    data[at + 8] = 0
    np.testing.assert_array_equal(decode(bytes(data))[0, :, 0], np.arange(255, -1, -1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(Unsupported, match="white"):
        decode(encode(GREY.convert(mode), "TIFF"))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.dstack([PHOTO, np.full((24, 40), 128, np.uint8)])
    rgba[:5, :, 3] = 0
    rgba[-5:, :, 3] = 255
    pixels = decode(encode(Image.fromarray(rgba), "PNG"))
    assert (pixels[:5] == 255).all()
    np.testing.assert_array_equal(pixels[-5:], PHOTO[-5:])
    half = PHOTO[5:-5] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels[5:-5] - half).max() <= 1


def test_colour_keys_and_palette_transparency_become_white() -> None:
    flat = Image.new("RGB", (8, 8), (10, 20, 30))
    assert (decode(encode(flat, "PNG", transparency=(10, 20, 30))) == 255).all()
    assert (decode(encode(Image.new("L", (8, 8), 7), "PNG", transparency=7)) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode(encode(palette, "PNG", transparency=1)) == 255).all()
    assert (decode(encode(palette, "GIF", transparency=1)) == 255).all()
    assert (decode(encode(palette, "PNG")) == 9).all()


def test_adobe_ycck_jpeg_has_the_right_colours() -> None:
    """Pillow can only write CMYK, so the test converts the ink values to YCC and sets the transform byte to YCCK
    itself.
    """
    cmy = np.asarray(Image.new("RGB", (16, 16), (200, 60, 30)))  # ink: much cyan
    ycc = np.asarray(Image.fromarray(cmy).convert("YCbCr"))
    ycck = np.dstack([255 - ycc, np.zeros((16, 16), np.uint8)])  # Pillow inverts what it writes; no black ink
    data = bytearray(encode(Image.frombytes("CMYK", (16, 16), ycck.tobytes()), "JPEG", quality=98))
    data[data.index(b"Adobe") + 11] = 2
    assert np.abs(decode(bytes(data)).mean((0, 1)) - [55, 195, 225]).max() < 4


def test_icc_profiles_are_not_applied() -> None:
    plain, tagged = encode(RGB, "PNG"), encode(RGB, "PNG", icc_profile=b"not even a profile")
    np.testing.assert_array_equal(decode(plain), decode(tagged))


# ---- limits


def test_limits_pass_at_the_limit_and_refuse_beyond() -> None:
    data = CORPUS["png"]
    limits = DecodeLimits(max_bytes=len(data), max_pixels=24 * 40, max_aspect_ratio=40 / 24)
    assert decode(data, limits).shape == (24, 40, 3)
    for field, value, words in (
        ("max_bytes", len(data) - 1, "bytes"),
        ("max_pixels", 24 * 40 - 1, "960 in total"),
        ("max_aspect_ratio", 1.6, "1.6 times"),
    ):
        with pytest.raises(TooLarge, match=words):
            decode(data, DecodeLimits(**{field: value}))
    for wrong in (0, 178_956_971):  # Pillow itself would refuse more
        with pytest.raises(ValueError, match=f"max_pixels is {wrong}"):
            DecodeLimits(max_pixels=wrong)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000, 2**31 - 1])  # below and above Pillow's own two limits
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    started = time.perf_counter()
    with pytest.raises(TooLarge):
        decode(png_header(side, side) + png_chunk(b"IDAT", zlib.compress(b"")))
    assert time.perf_counter() - started < 5


DECODE = """from model.decode import decode
try: decode({!r})
except ValueError as error: print(error)"""


def test_a_huge_webp_canvas_costs_no_memory(peak_memory_bytes) -> None:
    webp = bytearray(CORPUS["webp-animated"])
    at = webp.index(b"VP8X") + 12  # canvas width and height, minus one, 24 bits each
    webp[at : at + 6] = b"\xff\x3f\x00" * 2  # 16384 x 16384: a gigabyte of RGBA
    with pytest.raises(OURS):
        decode(bytes(webp))
    assert peak_memory_bytes(DECODE.format(bytes(webp))) - peak_memory_bytes(DECODE.format(b"")) < 50 * 2**20


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_png_text_bombs_are_refused_or_skipped_cheaply(kind: bytes, peak_memory_bytes) -> None:
    squeezed = zlib.compress(bytes(200 * 2**20), 9)  # 200 MiB of zeros in 200 KiB
    body = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind] + squeezed
    plain = CORPUS["png"]
    data = plain[:33] + png_chunk(kind, body) + plain[33:]  # after the header chunk
    assert peak_memory_bytes(DECODE.format(data)) - peak_memory_bytes(DECODE.format(b"")) < 60 * 2**20
    with contextlib.suppress(*OURS):  # refusing is fine; taking the memory is not
        decode(data)


def test_many_text_chunks_cost_nothing(peak_memory_bytes) -> None:
    text = PngImagePlugin.PngInfo()
    for i in range(80):
        text.add_text(f"k{i}", "x" * 2**20, zip=True)
    data = encode(RGB, "PNG", pnginfo=text)
    np.testing.assert_array_equal(decode(data), np.asarray(RGB))
    assert peak_memory_bytes(DECODE.format(data)) - peak_memory_bytes(DECODE.format(b"")) < 20 * 2**20


def test_a_png_of_a_million_chunks_is_refused() -> None:
    plain = CORPUS["png"]
    with pytest.raises(TooLarge, match="more than 100000 chunks"):
        decode(plain[:33] + png_chunk(b"tIME", b"") * 1_000_000 + plain[33:])


# ---- metadata of any size, and damaged metadata

NOISE = np.random.default_rng(0).bytes(1_500_000)


def with_text(kind: str, keyword: str, text: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if kind.startswith("iTXt"):
        info.add_itxt(keyword, text, zip=kind == "iTXt, packed")
    else:
        info.add_text(keyword, text, zip=kind == "zTXt")
    return encode(RGB, "PNG", pnginfo=info)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt, packed"])
@pytest.mark.parametrize("keyword", ["Comment", "XML:com.adobe.xmp", "Raw profile type exif"])
def test_a_png_with_much_text_is_whole(kind: str, keyword: str) -> None:
    data = with_text(kind, keyword, NOISE.hex())
    for one in (data, data.replace(NOISE.hex()[:20].encode(), b"?" * 20)):  # a wrong checksum, if not packed
        np.testing.assert_array_equal(decode(one), np.asarray(RGB))


def test_text_that_turns_an_image_is_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    upright = np.asarray(RGB.transpose(Image.Transpose.ROTATE_270))
    for kind in ("tEXt", "zTXt"):
        np.testing.assert_array_equal(decode(with_text(kind, "Raw profile type exif", profile)), upright)
    xmp = '<x tiff:Orientation="6"/>'
    np.testing.assert_array_equal(decode(with_text("iTXt", "XML:com.adobe.xmp", xmp)), upright)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_large_colour_profile_is_no_damage(kind: str) -> None:
    if kind not in FORMATS:
        pytest.skip(f"this Pillow reads no {kind}")
    np.testing.assert_array_equal(decode(encode(RGB, kind, icc_profile=NOISE)), decode(encode(RGB, kind)))


WHOLE_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
TORN_EXIF = {
    "cut": WHOLE_EXIF[:20],
    "no header": b"Exif\0\0" + bytes(30),
    "noise": WHOLE_EXIF[:14] + b"\xff" * 40,
    "empty": b"Exif\0\0",
    "offset": b"Exif\0\0II*\0\xf0\xff\xff\xff",
}


def test_the_mode_of_the_image_in_the_file_is_told() -> None:
    for mode in ("L", "RGBA", "RGB"):
        stored = decode_stored(encode(RGB.convert(mode), "PNG"))
        assert (stored.mode, stored.rgb.mode) == (mode, "RGB")


@pytest.mark.filterwarnings("ignore")  # Pillow warns
@pytest.mark.parametrize("name", TORN_EXIF)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_torn_exif_costs_only_the_orientation(kind: str, name: str) -> None:
    plain = decode(encode(RGB, kind))
    data = encode(RGB, kind, exif=TORN_EXIF[name])
    np.testing.assert_array_equal(decode(data), plain)
    assert decode_stored(data, least_side=4).orientation == 1
    assert decode(encode(RGB, kind, exif=WHOLE_EXIF)).shape == (plain.shape[1], plain.shape[0], 3)


@pytest.mark.parametrize("kind", [b"eXIf", b"iCCP", b"tEXt", b"pHYs"])
def test_a_damaged_optional_chunk_of_a_png_costs_only_itself(kind: bytes) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "hello")
    data = encode(RGB, "PNG", exif=WHOLE_EXIF, icc_profile=b"abc", pnginfo=info, dpi=(72, 72))
    place = data.index(kind)
    torn = data[: place + 6] + bytes([data[place + 6] ^ 1]) + data[place + 7 :]
    expected = np.asarray(RGB) if kind == b"eXIf" else decode(data)
    np.testing.assert_array_equal(decode(torn), expected)
    pixels = data.index(b"IDAT")
    with pytest.raises(Broken):
        decode(data[: pixels + 8] + bytes([data[pixels + 8] ^ 1]) + data[pixels + 9 :])


# ---- broken files


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(Broken, match="empty"):
        decode(b"")
    for data in (b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0" * 100, b"x", b"hello"):
        with pytest.raises(Unsupported, match="supported formats: JPEG, PNG"):
            decode(data)


@pytest.mark.parametrize("name", ["photo", "turned", "alpha"])
def test_heic_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("model.decode.FORMATS", ("JPEG", "PNG"))
    with pytest.raises(
        Unsupported, match=r"^HEIC images need the extra `heif` on the server: pip install '.*\[heif\]'"
    ):
        decode((DATA / f"{name}.heic").read_bytes())


NEEDS_HEIC = pytest.mark.skipif("HEIC" not in FORMATS, reason="needs pi-heif: pip install '.[heif]'")


@NEEDS_HEIC
def test_heic_is_decoded() -> None:
    for name, expected in (("photo", PHOTO), ("turned", np.rot90(PHOTO, -1)), ("alpha", on_white(PHOTO))):
        data = (DATA / f"{name}.heic").read_bytes()
        assert sniff(data) == "HEIC"
        pixels = decode(data)
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 3, name


def on_white(photo: np.ndarray) -> np.ndarray:
    alpha = np.asarray(GREY)[..., None] / 255
    return photo * alpha + 255 * (1 - alpha)


@NEEDS_HEIC
def test_heic_has_the_limits_of_the_other_formats() -> None:
    data = (DATA / "photo.heic").read_bytes()
    with pytest.raises(TooLarge, match="40 x 24 pixels, 960 in total; the limit is 900"):
        decode(data, DecodeLimits(max_pixels=900))
    with pytest.raises(TooLarge, match=f"has {len(data)} bytes; the limit is 100"):
        decode(data, DecodeLimits(max_bytes=100))
    with pytest.raises(TooLarge, match=r"one side may be at most 1.5 times"):
        decode(data, DecodeLimits(max_aspect_ratio=1.5))


@NEEDS_HEIC
def test_a_heic_that_states_a_smaller_size_than_it_has_is_refused() -> None:
    """The limits are checked against the stated size, so the decoder must not decode more than that."""
    data = (DATA / "photo.heic").read_bytes()
    at = data.index(b"ispe") + 8
    smaller = data[:at] + struct.pack(">II", 4, 4) + data[at + 8 :]
    with pytest.raises(DecodeError):
        decode(smaller)


@NEEDS_HEIC
def test_damaged_heic_raises_only_our_errors() -> None:
    rng = random.Random(0)
    for name in ("photo", "turned", "alpha"):
        whole = (DATA / f"{name}.heic").read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(*OURS):
                decode(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))


def test_formats_outside_the_list_are_refused() -> None:
    for image_format in ("PPM", "TGA", "PCX", "ICO", "EPS"):
        with pytest.raises(Unsupported):
            decode(encode(RGB, image_format))


@pytest.mark.parametrize("name", CORPUS)
def test_truncated_files_are_refused(name: str) -> None:
    data = CORPUS[name]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    if name in ("tiff-pages", "webp-animated", "gif-animated"):  # half the file may hold the whole first frame
        data = data[: len(data) // 2]
    refused = 0
    for keep in (len(data) // 4, len(data) // 2):
        try:
            assert decode(data[:keep]).shape == (24, 40, 3)
        except OURS:
            refused += 1
    assert refused == 2


def test_error_details_do_not_quote_objects_of_ours() -> None:
    with pytest.raises(Broken) as caught:
        decode(CORPUS["jpeg"][:20])
    assert "BytesIO" not in caught.value.args[0]
    assert len(caught.value.args[0]) < 300


EXTREMES = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
LIMITS = DecodeLimits(max_bytes=100_000, max_pixels=20_000)


def decode_or_refuse(data: bytes) -> None:
    """Assert that `decode` returns pixels within the limits or raises one of the documented errors."""
    try:
        pixels = decode(data, LIMITS)
    except OURS:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.shape[0] * pixels.shape[1] <= LIMITS.max_pixels


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about odd tags
def test_mutated_files_never_raise_anything_else() -> None:
    """The files are flipped, cut, duplicated and spliced with a fixed seed. Header bytes are changed most often."""
    rng = random.Random(20240611)
    names, stop = list(CORPUS), time.monotonic() + 8
    tried = 0
    while tried < 20_000 and time.monotonic() < stop:
        data = bytearray(CORPUS[rng.choice(names)])
        for _ in range(rng.randint(1, 6)):
            at = int(len(data) * rng.random() ** 3)
            kind = rng.randrange(5)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at : at + 4] = rng.choice(EXTREMES)
            elif kind == 2:
                del data[at : at + rng.randint(1, 40)]
            elif kind == 3:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            else:
                other = CORPUS[rng.choice(names)]
                data[at : at + 30] = other[at : at + 30]
            data = data or bytearray(b"x")
        decode_or_refuse(bytes(data))
        tried += 1
    assert tried >= 500


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([d[:n] for d in CORPUS.values() for n in (4, 12, 40)]), st.binary(max_size=300))
def test_garbage_behind_a_true_header_is_refused(head: bytes, tail: bytes) -> None:
    decode_or_refuse(head + tail)


def test_sniff_takes_anything() -> None:
    assert sniff(b"") is None
    assert {sniff(data) for data in CORPUS.values()} == set(FORMATS)


def test_an_avif_of_another_main_brand_is_told_by_its_compatible_ones() -> None:
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif") == "AVIF"
    assert sniff(b"\0\0\0\x14ftypmif1\0\0\0\0mif1avif") == "HEIC"  # what follows the box is no brand


def test_a_lack_of_memory_is_the_images_size(monkeypatch) -> None:
    def none_left(*_args: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", none_left)
    with pytest.raises(TooLarge, match="more memory"):
        decode(CORPUS["png"])


def test_lab_pixels_are_refused() -> None:
    with pytest.raises(Unsupported, match="CIELAB"):
        decode(encode(Image.new("LAB", (8, 8)), "TIFF"))


def test_errors_are_value_errors_of_one_family() -> None:
    assert all(issubclass(error, DecodeError) for error in OURS)
    assert issubclass(DecodeError, ValueError)


# ---- files that Pillow cannot write, made by hand


def tiff(tags: dict[int, int], body: bytes) -> bytes:
    """Return a little-endian TIFF with one LONG entry per tag. `body` follows the entries, and tags 273 and 324 point
    to it.
    """
    body_at = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, body_at if tag in (273, 324) else tags[tag]) for tag in sorted(tags)]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + body


def test_a_huge_tiff_tile_is_refused_though_the_image_is_small() -> None:
    body = zlib.compress(bytes(100))
    small = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 324: 0, 325: len(body)}
    with pytest.raises(TooLarge, match="a tile has 40000 x 40000"):
        decode(tiff({**small, 322: 40_000, 323: 40_000}, body))


def test_12_bit_tiff_is_scaled() -> None:
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 3}
    assert decode(tiff(tags, b"\xff\xf8\x00"))[0, :, 0].tolist() == [255, 128]


def test_grey_with_premultiplied_alpha_is_laid_on_white() -> None:
    tags = {256: 2, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 277: 2, 278: 1, 279: 4, 338: 1}
    assert decode(tiff(tags, b"\x10\x80\x10\xff"))[0, :, 0].tolist() == [143, 16]


def test_a_16_bit_grey_key_becomes_white() -> None:
    grey = Image.fromarray(np.array([[0x1234, 0x1200]], np.uint16))
    assert decode(encode(grey, "PNG", transparency=0x1234))[0, :, 0].tolist() == [255, 0x12]


def test_a_16_bit_colour_key_becomes_white() -> None:
    key = struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)
    header = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    rows = png_chunk(b"IDAT", zlib.compress(b"\0" + key + bytes(6))) + png_chunk(b"IEND", b"")
    assert decode(header + png_chunk(b"tRNS", key) + rows).tolist() == [[[255] * 3, [0] * 3]]


def with_scans(count: int) -> bytes:
    """Return a progressive JPEG with `count` scans, by repeating its last scan."""
    data = encode(GREY, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def test_scans_of_a_jpeg_pass_at_the_limit_and_are_refused_beyond() -> None:
    assert decode(with_scans(JPEG_MAX_SCANS)).shape == (24, 40, 3)
    for data in (with_scans(JPEG_MAX_SCANS + 1), with_scans(5000)):
        with pytest.raises(TooLarge, match=rf"more than {JPEG_MAX_SCANS} scans"):
            decode(data)
    padded = with_scans(JPEG_MAX_SCANS + 1).replace(b"\xff\xda", b"\xff\xff\xda")  # any marker may be padded
    with pytest.raises(TooLarge, match="scans"):
        decode(padded)


def test_what_only_looks_like_scans_is_not_counted() -> None:
    scans = b"\xff\xda\0\2" * (JPEG_MAX_SCANS + 1)
    whole = encode(RGB, "JPEG", quality=95, progressive=True)
    in_a_segment = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(scans) + 2) + scans + whole[2:]
    for data in (in_a_segment, whole + scans, encode(RGB, "MPO", save_all=True, append_images=[RGB] * 150)):
        decode(data)


def test_segments_of_a_jpeg_are_bounded() -> None:
    whole = encode(RGB, "JPEG")
    decode(whole[:2] + b"\xff\xfe\0\2" * (JPEG_MAX_SEGMENTS - 20) + whole[2:])
    with pytest.raises(TooLarge, match=f"more than {JPEG_MAX_SEGMENTS} segments"):
        decode(whole[:2] + b"\xff\xfe\0\2" * 10**6 + whole[2:])


def test_segments_of_a_jpeg_pass_at_the_limit() -> None:
    whole = encode(RGB, "JPEG", quality=95)
    own = len(re.findall(rb"\xff[^\x00]", whole)) - 2  # markers, without start and end of the image
    comment = b"\xff\xfe\0\2"
    decode(whole[:2] + comment * (JPEG_MAX_SEGMENTS - own) + whole[2:])
    with pytest.raises(TooLarge, match="segments"):
        decode(whole[:2] + comment * (JPEG_MAX_SEGMENTS - own + 1) + whole[2:])


def test_walking_over_the_largest_jpeg_is_cheap() -> None:
    """The check must be cheap even if every byte may begin a marker."""
    start = encode(RGB, "JPEG")[:-2]
    for filling in (b"\xff", b"\xff\0", b"\xff\xd0"):
        started = time.process_time()
        decode_or_refuse(start + filling * (15 * 2**20 // len(filling)) + b"\xff\xd9")
        assert time.process_time() - started < 5


def test_scans_of_a_jpeg_in_a_tiff_are_bounded() -> None:
    """libtiff enforces this limit. The test checks that the libtiff in this Pillow build does."""
    tags = {256: 40, 257: 24, 258: 8, 259: 7, 262: 1, 273: 0, 277: 1, 278: 24}
    few, many = (tiff({**tags, 279: len(body)}, body) for body in (with_scans(20), with_scans(JPEG_MAX_SCANS + 1)))
    assert decode(few).shape == (24, 40, 3)
    with pytest.raises(Broken):
        decode(many)


# ---- the size, before the pixels


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_the_size_is_reported_once(name: str) -> None:
    sizes: list[tuple[int, int]] = []
    image = decode(CORPUS[name], on_size=lambda width, height: sizes.append((width, height)))
    assert sizes == [(image.shape[1], image.shape[0])]


def test_an_image_can_be_refused_before_its_pixels_are_decompressed() -> None:
    """The pixels of this PNG are missing, which would be an error of its own."""

    def refuse(width: int, height: int) -> None:
        raise TooLarge(f"{width} x {height} is too much today")

    with pytest.raises(TooLarge, match="40 x 24 is too much today"):
        decode(encode(RGB, "PNG")[:60], on_size=refuse)


def test_the_size_of_a_broken_image_is_reported() -> None:
    sizes: list[tuple[int, int]] = []
    with pytest.raises(Broken):
        decode(encode(RGB, "PNG")[:60], on_size=lambda width, height: sizes.append((width, height)))
    assert sizes == [(40, 24)]


def test_a_larger_frame_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """No format that Pillow reads today has such frames after the header was read, so the test makes one."""
    load = PngImagePlugin.PngImageFile.load

    def grown(self: PngImagePlugin.PngImageFile) -> object:
        result = load(self)
        self.im, self._size = Image.new("RGB", (300, 200)).im, (300, 200)
        return result

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", grown)
    sizes: list[tuple[int, int]] = []
    decode(encode(RGB, "PNG"), on_size=lambda width, height: sizes.append((width, height)))
    assert sizes == [(40, 24), (300, 200)]
