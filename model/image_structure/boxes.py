"""Count the parts of an AVIF or HEIC file, which consists of nested boxes (ISO/IEC 14496-12 and 23008-12)."""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from model.image_structure.limits import Broken, Counts

_CONTAINERS: Final = {  # name -> bytes before the first box in it
    b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0, b"edts": 0, b"dinf": 0, b"iprp": 0, b"ipco": 0,
    b"meta": 4, b"iref": 4,
}  # fmt: skip
_TABLES: Final = {b"stts": 4, b"stsc": 4, b"stco": 4, b"co64": 4, b"stss": 4, b"stsz": 8}  # name -> place of the count
_LARGE_SIZE: Final = 1  # the size follows the name, in 8 bytes


class _Box(NamedTuple):
    name: bytes
    start: int  # of its content
    end: int


def check_boxes(data: bytes, counts: Counts) -> None:
    """Count the boxes, items, references and extents of a file, and the samples of its tracks.

    Raises:
        TooLarge: there are too many of one kind.
        Broken: the extents are together larger than twice the file, so that bytes would be decoded several times.
    """
    references_end, wide = 0, False
    for box in _boxes(data):
        counts.add("boxes")
        content = data[box.start : min(box.end, box.start + 16)]
        if box.name == b"infe":
            counts.add("items")
        elif box.name == b"iref":
            references_end, wide = box.end, content[:1] != b"\0"
        elif box.start < references_end:
            counts.add("references", int.from_bytes(content[4:6] if wide else content[2:4], "big"))
        elif box.name in _TABLES:
            place = _TABLES[box.name]
            counts.add("samples", int.from_bytes(content[place : place + 4], "big"))
        elif box.name == b"ipma":
            counts.add("items with properties", int.from_bytes(content[4:8], "big"))
        elif box.name == b"iloc":
            _check_locations(data[box.start : box.end], len(data), counts)


def _boxes(data: bytes) -> Iterator[_Box]:
    """Yield each box, and then the boxes in it."""
    position = 0
    while position + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if size == _LARGE_SIZE and start + 8 <= len(data):
            size, start = struct.unpack_from(">Q", data, start)[0], start + 8
        end = position + size if size else len(data)  # 0: up to the end of the file
        yield _Box(name, start, min(end, len(data)))
        if name == b"iinf":
            position = start + (6 if data[start : start + 1] == b"\0" else 8)
        elif name in _CONTAINERS:
            position = start + _CONTAINERS[name]
        else:
            position = max(end, start)


def _check_locations(content: bytes, file_bytes: int, counts: Counts) -> None:
    """Count the extents in the content of an `iloc` box. The function stops at the end of the content, and where the
    decoders stop because a field has an unknown size."""
    if len(content) < 8:
        return
    version, sizes = content[0], [content[4] >> 4, content[4] & 15, content[5] >> 4, content[5] & 15]
    offset_bytes, length_bytes, base_bytes, index_bytes = sizes if version else (*sizes[:3], 0)
    id_bytes = 4 if version == 2 else 2
    n_items, position = int.from_bytes(content[6 : 6 + id_bytes], "big"), 6 + id_bytes
    item_bytes = id_bytes + (2 if version else 0) + 2 + base_bytes
    extent_bytes = index_bytes + offset_bytes + length_bytes
    total = 0
    for _ in range(n_items):
        counts.add("extents")  # an item without extents counts too
        if position + item_bytes + 2 > len(content):
            return
        n_extents = int.from_bytes(content[position + item_bytes : position + item_bytes + 2], "big")
        counts.add("extents", max(0, n_extents - 1))
        position += item_bytes + 2
        for _ in range(n_extents):
            end = position + extent_bytes
            total += int.from_bytes(content[end - length_bytes : end], "big")
            position = end
        if total > 2 * file_bytes:
            raise Broken(f"the {counts.name}'s items have {total} bytes together, and the file has {file_bytes}")
