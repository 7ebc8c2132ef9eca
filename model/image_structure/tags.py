"""Count the tags of a TIFF or an EXIF block, and the strips or tiles of a TIFF.

A list of tags is called an IFD. Pillow and libtiff read the first IFD of an image and those that its tags point to. No
number in the file decides how much memory is allocated here.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from model.image_structure.limits import Broken, Counts

_SUB_IFDS: Final = frozenset({34665, 34853, 40965})  # EXIF, GPS, interoperability
_RATIONALS: Final = frozenset({5, 10})
_NUMBERS: Final = frozenset({3, 4, 6, 8, 9, 11, 12, 13, 16, 17, 18})
_INTEGERS: Final = {3: "H", 4: "I", 13: "I", 16: "Q"}  # type -> its code for struct
_WIDTH, _HEIGHT, _STRIPS, _SAMPLES, _ROWS, _PLANES = 256, 257, 273, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES = 322, 323, 324
_LAYOUT: Final = frozenset({_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _PLANES, _TILE_WIDTH, _TILE_HEIGHT})
_OFFSETS: Final = frozenset({_STRIPS, _TILES})
_SEPARATE_PLANES: Final = 2


class _Kind(NamedTuple):
    """How numbers are stored in a block of tags."""

    order: str  # of struct
    big: bool  # BigTIFF, with 64-bit numbers


class _Entry(NamedTuple):
    tag: int
    type: int
    n_values: int
    value: bytes  # the value, or its offset in the block if it has more bytes than this


def check_exif(block: bytes, counts: Counts) -> None:
    """Count the tags of an EXIF block, which may begin with b"Exif\\0\\0". Damaged blocks raise no error.

    Raises:
        TooLarge: there are too many tags or values.
    """
    for _ in range(2):
        block = block.removeprefix(b"Exif\0\0")
    for kind, offset in _kinds(block):
        _check_ifds(block, kind, offset, counts)


def check_tiff(data: bytes, counts: Counts) -> None:
    """Count the tags, strips and tiles of a TIFF's first image.

    Raises:
        TooLarge: there are too many tags, values, strips or tiles.
        Broken: the size of the image or of its strips or tiles is not one whole number, or there are more than twice as
            many strips or tiles as the size of the image needs, so that pixels would be decoded several times.
    """
    for kind, offset in _kinds(data):
        _check_layout(_check_ifds(data, kind, offset, counts), kind, data, counts)


def _kinds(block: bytes) -> Iterator[tuple[_Kind, int]]:
    """Yield the ways in which decoders read a block, with the offset of the first IFD. Pillow reads a big-endian
    BigTIFF as a plain TIFF, and libtiff reads it as a BigTIFF."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return
    yield _Kind(order, big=False), struct.unpack_from(f"{order}I", block, 4)[0]
    if 43 in block[2:4] and len(block) >= 16:
        yield _Kind(order, big=True), struct.unpack_from(f"{order}Q", block, 8)[0]


def _check_ifds(block: bytes, kind: _Kind, offset: int, counts: Counts) -> list[_Entry]:
    """Count the tags in the first IFD and in those to which it points. Return the entries of the first IFD that
    describe the layout of the pixels."""
    layout: list[_Entry] = []
    offsets, seen = [offset], set[int]()
    while offsets:
        offset = offsets.pop()
        if offset in seen:
            continue
        is_first = not seen
        seen.add(offset)
        for entry in _entries(block, kind, offset):
            counts.add("tags")
            if entry.type in _RATIONALS:
                counts.add("fractions in tags", entry.n_values)
            elif entry.type in _NUMBERS:
                counts.add("numbers in tags", entry.n_values if entry.tag not in _OFFSETS else 1)
            if entry.tag in _SUB_IFDS and (target := _integer(entry, kind, block)) is not None:
                offsets.append(target)
            if is_first and entry.tag in _LAYOUT | _OFFSETS:
                layout.append(entry)
    return layout


def _entries(block: bytes, kind: _Kind, offset: int) -> Iterator[_Entry]:
    """Yield the entries of the IFD at `offset`, up to the end of the block."""
    head, entry = (f"{kind.order}Q", f"{kind.order}HHQ8s") if kind.big else (f"{kind.order}H", f"{kind.order}HHI4s")
    start = offset + struct.calcsize(head)
    if start > len(block):
        return
    stated = struct.unpack_from(head, block, offset)[0]
    whole = (len(block) - start) // struct.calcsize(entry)
    for index in range(min(stated, whole)):
        yield _Entry(*struct.unpack_from(entry, block, start + index * struct.calcsize(entry)))


def _integer(entry: _Entry, kind: _Kind, block: bytes) -> int | None:
    """Return the first number of an entry, or None if its type is no integer or the number is missing."""
    code = _INTEGERS.get(entry.type)
    if code is None or not entry.n_values:
        return None
    form, value = kind.order + code, entry.value
    if entry.n_values * struct.calcsize(form) > len(value):
        start = int.from_bytes(value, "little" if kind.order == "<" else "big")
        value = block[start : start + struct.calcsize(form)]
    if len(value) < struct.calcsize(form):
        return None
    return int(struct.unpack_from(form, value)[0])


def _check_layout(layout: list[_Entry], kind: _Kind, data: bytes, counts: Counts) -> None:
    numbers: dict[int, int] = {}
    for entry in layout:
        if entry.tag in _OFFSETS:
            counts.add("strips or tiles", entry.n_values)
            continue
        number = _integer(entry, kind, data)
        if number is None or entry.tag in numbers:
            raise Broken(f"the TIFF's tag {entry.tag} must be one whole number")
        numbers[entry.tag] = number
    width, height = numbers.get(_WIDTH, 0), numbers.get(_HEIGHT, 0)
    part_width, part_height = width, numbers.get(_ROWS, height)
    if any(entry.tag == _TILES for entry in layout):
        part_width, part_height = numbers.get(_TILE_WIDTH, width), numbers.get(_TILE_HEIGHT, height)
    planes = numbers.get(_SAMPLES, 1) if numbers.get(_PLANES) == _SEPARATE_PLANES else 1
    if 0 in (width, height, part_width, part_height):
        return  # the decoder refuses it
    needed = -(-width // part_width) * -(-height // part_height) * planes
    if counts["strips or tiles"] > 2 * needed:
        raise Broken(f"the TIFF has {counts['strips or tiles']} strips or tiles; its size needs {needed}")
