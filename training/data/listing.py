"""List the images of a run, and divide them into training images and held-out images.

Listing reads no image. It comes first, because the settings of a run may depend on the number of its images.
`training.data.run_images.open_data` then reads the listed images.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from training.data.dataset import Classes, Indices, Skipped, Source, Subset, split_indices
from training.data.joined import JoinedSource
from training.data.order import Mixture, Sampling
from training.data.progress import Tally, progress, tell
from training.data.sources import open_source
from training.distributed import World, wait_for_all

INDEX = "index"  # folder in the run's folder, with the indices of tar shards
SAMPLINGS = ("uniform", "balanced")
REPEAT = "to draw its images more often, set data_weights"
TRAIN_ON_SHEETS = "the run would train on its own image sheets"


@dataclass(frozen=True)
class SourceSettings:
    """The settings that select the images of a run, divide them, and give some of them larger shares of the samples.

    `data` contains paths and URLs of images, and `out` is the run's folder. Data that is already divided into training
    images and held-out images keeps its division. From each other source, `seed` selects the share `held_out_share` to
    hold out. `weights` are the relative shares of the sources in the samples. If it is None, every image is drawn
    equally often. If `sampling` is `balanced`, every class is drawn equally often, within each source if there are
    weights. The images whose paths are in the text file `exclude`, one per line, are not used.

    Raises:
        ValueError: there is no source, a source is given twice or is inside another one, the number of weights differs
            from the number of sources, a weight is not a positive number, or `sampling` is unknown.
    """

    data: tuple[str, ...]
    out: Path
    seed: int
    held_out_share: float
    weights: tuple[float, ...] | None = None
    sampling: Sampling = "uniform"
    exclude: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data names no images: give a folder, a .tar or a URL")
        check_different(self.data)
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling={self.sampling!r} must be one of {', '.join(SAMPLINGS)}")
        if self.weights is None:
            return
        if len(self.weights) != len(self.data):
            raise ValueError(
                f"data_weights has {len(self.weights)} numbers for {len(self.data)} sources ({self.named}): give one "
                "number per source"
            )
        for address, weight in zip(self.data, self.weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(f"data_weights: {weight:g} for {address} must be a positive, finite number")

    @property
    def named(self) -> str:
        """Return the paths and URLs of the images as one text for messages."""
        return ", ".join(self.data)


@dataclass(frozen=True)
class Listing:
    """The listed images of a run.

    `source` contains all images, `train` those to train on, and `held_out` those held out for evaluation.
    `train_classes` and `held_out_classes` are the classes of the latter two. `mixture` gives the shares of classes and
    sources in the samples. It is None if every image is drawn equally often.
    """

    settings: SourceSettings
    source: Source
    train: Source
    held_out: Source
    train_classes: Classes
    held_out_classes: Classes
    mixture: Mixture | None = None

    @property
    def n_classes(self) -> int:
        """Return the number of classes of the training images and held-out images."""
        return len(set(_numbers(self.train_classes)) | set(_numbers(self.held_out_classes)))

    @property
    def n_unlabelled(self) -> int:
        """Return the number of training images and held-out images without a class."""
        return sum(int((classes.numbers < 0).sum()) for classes in (self.train_classes, self.held_out_classes))

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Return the images that were found to be unreadable when they were listed. They are not in `source`."""
        return self.source.skipped

    @property
    def ignored(self) -> Mapping[str, int]:
        """Return the number of files that are not images, by kind."""
        return self.source.ignored

    def digest(self, images: str) -> str:
        """Return a sha256 of all that a resumed run must have in common with the images and their order.

        `images` is the digest of the training images. It is returned unchanged if every image is drawn equally often.
        Otherwise the result also covers the groups of images (classes, sources) and their shares.
        """
        if self.mixture is None:
            return images
        digest = hashlib.sha256(images.encode())
        groups, shares = self.mixture.groups()
        for part in (groups.astype("<i8"), shares.astype("<f8")):
            digest.update(part.tobytes())
        return digest.hexdigest()


