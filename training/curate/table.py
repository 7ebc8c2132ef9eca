"""The table of scanned images. Every stage of curation computes on it.

A row has all that the scan has found out about one readable image. The rows are sorted by key, so a result that depends
only on the table depends only on the set of images, not on the order in which they were scanned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # RGB [height, width, 3], upright
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """The scanned images, one per row, sorted by key. Arrays may be mapped from files, so they must not be changed.

    Raises:
        ValueError: an array has the wrong type or shape, or the keys are not in ascending order.
    """

    key: Sequence[str]  # "<number of the source>/<name in the source>", unique
    sha256: npt.NDArray[np.uint8]  # [n, 32], of the bytes of the file
    pixels_sha256: npt.NDArray[np.uint8]  # [n, 32], of the height, the width and the upright RGB pixels
    phash: npt.NDArray[np.uint64]  # [n], DCT hash of 64 bits of the upright image
    width: npt.NDArray[np.int32]  # [n], pixels, upright
    height: npt.NDArray[np.int32]  # [n], pixels, upright
    n_bytes: npt.NDArray[np.int64]  # [n], size of the file
    label: Sequence[str | None]  # [n]
    measures: Mapping[str, npt.NDArray[np.float32]]  # name of the measure -> [n]
    embedding: npt.NDArray[np.float32]  # [n, D], length 1

    def __post_init__(self) -> None:
        n = len(self.key)
        columns: dict[str, tuple[npt.NDArray[np.generic], type[np.generic], tuple[int, ...]]] = {
            "sha256": (self.sha256, np.uint8, (n, 32)),
            "pixels_sha256": (self.pixels_sha256, np.uint8, (n, 32)),
            "phash": (self.phash, np.uint64, (n,)),
            "width": (self.width, np.int32, (n,)),
            "height": (self.height, np.int32, (n,)),
            "n_bytes": (self.n_bytes, np.int64, (n,)),
            "embedding": (self.embedding, np.float32, (n, *self.embedding.shape[1:2])),
        }
        columns |= {f"measures[{name!r}]": (values, np.float32, (n,)) for name, values in self.measures.items()}
        for name, (values, kind, shape) in columns.items():
            if values.dtype != kind or values.shape != shape:
                raise ValueError(
                    f"{name} is {values.dtype} {list(values.shape)}; it must be {np.dtype(kind)} {list(shape)}"
                )
        if self.embedding.ndim != 2:
            raise ValueError(f"embedding has {self.embedding.ndim} axes; it must be [images, dimensions]")
        if len(self.label) != n:
            raise ValueError(f"label has {len(self.label)} entries for {n} images")
        for before, after in zip(self.key, self.key[1:], strict=False):
            if before >= after:
                raise ValueError(f"the keys {before!r} and {after!r} are not in ascending order")

    def __len__(self) -> int:
        return len(self.key)

    def take(self, indices: Indices, embedding: npt.NDArray[np.float32] | None = None) -> "Images":
        """Return the images with the numbers `indices` [m], which must be in ascending order, as a new table.

        If `embedding` [m, D] is given, it contains their embeddings, so that these need not be copied.
        """
        return Images(
            key=[self.key[i] for i in indices],
            sha256=self.sha256[indices],
            pixels_sha256=self.pixels_sha256[indices],
            phash=self.phash[indices],
            width=self.width[indices],
            height=self.height[indices],
            n_bytes=self.n_bytes[indices],
            label=[self.label[i] for i in indices],
            measures={name: values[indices] for name, values in self.measures.items()},
            embedding=self.embedding[indices] if embedding is None else embedding,
        )
