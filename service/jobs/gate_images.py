"""The images on which the gate of a retraining compares the models, and those that its training leaves out for it.

A model tells images that it was trained on apart more easily, so the training must not see the images on which it is
judged. If they come from the images of the training, a share of these is held out. The list of them is kept, so later
retrainings hold out the same images, and the live model has not seen them either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model.folder import split_folders
from service.jobs.compare import list_file
from service.jobs.frozen_set import (
    FrozenSet,
    choose_held_out,
    choose_images,
    copies_of,
    hold_out,
    open_frozen_set,
    read_frozen_set,
)

HELD_OUT_LIST: Final = "-held-out"
"""The end of the name of a list of images that are held out of trainings."""


@dataclass(frozen=True)
class GateImages:
    """The images of a gate.

    file: the list of the frozen set.
    frozen: the frozen set.
    held_out: whether the training does not see the images on which the models are judged.
    excluded: the paths of the images that the training has to leave out.
    """

    file: Path
    frozen: FrozenSet
    held_out: bool
    excluded: tuple[str, ...]


def gate_images(
    data_dir: Path, data: Sequence[str], folder: Path, least: int, tell: Callable[[str], object], *, write: bool = True
) -> GateImages:
    """Choose the images of a gate, or read and check the list of those that were chosen before.

    If `folder` is divided into training images and held-out images, such as `train/` and `val/`, the models are judged
    on the latter. If it is not divided and contains images of the training, a share of its images is held out.

    Args:
        data_dir: the data folder, which contains the lists.
        data: the images of the training: absolute paths without links, or URLs. Only folders are searched for copies
            of the gate's images.
        folder: the folder from which the gate's images are chosen.
        least: the smallest number of images with which the models can be compared.
        tell: called with one line about each image that is left out, and about the choice.
        write: whether to store new lists.

    Raises:
        ValueError, OSError: as for `open_frozen_set`.
    """
    roots = [Path(source) for source in data if Path(source).is_dir()]
    divided = split_folders(folder) is not None
    is_trained_on = not divided and any(folder == root or folder in root.parents for root in roots)
    file, frozen = list_file(data_dir, folder, HELD_OUT_LIST if is_trained_on else ""), None
    if is_trained_on:
        frozen = _held_out(file, folder, least, tell, write=write)
        if frozen is None:
            file = list_file(data_dir, folder)
            tell(
                f"the gate compares the models on images of the training: {folder} has too few to hold out {least} "
                "(min_queries), which may be a third of them; it is better to name other images in gate_data"
            )
    held_out = frozen is not None or not is_trained_on
    if frozen is None:
        frozen = _all_of(file, folder, tell, write=write)
    parts = [root if (parts := split_folders(root)) is None else parts[0] for root in roots]
    excluded = copies_of(frozen, folder, parts) if held_out else []
    if excluded:
        tell(f"the training leaves out {len(excluded)} files, on which the gate compares the models ({file})")
    return GateImages(file, frozen, held_out, tuple(excluded))


def _held_out(file: Path, folder: Path, least: int, tell: Callable[[str], object], *, write: bool) -> FrozenSet | None:
    if write:
        return hold_out(file, folder, least, tell=tell)
    return read_frozen_set(file, folder) if file.exists() else choose_held_out(folder, least, tell=tell)


def _all_of(file: Path, folder: Path, tell: Callable[[str], object], *, write: bool) -> FrozenSet:
    if write:
        return open_frozen_set(file, folder, tell=tell)
    return read_frozen_set(file, folder) if file.exists() else choose_images(folder, tell=tell)
