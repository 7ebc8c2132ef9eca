"""Classify images by a few examples of each class, without training.

The prototype of a class is the mean of the unit vectors of its examples, scaled to length 1 (Snell et al.: Prototypical
Networks, 2017). An image belongs to the class of the most similar prototype.

Legend: E examples, C classes, Q images to classify, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.search.store import Floats
from service.vision.conformal import Scores


@dataclass(frozen=True)
class Prototypes:
    """The prototypes of C classes, and the examples from which they were computed."""

    names: tuple[str, ...]  # of the C classes
    examples: Floats  # [E, D], each of length 1
    classes: npt.NDArray[np.int64]  # [E], the position of each example's class in `names`
    sums: Floats  # [C, D], the sum of the examples of each class

    @staticmethod
    def of(examples: Floats, labels: Sequence[str]) -> "Prototypes":
        """Make a prototype for each class. The classes are in the order in which they first occur.

        Args:
            examples: [E, D], each of length 1.
            labels: the class of each example.
        """
        names = tuple(dict.fromkeys(labels))
        positions = {name: position for position, name in enumerate(names)}
        classes = np.array([positions[label] for label in labels], np.int64)
        sums = np.zeros((len(names), examples.shape[1]), np.float32)
        np.add.at(sums, classes, examples)
        return Prototypes(names, examples, classes, sums)

    def similarities(self, vectors: Floats) -> Floats:
        """Return the cosine similarity of each image to each prototype, [Q, C]. `vectors` is [Q, D], each of
        length 1."""
        result: Floats = vectors @ _unit_rows(self.sums).T
        return result

    def leave_one_out(self) -> Scores:
        """For each example, compute the highest similarity to a prototype, with the example itself left out of the
        prototype of its class. Return these similarities in ascending order.

        An example that is alone in its class is not in the result, because its class would have no prototype.
        """
        others = self.similarities(self.examples)  # [E, C]
        rows = np.arange(len(self.examples))
        without = _unit_rows(self.sums[self.classes] - self.examples)  # [E, D]
        others[rows, self.classes] = np.einsum("ed,ed->e", without, self.examples)
        has_more = np.bincount(self.classes)[self.classes] > 1
        result: Scores = np.sort(others[has_more].max(axis=1)).astype(np.float64)
        return result


def _unit_rows(rows: Floats) -> Floats:
    """Return the rows [n, D] scaled to length 1. A row of zeros stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Floats = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)
    return result
