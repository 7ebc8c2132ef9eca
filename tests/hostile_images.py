"""Image files that try to make a decoder use much time or memory, in all formats, made with a seed.

- `REPEATED` has a function for each part in the table of limits (`model/image_structure/limits.py`). It returns an
  image with a number of additional parts of this kind.
- `bombs` yields small files that state or contain many pixels.
- `cases` yields all of these, and files that were changed, cut and joined at random.

`benchmarks/hostile.py` sends them to a service.
"""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from model.decode import FORMATS
from model.image_structure.limits import LIMITS

DATA = Path(__file__).parent / "data"
WIDTH, HEIGHT = 40, 24
MOST_BYTES = 4_000_000  # of a file with repeated parts
EXTREMES = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1", b"\1\0\0\0"]
BIG = 8000  # 8000 x 8000 pixels are the default limit of the service


class Case(NamedTuple):
    """A hostile file. `kind` is what it repeats or how it was made."""

    format: str
    kind: str
    data: bytes


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@functools.cache
def whole_files() -> dict[str, tuple[bytes, ...]]:
    """Return valid small images by format."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    rgb = Image.fromarray(np.stack([40 + 5 * x, 20 + 9 * y, 230 - 2 * x - 4 * y], -1).clip(0, 255).astype(np.uint8))
    frames = {"save_all": True, "append_images": [rgb.convert("L").convert("RGB")] * 3, "duration": 9}
    files = {
        "JPEG": (encoded(rgb, "JPEG"), encoded(rgb, "JPEG", progressive=True), encoded(rgb.convert("CMYK"), "JPEG")),
        "PNG": (encoded(rgb, "PNG"), encoded(rgb.quantize(16), "PNG"), encoded(rgb, "PNG", **frames)),
        "GIF": (encoded(rgb.quantize(64), "GIF"), encoded(rgb.quantize(64), "GIF", **frames)),
        "WEBP": (encoded(rgb, "WEBP"), encoded(rgb, "WEBP", lossless=True), encoded(rgb, "WEBP", **frames)),
        "BMP": (encoded(rgb, "BMP"), encoded(rgb.quantize(16), "BMP")),
        "TIFF": tuple(
            encoded(rgb, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
    }
    if "AVIF" in FORMATS:
        files["AVIF"] = (encoded(rgb, "AVIF"), encoded(rgb, "AVIF", **frames))
    if "HEIC" in FORMATS:
        files["HEIC"] = tuple((DATA / f"{name}.heic").read_bytes() for name in ("photo", "alpha"))
    return files


# ---- parts of files


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(content) + 2) + content


def in_jpeg(*segments: bytes) -> bytes:
    whole = whole_files()["JPEG"][0]
    return whole[:2] + b"".join(segments) + whole[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def in_png(*chunks: bytes) -> bytes:
    whole = whole_files()["PNG"][0]
    return whole[:33] + b"".join(chunks) + whole[33:]  # after the header


def in_gif(content: bytes) -> bytes:
    whole = whole_files()["GIF"][0]
    place = 13 + (6 << (whole[10] & 7))
    return whole[:place] + content + whole[place:]


def in_webp(chunks: bytes) -> bytes:
    whole = whole_files()["WEBP"][2] + chunks
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def after_boxes(image_format: str, *boxes: bytes) -> bytes:
    return whole_files()[image_format][0] + b"".join(boxes)


def exif(n_tags: int, tag_type: int = 3, count: int = 1) -> bytes:
    """Return an EXIF block with up to 40,000 tags of `count` values each."""
    n_tags = min(n_tags, 40_000)
    entries = [struct.pack("<HHII", 0x4000 + index, tag_type, count, 8) for index in range(n_tags)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", n_tags) + b"".join(entries) + bytes(4 + 8 * count * (count > 1))


def jpeg_exif(block: bytes) -> bytes:
    parts = [block[start : start + 65_000] for start in range(0, len(block), 65_000)]
    return in_jpeg(*(segment(0xE1, b"Exif\0\0" + part) for part in parts))


def tiff(tags: dict[int, tuple[int, int, int]], body: bytes) -> bytes:
    """Return a TIFF with entries tag -> (type, count, value). The value -1 means the place of `body`."""
    body_at = 8 + 2 + 12 * len(tags) + 4
    entries = [
        struct.pack("<HHII", tag, *tags[tag][:2], body_at if tags[tag][2] < 0 else tags[tag][2]) for tag in sorted(tags)
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + body


GREY_TIFF = {256: (4, 1, 8), 257: (4, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}


def tiff_of_strips(n_strips: int, compression: int = 1) -> bytes:
    """Return a TIFF of one row for each strip. All strips are at the same place in the file."""
    tags = {
        **GREY_TIFF,
        256: (4, 1, max(8, n_strips // 90)),
        257: (4, 1, n_strips),
        259: (3, 1, compression),
        278: (4, 1, 1),
    }
    offsets = {273: (4, n_strips, -1), 279: (4, n_strips, -1)}
    return tiff({**tags, **offsets}, struct.pack("<I", 8) * n_strips)


def tiff_with_tags(n_tags: int, tag_type: int = 3, count: int = 1) -> bytes:
    more = {0xC000 + index: (tag_type, count, 8) for index in range(min(n_tags, 16_000))}
    return tiff({**GREY_TIFF, 273: (4, 1, 8), 279: (4, 1, 64), **more}, bytes(64 + 8 * count * (count > 1)))


def locations(n_items: int, extents: int = 1) -> bytes:
    """Return an `iloc` box with extents of no bytes."""
    item = struct.pack(">HHH", 1, 0, extents) + bytes(8 * extents)
    return box(b"iloc", struct.pack(">IBBH", 0, 0x44, 0, n_items) + item * n_items)


def exif_parts(wrap: Callable[[bytes], bytes]) -> dict[str, Callable[[int], bytes]]:
    return {
        "tags": lambda n: wrap(exif(n)),
        "numbers in tags": lambda n: wrap(exif(1, 3, n)),
        "fractions in tags": lambda n: wrap(exif(1, 5, n)),
    }


def box_parts(image_format: str) -> dict[str, Callable[[int], bytes]]:
    wrap = functools.partial(after_boxes, image_format)
    return {
        "boxes": lambda n: wrap(box(b"free", b"") * n),
        "items": lambda n: wrap(
            box(b"iinf", struct.pack(">IH", 0, n & 0xFFFF) + box(b"infe", bytes(12)) * n),
        ),
        "items with properties": lambda n: wrap(box(b"ipma", struct.pack(">II", 0, n))),
        "references": lambda n: wrap(
            box(b"iref", bytes(4) + box(b"dimg", struct.pack(">HH", 1, min(n, 65535)) + bytes(2 * n)))
        ),
        "extents": lambda n: wrap(locations(min(n, 65_535))),
        "samples": lambda n: wrap(box(b"moov", box(b"stsz", struct.pack(">III", 0, 8, n)))),
    }


REPEATED: dict[str, dict[str, Callable[[int], bytes]]] = {
    "JPEG": {
        "scans": lambda n: _with_scans(n),
        "segments": lambda n: in_jpeg(segment(0xFE, b"") * n),
        "fill bytes": lambda n: in_jpeg(b"\xff" * n),
        "frame headers": lambda n: in_jpeg(segment(0xC0, struct.pack(">BHHB", 8, 24, 40, 3) + bytes(9)) * n),
        "quantization tables": lambda n: in_jpeg(segment(0xDB, bytes(65)) * n),
        "EXIF segments": lambda n: in_jpeg(segment(0xE1, b"Exif\0\0") * n),
        "Photoshop blocks": lambda n: in_jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0" * 1000) * (n // 1000 + 1)),
        **exif_parts(jpeg_exif),
    },
    "PNG": {
        "chunks": lambda n: in_png(chunk(b"tIME", b"") * n),
        **exif_parts(lambda block: in_png(chunk(b"eXIf", block))),
    },
    "GIF": {
        "extensions": lambda n: in_gif(b"!\x01\0" * n),
        "blocks before the first frame": lambda n: in_gif(b"!\xfe" + b"\1a" * n + b"\0"),
        "fill bytes": lambda n: in_gif(b"\0" * n),
    },
    "WEBP": {
        "chunks": lambda n: in_webp(b"abcd\0\0\0\0" * n),
        **exif_parts(lambda block: in_webp(struct.pack("<4sI", b"EXIF", len(block)) + block + bytes(len(block) % 2))),
    },
    "BMP": {
        "colours in the palette": lambda n: _with_colours(n),
    },
    "TIFF": {
        "strips or tiles": tiff_of_strips,
        "tags": tiff_with_tags,
        "numbers in tags": lambda n: tiff_with_tags(1, 3, n),
        "fractions in tags": lambda n: tiff_with_tags(1, 5, n),
    },
    "AVIF": box_parts("AVIF"),
    "HEIC": box_parts("HEIC"),
}


def _with_scans(n_scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    data = whole_files()["JPEG"][1]
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * n_scans + data[-2:]


def _with_colours(n_colours: int) -> bytes:
    data = whole_files()["BMP"][1]
    return data[:46] + struct.pack("<I", n_colours) + data[50:]


# ---- small files of many pixels


def png_of_zeros(side: int, *, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """Return a PNG of side x side black pixels."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row_bytes = 1 + (side * samples * depth + 7) // 8
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(row_bytes * 100)) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlace)
    palette = chunk(b"PLTE", bytes(range(6))) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bmp_of_runs(side: int, compression: int = 1) -> bytes:
    """Return a run-length encoded BMP of side x side pixels in a few kB."""
    info = struct.pack("<IiiHHIIIIII", 40, side, side, 1, 8 if compression == 1 else 4, compression, 0, 0, 0, 2, 0)
    moves = b"\0\2\0\xff" * (side // 255 + 1)  # 255 rows up
    return b"BM" + struct.pack("<IHHI", 54 + 8 + len(moves), 0, 0, 62) + info + bytes([0, 0, 0, 0, 9, 9, 9, 0]) + moves


def stated(image_format: str, side: int) -> bytes:
    """Return a small file whose header states side x side pixels."""
    data = bytearray(whole_files()[image_format][0])
    if image_format == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", min(side, 65_535), min(side, 65_535))
    elif image_format == "GIF":
        for place in (6, data.index(b",") + 5):
            data[place : place + 4] = struct.pack("<HH", min(side, 65_535), min(side, 65_535))
    elif image_format == "BMP":
        data[18:26] = struct.pack("<II", side, side)
    elif image_format == "TIFF":
        return tiff({**GREY_TIFF, 256: (4, 1, side), 257: (4, 1, side), 273: (4, 1, 8), 279: (4, 1, 64)}, bytes(64))
    elif image_format == "WEBP":
        data = bytearray(whole_files()["WEBP"][2])
        data[24:30] = struct.pack("<I", side - 1)[:3] * 2
    elif image_format in ("AVIF", "HEIC"):
        place = data.index(b"ispe") + 8
        data[place : place + 8] = struct.pack(">II", side, side)
    else:
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def bombs() -> Iterator[Case]:
    """Yield small files of many pixels. Making those that contain the pixels takes some seconds."""
    for colour, depth in ((2, 8), (6, 8), (0, 16), (0, 1), (3, 8), (6, 16)):
        yield Case("PNG", "zeros", png_of_zeros(BIG, depth=depth, colour=colour))
    yield Case("PNG", "interlaced zeros", png_of_zeros(BIG, interlace=1))
    for compression in (1, 2):
        for side in (2000, BIG):
            yield Case("BMP", "runs", bmp_of_runs(side, compression))
    black = Image.new("RGB", (BIG // 2, BIG // 2))
    for image_format, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("WEBP", {"lossless": True, "method": 0}),
        ("TIFF", {"compression": "tiff_deflate"}), ("TIFF", {"compression": "tiff_lzw"}), ("AVIF", {"speed": 10}),
    ):  # fmt: skip
        if image_format in FORMATS:
            yield Case(image_format, "zeros", encoded(black, image_format, **options))


# ---- all of them


def cases(seed: int = 0, changed: int = 200, *, with_bombs: bool = True) -> Iterator[Case]:
    """Yield the hostile files: repeated parts, stated sizes, `changed` randomly changed files of each format, and
    small files of many pixels."""
    for image_format in FORMATS:
        for part, make in REPEATED[image_format].items():
            most = LIMITS[image_format][part].most
            for count in sorted({1, most // 2, most, most + 1, 4 * most, 20 * most}):
                data = make(max(1, count))
                if len(data) <= MOST_BYTES or count == most + 1:
                    yield Case(image_format, part, data)
        for side in (0, 1, 300, 5000, BIG, 16_384, 65_535, 2**31 - 1):
            yield Case(image_format, "stated size", stated(image_format, max(1, side)))
        yield from changed_files(image_format, random.Random(f"{seed} {image_format}"), changed)
    if with_bombs:
        yield from bombs()


def changed_files(image_format: str, rng: random.Random, count: int) -> Iterator[Case]:
    files = whole_files()[image_format]
    for _ in range(count):
        data = bytearray(rng.choice(files))
        kind = rng.choice(("extreme numbers", "flipped bits", "cut", "joined", "repeated bytes"))
        for _ in range(rng.randint(1, 6)):
            place = int(len(data) * rng.random() ** 2)
            if kind == "extreme numbers":
                data[place : place + 4] = rng.choice(EXTREMES)
            elif kind == "flipped bits":
                data[place] ^= 1 << rng.randrange(8)
            elif kind == "cut":
                del data[place : place + rng.randint(1, 60)]
            elif kind == "joined":
                other = rng.choice(files)
                data[place:place] = other[rng.randrange(len(other)) :]
            else:
                piece = data[place : place + rng.randint(1, 40)]
                data[place:place] = piece * (50_000 // max(1, len(piece)) // rng.choice((1, 10, 1000)) + 1)
            data = data or bytearray(b"\0")
        yield Case(image_format, kind, bytes(data))