def _numbers(classes: Classes) -> list[int]:
    return [int(number) for number in np.unique(classes.numbers) if number >= 0]


# Checks


def _folder(address: str) -> Path | None:
    """Return the local folder at an address, or None if the address is something else."""
    path = _local(address)
    return path if path is not None and path.is_dir() else None


def _local(address: str) -> Path | None:
    """Return the local file or folder at an address, or None if there is none."""
    text = address.removeprefix("file://")
    return Path(text).resolve() if "://" not in text and os.path.exists(text) else None


def check_different(data: Sequence[str], name: str = "data=", advice: str = REPEAT) -> None:
    """Check that no source of a run contains another one. Otherwise the run could train on held-out images.

    `name` and `advice` are what messages put before a source, and what the user can do instead of naming it twice.

    Raises:
        ValueError: a source is given twice, or the folder of a source is inside that of another one.
    """
    for i, address in enumerate(data):
        for other in data[:i]:
            paths = _local(address), _local(other)
            if address == other or (paths[0] is not None and paths[0] == paths[1]):
                raise ValueError(f"{name}{address} is given twice; {advice}")
            for inner, outer in ((address, other), (other, address)):
                inside, around = _folder(inner), _folder(outer)
                if inside is not None and around is not None and inside.is_relative_to(around):
                    raise ValueError(f"{name}{inner} is inside {name}{outer}: its images would be used twice")


def check_apart(data: Sequence[str], out: Path, name: str = "data=", use: str = TRAIN_ON_SHEETS) -> None:
    """Check that a run's folder is a local path, and is not inside a folder of the run's images.

    Otherwise the run would train on the images that it writes. `name` and `use` are what the message puts before a
    source, and what would happen.

    Raises:
        ValueError: `out` is a URL, is a folder of images, or is inside one.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):  # `Path` turns s3://bucket into s3:/bucket
        raise ValueError(
            f"out={out} is a URL; out must be a local or mounted folder. Mount the object storage (for example with "
            "mountpoint-s3, gcsfuse or rclone mount), or copy the folder when the run has ended"
        )
    for address in data:
        folder = _folder(address)
        if folder is not None and out.resolve().is_relative_to(folder):
            raise ValueError(f"out={out} is inside {name}{address}: {use}; choose another out")


# Listing


def list_images(settings: SourceSettings, world: World, console: Console) -> Listing:
    """List the images of a run, and divide them into training images and held-out images.

    Every rank must call this function. Rank 0 makes the indices of tar shards in the run's folder, and the other ranks
    read them. Rank 0 also shows the progress, and how weights and balanced sampling share out the samples.

    Raises:
        ValueError: a source cannot be used, or contains no images, or `balanced` sampling finds no classes.
        OSError: a source cannot be reached.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    show = partial(tell, console) if world.is_main else None
    if not world.is_main:
        wait_for_all(world)
    tally = Tally()
    with progress(show, lambda: f"listing images: {tally}"):
        sources = [_opened(address, settings, tally) for address in settings.data]
        splits = [split_indices(source, settings.held_out_share, settings.seed) for source in sources]
        if settings.exclude is not None:
            splits = without_excluded(settings.data, sources, splits, settings.exclude)
    if world.is_main:
        wait_for_all(world)
    source: Source = sources[0]
    train, held_out = splits[0]
    numbers = np.zeros(len(train), np.int64)
    if len(sources) > 1:
        source = joined = JoinedSource(sources)
        train, held_out = (
            np.concatenate([start + split[part] for start, split in zip(joined.starts, splits, strict=True)])
            for part in (0, 1)
        )
        numbers = joined.source_numbers(train)
    classes = source.classes()
    mixture = make_mixture(settings, numbers, classes[train])
    if mixture is not None and show is not None:
        for line in described(mixture):
            show(line)
    return Listing(
        settings, source, Subset(source, train), Subset(source, held_out), classes[train], classes[held_out], mixture
    )


