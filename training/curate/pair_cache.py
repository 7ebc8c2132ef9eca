"""Compare pairs of images in worker processes, and keep the results, so that no pair is compared twice.

The similarity of a pair is a function of the pixels of its two images. It is stored under a digest of both, in a file
to which records of fixed size are appended. A record that was cut off by a kill is removed when the file is opened
again. Later runs, also with more images, compare only new pairs.
The grades of detail of single images are stored in the same way.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from training.curate.blocks import in_order, one_blas_thread
from training.curate.copies.groups import detail_grade
from training.curate.copies.verify import PairComparison, Similarities
from training.curate.listing import Location, Reader, gone
from training.curate.progress import Track
from training.curate.scan import Scanned
from training.curate.table import Indices, Pixels
from training.curate.workers import Workers
from training.data.dataset import decode

VERSION: Final = "1"
"""Changes whenever the comparison of a pair gives another result. Results of other versions are not used."""
CHUNK: Final = 64
FEW: Final = 512
"""The number of pairs up to which this process compares them itself, because starting others takes seconds."""
SMALL_CHUNK: Final = 8
"""The largest number of pairs that a thread of this process compares at once."""
RECORD: Final = np.dtype([("key", "V16"), ("number", "<f4")])


class NumberStore:
    """A file with float32 numbers under keys of 16 bytes."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}.bin"
        self._known: dict[bytes, float] = {}
        if self._path.exists():
            n = self._path.stat().st_size // RECORD.itemsize
            with self._path.open("r+b") as file:
                file.truncate(n * RECORD.itemsize)
                records = np.frombuffer(file.read(), RECORD)
            keys = [key.tobytes() for key in records["key"]]
            self._known = dict(zip(keys, records["number"].tolist(), strict=True))

    def get(self, key: bytes) -> float | None:
        """Return the number of a key, or None if the key is not in the file."""
        return self._known.get(key)

    def add(self, keys: Sequence[bytes], numbers: npt.NDArray[np.float32]) -> None:
        """Store the numbers of keys.

        Raises:
            OSError: the file cannot be written.
        """
        records = np.empty(len(keys), RECORD)
        records["key"] = np.frombuffer(b"".join(keys), "V16")
        records["number"] = numbers
        with self._path.open("ab") as file:
            file.write(records.tobytes())
        self._known |= dict(zip(keys, records["number"].tolist(), strict=True))


