"""Tests that the parts of an image are counted before it is decoded, at little cost, and that whole images pass."""

import contextlib
import random
import struct
import time

import pytest

from model.decode import FORMATS, Broken, DecodeError, DecodeLimits, TooLarge, Unsupported, decode
from model.image_structure import checked
from model.image_structure.limits import JPEG_MAX_SCAN_PIXELS, LIMITS, Counts
from tests.hostile_images import (
    GREY_TIFF,
    REPEATED,
    after_boxes,
    bmp_of_runs,
    box,
    cases,
    changed_files,
    exif,
    in_jpeg,
    segment,
    tiff,
    tiff_of_strips,
    whole_files,
)

PARTS = [(name, part) for name in FORMATS for part in LIMITS[name]]


def test_every_format_has_a_table_and_every_part_a_file() -> None:
    assert set(FORMATS) <= set(LIMITS)
    assert {name: set(parts) for name, parts in REPEATED.items()} == {name: set(LIMITS[name]) for name in LIMITS}


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_half_the_limit_passes_and_more_than_the_limit_is_refused_at_once(name: str, part: str) -> None:
    most = LIMITS[name][part].most
    half = REPEATED[name][part](most // 2)
    checked(name, half)
    beyond = REPEATED[name][part](most + 1)
    started = time.thread_time()
    with pytest.raises(TooLarge, match=f"the {name} has more than {most} {part}"):
        decode(beyond)
    assert time.thread_time() - started < 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about tags
@pytest.mark.parametrize(("name", "part"), [(name, part) for name, part in PARTS if name not in ("AVIF", "HEIC")])
def test_what_passes_is_decoded_in_little_time(name: str, part: str) -> None:
    data = REPEATED[name][part](LIMITS[name][part].most // 2)
    started = time.thread_time()
    with contextlib.suppress(Broken):
        decode(data)
    assert time.thread_time() - started < 1


def test_a_count_passes_at_the_limit() -> None:
    counts, most = Counts("GIF"), LIMITS["GIF"]["extensions"].most
    counts.add("extensions", most)
    with pytest.raises(TooLarge):
        counts.add("extensions")


def test_whole_images_pass() -> None:
    for name, files in whole_files().items():
        for data in files:
            assert checked(name, data) == data
            assert decode(data).shape == (24, 40, 3) or name == "HEIC"


# ---- TIFF


def test_ten_million_strip_offsets_are_refused_in_milliseconds() -> None:
    """4 million offsets took 23 seconds. The file is larger than the default limit, which the test raises."""
    many = tiff_of_strips(10_000_000)
    started = time.thread_time()
    with pytest.raises(TooLarge, match="more than 400000 numbers in tags"):
        decode(many, DecodeLimits(max_bytes=len(many)))
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_strips_are_counted_in_every_kind_of_tiff(order: str, big: bool) -> None:
    mark = {"<": b"II", ">": b"MM"}[order]
    count = 100_000
    if big:
        head = mark + struct.pack(f"{order}HHHQ", 43, 8, 0, 16)
        data = head + struct.pack(f"{order}QHHQQQ", 1, 273, 4, count, 44, 0) + bytes(4 * count)
    else:
        head = mark + struct.pack(f"{order}HI", 42, 8)
        data = head + struct.pack(f"{order}HHHIII", 1, 273, 4, count, 26, 0) + bytes(4 * count)
    with pytest.raises(TooLarge, match="strips or tiles"):
        checked("TIFF", data)


def test_strips_that_cover_the_image_many_times_are_refused() -> None:
    """Pillow would decode 4 megapixels for each pair of these 3000 tiles."""
    tiles = {322: (4, 1, 2001), 323: (4, 1, 1000), 324: (4, 3000, -1), 325: (4, 3000, -1)}
    data = tiff({**GREY_TIFF, 256: (4, 1, 2000), 257: (4, 1, 2000), **tiles}, bytes(20_000))
    with pytest.raises(Broken, match="has 3000 strips or tiles; its size needs 2"):
        decode(data)


@pytest.mark.parametrize("entry", [(5, 1, 8), (3, 0, 0), (2, 1, 8)])
def test_a_size_that_is_no_number_is_refused(entry: tuple[int, int, int]) -> None:
    data = tiff({**GREY_TIFF, 278: entry, 273: (4, 1, 8), 279: (4, 1, 64)}, bytes(64))
    with pytest.raises(Broken, match="tag 278 must be one whole number"):
        decode(data)


def test_tags_behind_a_pointer_count_too() -> None:
    block = exif(1500)
    pointed = tiff({**GREY_TIFF, 273: (4, 1, 8), 279: (4, 1, 64), 34665: (4, 1, -1), 34853: (4, 1, -1)}, block[8:])
    checked("TIFF", pointed)  # two pointers to the same tags
    more = tiff({**GREY_TIFF, 34665: (4, 1, -1)}, exif(2500)[8:])
    with pytest.raises(TooLarge, match="tags"):
        checked("TIFF", more)


def test_an_ifd_that_points_to_itself_ends() -> None:
    checked("TIFF", tiff({**GREY_TIFF, 34665: (4, 1, 8), 34853: (4, 1, 8)}, b""))


# ---- JPEG, BMP, boxes


def test_scans_are_limited_by_the_size_of_the_image() -> None:
    frame = segment(0xC2, struct.pack(">BHHB", 8, 8000, 8000, 3) + bytes(9))
    scan = segment(0xDA, bytes(4))
    checked("JPEG", b"\xff\xd8" + frame + scan * 20)
    assert JPEG_MAX_SCAN_PIXELS == 8000 * 8000 * 20
    with pytest.raises(TooLarge, match="more than 20 scans of 64000000 pixels"):
        checked("JPEG", b"\xff\xd8" + frame + scan * 21)


def test_exif_that_continues_in_the_next_segment_is_counted() -> None:
    block = b"II*\0" + struct.pack("<I", 70_000) + bytes(69_992) + exif(2500)[8:]
    parts = [segment(0xE1, b"Exif\0\0" + block[start : start + 60_000]) for start in (0, 60_000)]
    with pytest.raises(TooLarge, match="tags"):
        decode(in_jpeg(*parts))


@pytest.mark.parametrize("compression", [1, 2])
def test_run_length_encoded_bmp_is_refused_at_once(compression: int) -> None:
    """4 kB of it took 7 seconds with the interpreter's lock held."""
    data = bmp_of_runs(8000, compression)
    assert len(data) < 4096
    with pytest.raises(Unsupported, match="run-length encoding are not supported; save it as PNG"):
        decode(data)


@pytest.mark.parametrize("name", [name for name in ("AVIF", "HEIC") if name in FORMATS])
def test_extents_that_repeat_the_file_are_refused(name: str) -> None:
    item = struct.pack(">HHH", 1, 0, 100) + struct.pack(">II", 0, 2**20) * 100
    with pytest.raises(Broken, match="items have 104857600 bytes together"):
        decode(after_boxes(name, box(b"iloc", struct.pack(">IBBH", 0, 0x44, 0, 1) + item)))


# ---- everything


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about odd tags
def test_hostile_files_of_every_format_cost_little() -> None:
    """A seeded tenth of what benchmarks/hostile.py sends to a service."""
    limits = DecodeLimits(max_pixels=1_000_000)
    chosen = random.Random(16).sample(list(cases(seed=16, changed=40, with_bombs=False)), 150)
    assert {case.format for case in chosen} == set(FORMATS)
    for case in chosen:
        started = time.thread_time()
        with contextlib.suppress(DecodeError):
            decode(case.data, limits)
        assert time.thread_time() - started < 1 + len(case.data) * 1e-6, (case.format, case.kind, len(case.data))


def test_the_same_seed_makes_the_same_files() -> None:
    first, second, other = (list(changed_files("GIF", random.Random(seed), 20)) for seed in (1, 1, 2))
    assert first == second != other
