"""The frozen set: the images on which models are compared, written once as a list with the sha256 of every image.

The list decides which images are used, so models that are compared months apart see the same images. Images that are
added to the folder later are ignored. An image that is missing or changed is an error.

Images are chosen by their sha256, the smallest ones first. The choice therefore depends neither on names nor on the
order of files, and a new list of a folder that has grown mostly contains the same images. Files with the same content
are used once.

A retraining on the same folder must not train on the images on which it is judged. `hold_out` chooses a share of them,
and `copies_of` finds the files that the training has to leave out.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.decode import DecodeError, DecodeLimits, decode
from model.files import waiting_lock, write_text
from model.folder import printable, split_folders, walk
from model.messages import in_words

Part = Literal["index", "query"]

MOST_IMAGES: Final = 5000
"""The default maximum number of images in each part of a frozen set."""
HELD_OUT_SHARE: Final = 0.1
"""The share of the images that `hold_out` chooses, if this is enough."""
MOST_HELD_OUT_SHARE: Final = 1 / 3
"""The largest share of the images that `hold_out` chooses. The training needs the others."""


class FrozenImage(BaseModel):
    """An image of a frozen set: its path within the folder, the sha256 of its file, its class and its part.

    `label` is None if the images have no classes. The images of the part `query` are classified by those of the part
    `index`. If all images are in the part `index`, each is classified by the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    label: str | None = None
    part: Part = "index"


class FrozenSet(BaseModel):
    """The list of a frozen set, as it is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    images: tuple[FrozenImage, ...] = Field(min_length=2)

    @property
    def has_labels(self) -> bool:
        return self.images[0].label is not None

    @property
    def digest(self) -> str:
        """The sha256 over the hashes of all images, in order. It identifies the content of the set."""
        return hashlib.sha256("\n".join(image.sha256 for image in self.images).encode()).hexdigest()

    def part(self, name: Part) -> list[FrozenImage]:
        """Return the images of a part, in order."""
        return [image for image in self.images if image.part == name]

    def verify(self, folder: Path) -> None:
        """Check that every image is in the folder and unchanged.

        Raises:
            ValueError: an image is missing or changed. The message names it.
        """
        for image in self.images:
            read_image(folder, image)


def read_image(folder: Path, image: FrozenImage) -> bytes:
    """Return the bytes of an image of a frozen set.

    Raises:
        ValueError: the image is missing, cannot be read, or is changed. The message names it.
    """
    path = folder / image.path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: an image of the frozen set cannot be read: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != image.sha256:
        raise ValueError(
            f"{path}: an image of the frozen set has changed: its sha256 is {found}, but the list has {image.sha256}"
        )
    return data


def open_frozen_set(
    file: Path,
    folder: Path,
    *,
    labels: bool = True,
    most: int = MOST_IMAGES,
    limits: DecodeLimits | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> FrozenSet:
    """Read the list of a frozen set and check every image. If the list does not exist, choose images and write it.

    Args:
        file: the list.
        folder: the folder with the images. If it has subfolders for training and held-out images, such as `train/` and
            `val/`, they become the index part and the query part. The class of an image is the name of its folder at
            the first level, within its part.
        labels: whether folders are classes. If False, or if there are fewer than two classes, the images have no
            classes. It only affects a new list.
        most: maximum number of images in each part of a new list.
        limits: limits for decoding. Images that cannot be decoded are not chosen.
        tell: called with one line about each image that is left out.

    Raises:
        ValueError: an image of the list is missing or changed, the list cannot be understood, or the folder has fewer
            than two usable images.
        OSError: the list cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(file.with_name(f".{file.name}.lock"), lambda: tell(f"waiting for another process: {file}")):
        if file.exists():
            return read_frozen_set(file, folder)
        frozen = choose_images(folder, labels=labels, most=most, limits=limits, tell=tell)
        write_text(file, frozen.model_dump_json(indent=1) + "\n")
    return frozen


