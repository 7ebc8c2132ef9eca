"""Count the parts of a JPEG, PNG, GIF, WebP or BMP, and remove the parts of a PNG that do not affect its pixels."""

import re
import struct
import zlib
from typing import Final

from model.image_structure.limits import JPEG_MAX_SCAN_PIXELS, Counts, TooLarge, Unsupported
from model.image_structure.tags import check_exif

# Matches any marker except a stuffed zero, padding, a restart and TEM.
_JPEG_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_SOI, _EOI, _SOS, _DQT, _APP1, _APP2, _APP13 = 0xD8, 0xD9, 0xDA, 0xDB, 0xE1, 0xE2, 0xED
_FRAME_HEADERS: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xDE}
_QUANTIZATION_TABLE_BYTES: Final = 65  # with 8-bit numbers
_SCANS_OF_ANY_SIZE: Final = 20

_PNG_HEAD: Final = struct.Struct(">I4s")  # length and name of a chunk; the content and its CRC (4 bytes) follow
_PNG_TEXTS: Final = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION_TEXTS: Final = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_PNG_TEXT_BYTES: Final = 2**20  # Pillow's limit for one text or profile

_BMP_RUN_LENGTHS: Final = (1, 2)  # compression RLE8, RLE4
_BMP_OLD_HEADER_BYTES: Final = 12


def check_jpeg(data: bytes, counts: Counts) -> None:
    """Count the segments and scans of a JPEG. Damaged data raises no error here.

    The function reads one marker after another, as libjpeg does. It uses each segment's length to skip the segment,
    because a thumbnail in EXIF has scans of its own. It skips a scan's data up to the next marker. It ignores data
    after the end of the image, where some phones append a second image or a video.

    Raises:
        TooLarge: there are too many parts, or too many scans for the size of the image.
    """
    position, pixels = 2, 0
    exif: list[bytes] = []
    while (marker := _JPEG_MARKER.search(data, position)) and marker[1][0] not in (_SOI, _EOI):
        kind = marker[1][0]
        counts.add("segments")
        if not counts["scans"]:
            counts.add("fill bytes", marker.start() - position)
        start = marker.end() + 2
        end = marker.end() + max(2, int.from_bytes(data[marker.end() : start], "big"))  # a length includes itself
        if kind == _SOS:
            counts.add("scans")
            if counts["scans"] > _SCANS_OF_ANY_SIZE and counts["scans"] * pixels > JPEG_MAX_SCAN_PIXELS:
                raise TooLarge(f"the JPEG has more than {JPEG_MAX_SCAN_PIXELS // pixels} scans of {pixels} pixels")
        elif kind in _FRAME_HEADERS:
            counts.add("frame headers")
            height, width = struct.unpack_from(">HH", data[start + 1 : start + 5].ljust(4, b"\0"))
            pixels = width * height
        elif kind == _DQT:
            counts.add("quantization tables", (end - start) // _QUANTIZATION_TABLE_BYTES)
        elif kind == _APP1 and data.startswith(b"Exif\0\0", start):
            counts.add("EXIF segments")
            exif.append(data[start + 6 : end])  # Pillow joins them
        elif kind == _APP2 and data.startswith(b"MPF\0", start):  # a list of further images, in the form of EXIF
            check_exif(data[start + 4 : end], counts)
        elif kind == _APP13 and data.startswith(b"Photoshop 3.0\0", start):
            counts.add("Photoshop blocks", data.count(b"8BIM", start, end))
        position = end
    check_exif(b"".join(exif), counts)


def without_texts(data: bytes, counts: Counts) -> bytes:
    """Return a PNG without its texts, colour profile and damaged optional chunks, which do not affect the pixels.

    Pillow rejects a PNG in which a text or profile is larger than 1 MiB. Texts that may contain the orientation are
    kept if Pillow can read them. Other chunks of more than 1 MiB are kept even if they are damaged. If there is nothing
    to remove, `data` itself is returned.

    Raises:
        TooLarge: there are too many chunks.
    """
    parts: list[bytes] = []
    kept_from, start = 0, 8
    while start + 12 <= len(data):
        length, name = _PNG_HEAD.unpack_from(data, start)
        end = start + 12 + length
        counts.add("chunks")
        is_optional = name[0] & 0x20 and name != b"tRNS"  # lower case; tRNS is transparency
        if is_optional and end <= len(data):
            if _is_removed(name, data, start, end):
                parts.append(data[kept_from:start])
                kept_from = end
            elif name == b"eXIf":
                check_exif(data[start + 8 : end - 4], counts)
        start = end
    return b"".join([*parts, data[kept_from:]]) if parts else data


def _is_removed(name: bytes, data: bytes, start: int, end: int) -> bool:
    """Return whether `without_texts` removes the optional chunk at data[start:end]."""
    if name == b"iCCP":
        return True
    if name in _PNG_TEXTS:
        keyword, _, text = data[start + 8 : end - 4].partition(b"\0")
        if keyword not in _PNG_ORIENTATION_TEXTS or len(text) > _PNG_TEXT_BYTES:
            return True
        if name == b"iTXt" and text[:1] != b"\0":  # compressed, which XMP never is
            return True
        if name == b"zTXt" and not _is_small_when_unpacked(text[1:]):
            return True
    is_small = end - start <= _PNG_TEXT_BYTES
    return is_small and zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big")


def _is_small_when_unpacked(packed: bytes) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _PNG_TEXT_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


def check_gif(data: bytes, counts: Counts) -> None:
    """Count what precedes the first frame of a GIF. The decoder reads no further than this frame.

    Raises:
        TooLarge: there are too many extensions, blocks or fill bytes.
    """
    flags = data[10] if len(data) > 10 else 0
    position = 13 + ((6 << (flags & 7)) if flags & 0x80 else 0)
    while position < len(data) and data[position] not in b",;":
        if data[position] != ord("!"):
            counts.add("fill bytes")
            position += 1
            continue
        counts.add("extensions")
        position += 2
        while position < len(data) and data[position]:
            counts.add("blocks before the first frame")
            position += 1 + data[position]
        position += 1


def check_webp(data: bytes, counts: Counts) -> None:
    """Count the chunks of a WebP, including those in the frames of an animation.

    Raises:
        TooLarge: there are too many chunks, or too many tags in its EXIF block.
    """
    position = 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        counts.add("chunks")
        start = position + 8
        if name == b"EXIF":
            check_exif(data[start : start + length], counts)
        position = start + (16 if name == b"ANMF" else length + length % 2)  # a frame: 16 bytes, then its chunks


def check_bmp(data: bytes, counts: Counts) -> None:
    """Check the compression and the palette of a BMP.

    Raises:
        Unsupported: the pixels are run-length encoded. Pillow decodes them in Python: 4 kB can take 7 seconds.
        TooLarge: the palette has more colours than a pixel can address.
    """
    header_bytes = int.from_bytes(data[14:18], "little")
    if header_bytes == _BMP_OLD_HEADER_BYTES:
        return
    bits, compression = struct.unpack("<HI", data[28:34].ljust(6, b"\0"))
    if compression in _BMP_RUN_LENGTHS:
        raise Unsupported("BMP images with run-length encoding are not supported; save it as PNG")
    if bits <= 8:
        counts.add("colours in the palette", int.from_bytes(data[46:50], "little"))
