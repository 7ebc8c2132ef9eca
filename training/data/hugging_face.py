"""Hugging Face datasets on disk as sources of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.folder import split_names
from training.data.dataset import Classes, Indices, Skipped, joined_classes, read_file


def _image_column(features: Mapping[str, Any], path: Path) -> str:
    from datasets import Image  # the caller has already imported it

    columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise ValueError(
            f"{path} has {len(columns)} columns of type Image ({columns}), but needs exactly one; "
            f"its columns are {[*features]}"
        )
    return columns[0]


class HuggingFaceSource:
    """A source of the images in a Hugging Face dataset that was saved with `save_to_disk`.

    The images come from the only column of type Image. The labels come from the first column of type ClassLabel, if the
    dataset has one. The rows stay on disk (memory-mapped Arrow). The name of an image is its split (`data` if there are
    no splits) and its row number, such as `train/12`.

    For a DatasetDict, `parts` maps `train` to the images of the split `train`, and `val` to those of its held-out
    split, such as `validation` or `test` (`model.folder.HELD_OUT`). If there is no such pair of splits, `parts` is
    empty.

    Raises:
        ValueError: the library `datasets` is missing, the folder is damaged, or the dataset does not have exactly one
            column of images.
    """

    skipped: Sequence[Skipped] = ()
    ignored: Mapping[str, int] = {}

    def __init__(self, path: Path) -> None:
        try:
            from datasets import ClassLabel, Dataset, Image, load_from_disk
        except ImportError as error:
            raise ValueError(f"{path} is a Hugging Face dataset: reading it needs `pip install datasets`") from error
        try:
            loaded = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the Hugging Face dataset in {path} cannot be opened: {error}") from error
        named = {"data": loaded} if isinstance(loaded, Dataset) else dict(loaded)
        self._rows: list[tuple[str, Any, str, str | None, list[str]]] = []  # part, dataset, columns, classes
        ends, parts = [0], {}
        for part, rows in named.items():
            image = _image_column(rows.features, path)
            label = next((name for name, kind in rows.features.items() if isinstance(kind, ClassLabel)), None)
            classes = rows.features[label].names if label else []
            kept = rows.select_columns([image, label] if label else [image]).with_format(None)
            self._rows.append((part, kept.cast_column(image, Image(decode=False)), image, label, classes))
            ends.append(ends[-1] + len(rows))
            parts[part] = np.arange(ends[-2], ends[-1])
        self._ends = np.array(ends[1:])
        self._labels = [rows.select_columns([label]) if label else None for _, rows, _, label, _ in self._rows]
        self._sizes: dict[int, Any] = {}
        two = split_names(parts)
        self.parts: Mapping[str, Indices] = {"train": parts[two[0]], "val": parts[two[1]]} if two is not None else {}

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        number, row = self._find(index)
        return f"{self._rows[number][0]}/{row}"

    def label(self, index: int) -> str | None:
        number, row = self._find(index)
        _, _, _, column, classes = self._rows[number]
        labels = self._labels[number]
        value = labels[row][column] if labels is not None else None
        return classes[value] if value is not None and 0 <= value < len(classes) else None

    def classes(self) -> Classes:
        parts = []
        for (_, rows, _, column, names), labels in zip(self._rows, self._labels, strict=True):
            numbers = np.full(len(rows), -1, np.int64)
            if labels is not None:
                values = np.array([-1 if value is None else value for value in labels[:][column]], np.int64)
                numbers = np.where(values < len(names), np.maximum(values, -1), -1)
            parts.append(Classes(numbers.astype(np.int32), names))
        return joined_classes(parts)

    def encoded(self, index: int) -> bytes:
        """Return an image's bytes, which are either in its row or in a file whose path is in the row.

        Raises:
            ValueError: the row has no image, or the file cannot be used.
            OSError: the disk failed.
        """
        number, row = self._find(index)
        _, rows, column, _, _ = self._rows[number]
        image = rows[row][column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError("the row has no image")
        return image["bytes"] if image["bytes"] is not None else read_file(Path(image["path"]))

    def fingerprint(self, index: int) -> str:
        number, row = self._find(index)
        if number not in self._sizes:
            import pyarrow.compute as pc

            _, rows, column, _, _ = self._rows[number]
            # Only the offsets in Arrow's table are read, not the bytes of the images.
            stored = rows.flatten_indices() if rows._indices is not None else rows
            self._sizes[number] = pc.binary_length(pc.struct_field(stored.data.column(column), "bytes")).to_numpy()
        return str(self._sizes[number][row])

    def version(self, index: int) -> str:
        """Return the size of the image in bytes and the fingerprint that `datasets` gives to the rows."""
        number, _ = self._find(index)
        return f"{self.fingerprint(index)} {self._rows[number][1]._fingerprint}"