def without_excluded(
    data: Sequence[str], sources: Sequence[Source], splits: Sequence[tuple[Indices, Indices]], file: str
) -> list[tuple[Indices, Indices]]:
    """Return the divisions of the sources without the images whose paths are in the text file `file`, one per line.

    Args:
        data: the addresses of the sources.
        sources: the sources.
        splits: for each source, the numbers of the training images and of the held-out images.
        file: the text file. Relative paths begin at the working folder. Links are not resolved. Empty lines are
            ignored.

    Raises:
        ValueError: the file cannot be read, or a path in it is not an image in one of the folders.
    """
    try:
        lines = Path(file).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"exclude={file} cannot be read: {error}") from error
    excluded = {os.path.abspath(line) for line in lines if line}
    found, kept = set[str](), []
    for address, source, split in zip(data, sources, splits, strict=True):
        is_used = np.ones(len(source), bool)
        if _folder(address) is not None:
            start = os.path.join(os.path.abspath(address.removeprefix("file://")), "")
            paths = [start + source.name(index) for index in range(len(source))]
            is_used = np.array([path not in excluded for path in paths], bool)
            found |= excluded.intersection(paths)
        kept.append((split[0][is_used[split[0]]], split[1][is_used[split[1]]]))
    if missing := sorted(excluded - found):
        raise ValueError(
            f"exclude={file}: {len(missing)} of {len(excluded)} paths are not images in a folder of the run's data: "
            f"{missing[0]}"
        )
    return kept


def _opened(address: str, settings: SourceSettings, tally: Tally) -> Source:
    """Open one source. If there are several sources, the message of an error names the source.

    Raises:
        ValueError: the source cannot be used, or contains no images.
        OSError: the source cannot be reached.
    """
    try:
        return open_source(address, settings.out / INDEX, tally)
    except ValueError as error:
        if len(settings.data) == 1 or address in str(error):
            raise
        raise ValueError(f"data={address}: {error}") from error


def make_mixture(settings: SourceSettings, sources: Indices, classes: Classes) -> Mixture | None:
    """Return the rule by which sources and classes share the samples, or None if every image is drawn equally often.

    Args:
        settings: the weights of the sources and the kind of sampling.
        sources: number of each training image's source, [n].
        classes: the classes of the training images.

    Raises:
        ValueError: `sampling` is `balanced`, and the training images have fewer than two classes.
    """
    weights = settings.weights if len(settings.data) > 1 else None
    balanced = settings.sampling == "balanced"
    if balanced and len(np.unique(classes.numbers)) < 2:
        n = len(_numbers(classes))
        raise ValueError(
            f"sampling=balanced needs images of at least two classes, but the training images in {settings.named} have "
            f"{n or 'no'} class{'es' * (n != 1)}; a class is a subfolder with images"
        )
    if not balanced and weights is None:
        return None
    return Mixture(settings.data, sources.astype(np.int32), classes.numbers, weights, balanced)


def described(mixture: Mixture) -> list[str]:
    """Return lines for the user that say how sources and classes share the samples of an epoch."""
    lines = []
    n = len(mixture)
    if mixture.weights is not None:
        shares = np.array(mixture.weights) / sum(mixture.weights)
        counts = np.bincount(mixture.sources, minlength=len(shares))
        parts = [
            f"{100 * share:.0f} % from {name} ({count:,} images, each {share * n / count:.2g} times per epoch)"
            for name, share, count in zip(mixture.names, shares, counts, strict=True)
        ]
        lines.append("shares of the samples: " + ", ".join(parts))
    if mixture.balanced:
        groups, shares = mixture.groups()
        most = (shares * n / np.bincount(groups)).max()
        n_classes, n_without = len(np.unique(mixture.classes)), int((mixture.classes < 0).sum())
        without = f"; images without a class ({n_without:,}) count as one class" if n_without else ""
        within = " of a source" if mixture.weights is not None else ""
        lines.append(
            f"sampling=balanced: {n_classes - bool(n_without):,} classes; all classes{within} are drawn equally often, "
            f"an image of the smallest class about {most:.2g} times per epoch{without}"
        )
    return lines