def hold_out(
    file: Path,
    folder: Path,
    least: int,
    *,
    limits: DecodeLimits | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> FrozenSet | None:
    """Read the list of images of a folder that are held out of a training, and check every image. If the list does not
    exist, choose images with `choose_held_out` and write it.

    Args:
        file, folder, limits, tell: as for `open_frozen_set`.
        least: the smallest number of images with which models can be compared.

    Returns:
        the set, or None if the folder has too few images.

    Raises:
        ValueError, OSError: as for `open_frozen_set`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(file.with_name(f".{file.name}.lock"), lambda: tell(f"waiting for another process: {file}")):
        if file.exists():
            return read_frozen_set(file, folder)
        frozen = choose_held_out(folder, least, limits=limits, tell=tell)
        if frozen is not None:
            write_text(file, frozen.model_dump_json(indent=1) + "\n")
    return frozen


def choose_held_out(
    folder: Path,
    least: int,
    *,
    limits: DecodeLimits | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> FrozenSet | None:
    """Choose a tenth of the images of a folder, but at least `least` and at most `MOST_IMAGES`. Return None if this is
    more than a third of the images. The folder is not divided into training images and held-out images.

    Raises:
        ValueError: the folder has fewer than two usable images.
    """
    listed = sorted(_listed(folder, folder, "index", tell), key=_by_hash)
    n_images = len({image.sha256 for image in listed})
    count = min(max(round(HELD_OUT_SHARE * n_images), least, 2), MOST_IMAGES)
    if count > MOST_HELD_OUT_SHARE * n_images:
        return None
    return _choose({"index": listed}, folder, labels=True, most=count, limits=limits or DecodeLimits(), tell=tell)


def copies_of(frozen: FrozenSet, folder: Path, roots: Sequence[Path]) -> list[str]:
    """Return the paths of the files below `roots` that a training must leave out, so that it sees none of the images on
    which models are judged: the queries of a set from `folder`, or all its images if it has no queries. Copies of these
    images under other names belong to them. Files that cannot be read are left to the training."""
    judged = frozen.part("query") or frozen.part("index")
    sizes = {(folder / image.path).stat().st_size for image in judged}
    digests = {image.sha256 for image in judged}
    found = []
    for entry in (entry for root in roots for entry in walk(root) if entry.is_image):
        with suppress(OSError):
            path = Path(entry.path)
            if path.stat().st_size in sizes and _sha256(path) in digests:  # few files need to be read
                found.append(entry.path)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose_images(
    folder: Path,
    *,
    labels: bool = True,
    most: int = MOST_IMAGES,
    limits: DecodeLimits | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> FrozenSet:
    """Choose the images of a frozen set. The arguments are those of `open_frozen_set`.

    Raises:
        ValueError: the folder does not exist, or has fewer than two usable images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    split = split_folders(folder)
    roots: dict[Part, Path] = {"index": folder} if split is None else {"index": split[0], "query": split[1]}
    listed = {part: sorted(_listed(folder, root, part, tell), key=_by_hash) for part, root in roots.items()}
    return _choose(listed, folder, labels=labels, most=most, limits=limits or DecodeLimits(), tell=tell)


def _choose(
    listed: dict[Part, list[FrozenImage]],
    folder: Path,
    *,
    labels: bool,
    most: int,
    limits: DecodeLimits,
    tell: Callable[[str], object],
) -> FrozenSet:
    """Choose up to `most` of the listed images of each part, in their order. The other arguments are those of
    `open_frozen_set`."""
    labels = labels and all(len({image.label for image in images} - {None}) > 1 for images in listed.values())
    if not labels:  # of two parts, the held-out images are used, because the model was not trained on them
        last = listed[list(listed)[-1]]
        listed = {"index": [image.model_copy(update={"label": None, "part": "index"}) for image in last]}
    chosen: list[FrozenImage] = []
    seen: set[str] = set()
    for part, images in listed.items():
        n_before = len(chosen)
        for image in images:
            if len(chosen) - n_before == most:
                break
            if image.sha256 in seen or (labels and image.label is None):
                continue
            if _is_readable(folder, image, limits, tell):
                seen.add(image.sha256)
                chosen.append(image)
        if len(chosen) - n_before < 2:
            where = (
                folder if len(listed) == 1 else f"the {'training' if part == 'index' else 'held-out'} part of {folder}"
            )
            raise ValueError(f"{where}: {len(chosen) - n_before} usable images; a frozen set needs at least two")
    return FrozenSet(images=tuple(chosen))


def _by_hash(image: FrozenImage) -> tuple[str, str]:
    return image.sha256, image.path


def _listed(folder: Path, root: Path, part: Part, tell: Callable[[str], object]) -> Iterator[FrozenImage]:
    """Yield every image below `root`, with its path within `folder` and its class."""
    for entry in walk(root):
        if not entry.is_image:
            if entry.problem is not None:
                tell(f"left out {printable(entry.path)}: {entry.problem}")
            continue
        path = Path(entry.path)
        if printable(entry.path) != entry.path or "\n" in entry.path:  # the list is UTF-8
            tell(f"left out {printable(entry.path)}: the name is not valid text in one line")
            continue
        inside = path.relative_to(root).parts
        try:
            digest = _sha256(path)
        except OSError as error:
            tell(f"left out {printable(entry.path)}: {error.strerror}")
            continue
        label = inside[0] if len(inside) > 1 else None
        yield FrozenImage(path=path.relative_to(folder).as_posix(), sha256=digest, label=label, part=part)


def _is_readable(folder: Path, image: FrozenImage, limits: DecodeLimits, tell: Callable[[str], object]) -> bool:
    try:
        decode(read_image(folder, image), limits)
    except DecodeError as error:
        tell(f"left out {printable(image.path)}: {error}")
        return False
    return True


def read_frozen_set(file: Path, folder: Path) -> FrozenSet:
    """Return the list in a file, after checking every image.

    Raises:
        ValueError: the file is not such a list, or an image is missing or changed.
    """
    try:
        frozen = FrozenSet.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{file}: not the list of a frozen set: {in_words(error)}") from error
    frozen.verify(folder)
    return frozen
