"""The digests of the images of sources as they are now, for the verification of a leak certificate."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.curate.listing import Reader, list_sources
from training.curate.progress import Track


@dataclass(frozen=True)
class ImageDigests:
    """The keys of n images, and the sha256 of the bytes of each, [n, 32]."""

    key: Sequence[str]
    sha256: npt.NDArray[np.uint8]


def digests_of(addresses: Sequence[str], track: Track, what: str) -> ImageDigests:
    """Read the files of all images of sources, and return their digests, sorted by key.

    Args:
        addresses: the paths or URLs of the sources.
        track: shows the progress.
        what: what the images are, for the progress.

    Files that cannot be used as images, because they are missing or too large, are left out, as a scan does.

    Raises:
        ValueError: a source cannot be used.
        OSError: a server or a disk failed.
    """
    keys, digests = list[str](), list[bytes]()
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(addresses, Path(folder))
        listing = list_sources(reader.sources)
        with track(f"reading {what}", len(listing)) as advance:
            for row in range(len(listing)):
                try:
                    data = reader.encoded(listing.location(row))
                except ValueError:
                    continue
                keys.append(listing.key[row])
                digests.append(hashlib.sha256(data).digest())
                advance(1)
    return ImageDigests(keys, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
