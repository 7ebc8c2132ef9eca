"""The limits on the parts of an encoded image, the errors of decoding, and a counter that enforces the limits.

A decoder spends time and memory on each part of a file, however small the part is. A file of 20 MB can contain millions
of parts that no encoder would write. The parts are therefore counted before a decoder sees the file.
"""

from collections import Counter
from typing import Final, NamedTuple


class DecodeError(ValueError):
    """The error raised when an image cannot be decoded. The message gives the reason and any limit exceeded."""


class TooLarge(DecodeError): ...


class Unsupported(DecodeError): ...


class Broken(DecodeError): ...


class Limit(NamedTuple):
    """The highest number of one kind of part, and why no honest file needs more."""

    most: int
    reason: str


_EXIF: Final = {
    "tags": Limit(2000, "cameras write fewer than 100, and Pillow reads them one by one in Python"),
    "numbers in tags": Limit(400_000, "a colour map of 16 bits has 196,608; Pillow makes a Python object of each"),
    "fractions in tags": Limit(10_000, "lens data and coordinates have fewer than 20; each takes 1.5 us to read"),
}

_BOXES: Final = {
    "boxes": Limit(20_000, "an image of 64 megapixels in tiles of 256 pixels has about 1,000 items with 4 boxes each"),
    "items": Limit(4000, "as above; decoders search the list of items for each reference"),
    "items with properties": Limit(4000, "as above"),
    "references": Limit(8000, "an image of tiles refers once to each tile, and each tile may have an alpha item"),
    "extents": Limit(8000, "encoders write one for each item"),
    "samples": Limit(20_000, "only the first image of a sequence is decoded; 20,000 are 5 minutes"),
}

LIMITS: Final[dict[str, dict[str, Limit]]] = {
    "JPEG": {
        "scans": Limit(
            100,
            "progressive encoders write about 10; each scan covers the whole image, so 100 bytes may take as long as "
            "a megabyte; libtiff has the same limit for JPEG data in TIFF files",
        ),
        "segments": Limit(2000, "20 MB of metadata fill about 300 segments of the largest possible size"),
        "fill bytes": Limit(65_536, "encoders write none; Pillow skips them one by one in Python, 0.4 us each"),
        "frame headers": Limit(1, "an image has exactly one; Pillow makes a Python tuple of each component"),
        "quantization tables": Limit(64, "an image uses at most 4; Pillow reads each number in Python"),
        "EXIF segments": Limit(50, "EXIF has one; Pillow copies all former ones for each further one"),
        "Photoshop blocks": Limit(20_000, "Photoshop writes about 50; Pillow reads them one by one in Python"),
        **_EXIF,
    },
    "PNG": {
        "chunks": Limit(100_000, "encoders write 20 MB of pixels in about 2,500 chunks"),
        **_EXIF,
    },
    "GIF": {
        "extensions": Limit(1000, "at most about 5 precede the first frame; later ones are not read"),
        "blocks before the first frame": Limit(
            100_000, "20 MB of metadata fill 80,000 blocks; Pillow reads them one by one in Python"
        ),
        "fill bytes": Limit(65_536, "encoders write none; Pillow skips them one by one in Python"),
    },
    "WEBP": {
        "chunks": Limit(20_000, "an animation has 2 or 3 for each frame; libwebp allocates memory for each"),
        **_EXIF,
    },
    "BMP": {
        "colours in the palette": Limit(256, "a pixel of 8 bits cannot address more"),
    },
    "TIFF": {
        "strips or tiles": Limit(50_000, "64 megapixels in tiles of 64 pixels are 15,625; each takes 6 us in Python"),
        **_EXIF,
    },
    "AVIF": _BOXES,
    "HEIC": _BOXES,
}
"""Format -> part -> limit. The limits are far above what encoders write, and low enough that the parts of any file take
less than a second."""

JPEG_MAX_SCAN_PIXELS: Final = 20 * 64_000_000
"""The highest number of scans times pixels of a JPEG with more than 20 scans. A scan of 64 megapixels takes up to 76
ms, and 100 of them would take 8 seconds."""


class Counts:
    """Counts the parts of one image."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._limits = LIMITS[name]
        self._counts: Counter[str] = Counter()

    def __getitem__(self, part: str) -> int:
        return self._counts[part]

    def add(self, part: str, count: int = 1) -> None:
        """Count `count` further parts.

        Raises:
            TooLarge: there are more than the limit.
        """
        self._counts[part] += count
        most = self._limits[part].most
        if self._counts[part] > most:
            raise TooLarge(f"the {self.name} has more than {most} {part}; save it again, with fewer of them")
