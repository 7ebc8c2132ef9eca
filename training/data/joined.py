"""Several sources of images as one source."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from training.data.dataset import Classes, Indices, Skipped, Source, joined_classes


class JoinedSource:
    """A source with the images of several sources, one source after the other.

    The name of an image is the number of its source, counted from 1, a slash, and its name in that source, such as
    `2/cats/7.jpg`. Classes with equal names are one class. `starts` contains the number of the first image of each
    source. The sources are divided into training images and held-out images one by one, so `parts` is empty.
    """

    parts: Mapping[str, Indices]

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources, self.parts = list(sources), {}
        sizes = np.array([len(source) for source in sources], np.int64)
        self._ends = np.cumsum(sizes)
        self.starts: Indices = self._ends - sizes
        self.skipped: Sequence[Skipped] = [
            Skipped(f"{number}/{item.name}", item.reason)
            for number, source in enumerate(sources, 1)
            for item in source.skipped
        ]
        self.ignored: Mapping[str, int] = sum((Counter(source.ignored) for source in sources), Counter[str]())

    def source_numbers(self, indices: Indices) -> Indices:
        """Return the numbers of the sources, counted from 0, to which images belong."""
        return np.searchsorted(self._ends, indices, side="right")

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self.starts[number])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        number, own = self._find(index)
        return f"{number + 1}/{self._sources[number].name(own)}"

    def label(self, index: int) -> str | None:
        number, own = self._find(index)
        return self._sources[number].label(own)

    def classes(self) -> Classes:
        return joined_classes([source.classes() for source in self._sources])

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image's encoded file. The errors are those of the image's source."""
        number, own = self._find(index)
        return self._sources[number].encoded(own)

    def fingerprint(self, index: int) -> str:
        number, own = self._find(index)
        return self._sources[number].fingerprint(own)

    def version(self, index: int) -> str:
        number, own = self._find(index)
        return self._sources[number].version(own)