class PairStore(NumberStore):
    """A file with the similarities of pairs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, f"pairs-{VERSION}")


class StoredGrades:
    """Returns the grades of detail of images of a scan, and stores them, so that no image is graded twice.

    `rows` [n] are the rows in the scan of the images that are named by numbers.
    """

    def __init__(self, store: NumberStore, threads: int, scanned: Scanned, rows: Indices) -> None:
        self._store, self._threads, self._scanned, self._rows = store, threads, scanned, rows

    def __call__(self, numbers: Indices) -> npt.NDArray[np.float64]:
        """Return the grades [p] of the images with the given numbers [p].

        Raises:
            OSError: an image cannot be read. Grades so far are stored.
        """
        rows = self._rows[numbers].tolist()
        keys = {row: self._scanned.images.pixels_sha256[row].tobytes()[:16] for row in rows}
        new = [row for row in rows if self._store.get(keys[row]) is None]
        grades = in_order(lambda row: detail_grade(self._scanned.pixels(row)), new, self._threads)
        for start in range(0, len(new), CHUNK):
            part = new[start : start + CHUNK]
            found = np.fromiter(islice(grades, len(part)), np.float32, len(part))
            self._store.add([keys[row] for row in part], found)
        known = [self._store.get(keys[row]) for row in rows]
        assert None not in known
        return np.array(known, np.float64)


class Chunk(NamedTuple):
    """Pairs that one worker compares. They name images by numbers, and the locations of these images are given."""

    start: int  # the position of the first pair
    first: Indices
    second: Indices
    of_first: dict[int, Location]
    of_second: dict[int, Location]


class PairWorker:
    """Compares the pairs of chunks. It reads the images itself."""

    def __init__(self, first: Reader, second: Reader | None) -> None:
        self._of_first: dict[int, Location] = {}
        self._of_second: dict[int, Location] = {}
        read_first = partial(_read, first, self._of_first)
        read_second = None if second is None else partial(_read, second, self._of_second)
        self._compare = PairComparison(read_first, read_second)

    def __call__(self, chunk: Chunk) -> tuple[int, Similarities]:
        """Return the position of the first pair of a chunk, and the similarities of its pairs.

        Raises:
            OSError: an image cannot be read.
        """
        self._of_first |= chunk.of_first
        self._of_second |= chunk.of_second
        return chunk.start, self._compare(chunk.first, chunk.second)


def _read(reader: Reader, locations: dict[int, Location], index: int) -> Pixels:
    try:
        return decode(reader.encoded(locations[index]))
    except ValueError as error:
        raise gone(locations[index].key, error) from error


class StoredComparison:
    """Compares pairs of images of one scan, or of an image of one scan and one of another, and stores the results.

    It is a `training.curate.copies.verify.Compare`. `first_rows` [n] and `second_rows` [m] are the rows in the scans of
    the images that the pairs number. `what` names the comparison where the progress is shown.
    """

    def __init__(
        self,
        store: PairStore,
        workers: Workers,
        track: Track,
        what: str,
        first: tuple[Scanned, Indices],
        second: tuple[Scanned, Indices] | None = None,
    ) -> None:
        self._store, self._workers, self._track, self._what = store, workers, track, what
        self._first, self._second = first, second
        self._make = partial(PairWorker, first[0].reader, None if second is None else second[0].reader)
        self._own: PairWorker | None = None

    def __call__(self, first: Indices, second: Indices) -> Similarities:
        """Return the similarities [p] of the pairs of the images `first` [p] and `second` [p].

        Raises:
            OSError: an image cannot be read, or a worker was killed. Results so far are stored.
        """
        pairs = self._keys(first, second)
        ones, others = self._first[1][first], (self._second or self._first)[1][second]
        new = [position for position, pair in enumerate(pairs) if self._store.get(pair) is None]
        if new:
            unknown = np.array(new, np.int64)
            order = unknown[np.lexsort((others[unknown], ones[unknown]))]
            self._compare_new(order, ones[order], others[order], pairs)
        found = [self._store.get(pair) for pair in pairs]
        assert None not in found
        return np.array(found, np.float32)

    def stored(self, first: Indices, second: Indices) -> Similarities:
        """Return the similarities [p] of the pairs that are stored, and NaN for the others."""
        return np.array([self._store.get(pair) for pair in self._keys(first, second)], np.float32)

    def _keys(self, first: Indices, second: Indices) -> list[bytes]:
        """Return the keys of pairs [p], which are digests of their pixels."""
        (scanned, rows), (other, other_rows) = self._first, self._second or self._first
        looks = scanned.images.pixels_sha256[rows[first]]
        other_looks = other.images.pixels_sha256[other_rows[second]]
        return [
            hashlib.sha256(a.tobytes() + b.tobytes()).digest()[:16] for a, b in zip(looks, other_looks, strict=True)
        ]

    def _compare_new(self, order: Indices, ones: Indices, others: Indices, pairs: Sequence[bytes]) -> None:
        """Compare new pairs. `order` [p] has their positions in `pairs`, and `ones` and `others` their rows."""
        are_few = len(order) <= FEW
        small = min(SMALL_CHUNK, -(-len(order) // self._workers.number))
        chunks = list(self._chunks(ones, others, small if are_few else CHUNK))
        with (
            self._track(self._what, len(order)) as advance,
            one_blas_thread() if are_few else nullcontext(),
        ):
            if are_few:
                self._own = self._own or self._make()
                results: Iterator[tuple[int, Similarities]] = in_order(self._own, chunks, self._workers.number)
            else:
                results = self._workers(self._make, chunks)
            for start, similarities in results:
                positions = order[start : start + len(similarities)].tolist()
                self._store.add([pairs[position] for position in positions], similarities)
                advance(len(positions))

    def _chunks(self, ones: Indices, others: Indices, size: int) -> Iterator[Chunk]:
        scanned, other = self._first[0], (self._second or self._first)[0]
        for start in range(0, len(ones), size):
            a, b = ones[start : start + size], others[start : start + size]
            of_first = {row: scanned.location(row) for row in set(a.tolist())}
            of_second = {row: other.location(row) for row in set(b.tolist())}
            if self._second is None:
                of_first |= of_second
            yield Chunk(start, a, b, of_first, of_second)
