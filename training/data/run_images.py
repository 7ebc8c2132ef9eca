"""The images of one run: training images, held-out images for evaluation, and a list of the unreadable images.

`training/data/listing.py` lists the images first, because the settings of a run may depend on their number.
"""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from model.cpus import available_cpus
from model.decode import Pixels
from model.files import write_text
from model.folder import Account
from training.data.batches import Loader, Plan, Reading, shuffled
from training.data.dataset import Classes, Photo, Skipped, Source
from training.data.listing import Listing
from training.data.loader import open_loader
from training.data.order import MixedPlan
from training.data.progress import tell
from training.data.sources import source_digest
from training.distributed import World, from_main

KNN_PHOTOS = 50_000  # maximum number of training images that k-NN searches; it takes minutes on a GPU
ASKED_PHOTOS = 10_000  # maximum number of held-out images to read; k-NN's accuracy is then known to half a percent
SHOWN = 5  # unreadable images shown on the screen; skipped.txt lists all


@dataclass(frozen=True)
class ImageSettings:
    """The settings with which a run divides its images into batches and reads them.

    `micro_batches` maps the name of each setting for a micro-batch size to its value, or to None if it is not used. The
    number of images per rank and batch must be a multiple of each of these sizes.
    """

    batch_size: int
    micro_batches: Mapping[str, int | None]
    side: int  # side of the squares that images are stored as, pixels
    cache_bytes: int
    reading: Reading


@dataclass(frozen=True)
class HeldOut(Photo):
    """A held-out image. Its number is added to `tried` when it is read.

    If it cannot be read, its name and the reason are added to `broken`.
    """

    broken: dict[str, str] = field(compare=False, repr=False)
    tried: set[int] = field(compare=False, repr=False)

    def read(self) -> Pixels:
        self.tried.add(self.index)
        try:
            return super().read()
        except ValueError as error:
            self.broken[self.name] = str(error)
            raise


@dataclass
class Data:
    """The images of a run.

    `loader` loads the training images. `train_sample` and `held_out` are samples of the training images and of the
    held-out images, with and without classes. k-NN classifies the images in `labelled_held_out` by their neighbours in
    `labelled_train_sample`. All images in these two samples have classes. `digest` is a sha256 that identifies the
    training images and their order. `source` contains the paths and URLs of the data, and `out` is the run's folder.
    `divided` is True if the user has held out the held-out images, in a folder or split named `val`.
    `held_out_broken` maps the names of unreadable held-out images to the reasons.
    """

    loader: Loader
    train_sample: list[Photo]
    held_out: Sequence[Photo]
    labelled_train_sample: Sequence[Photo]
    labelled_held_out: Sequence[Photo]
    digest: str
    source: str
    out: Path
    divided: bool = False
    held_out_broken: dict[str, str] = field(default_factory=dict)
    _n_listed: int = 0  # number of the loader's unreadable images that `unlisted` has already returned
    _n_held_out_listed: int = 0  # the same number for held-out images

    @property
    def has_classes(self) -> bool:
        """Return whether k-NN classification is possible."""
        return self.why_no_classes is None

    @property
    def why_no_classes(self) -> str | None:
        """Return the reason why k-NN classification is not possible, or None if it is possible.

        k-NN needs training images of at least two classes, and a held-out image of one of these classes.
        """
        if not self.held_out:
            return "no images are held out"
        known = {photo.label for photo in self.labelled_train_sample}
        if len(known) < 2:
            return f"the training images have {'one class' if known else 'no classes'}"
        if not self.labelled_held_out:
            return "the held-out images have no classes"
        if known.isdisjoint(photo.label for photo in self.labelled_held_out):
            return "the held-out images and the training images have no class in common"
        return None

    def check_same(self, digest: str) -> None:
        """Check that a saved run used the same images, because a resumed run must use them in the same order.

        Raises:
            ValueError: `digest`, which the run saved, differs from the digest of these images.
        """
        if digest != self.digest:
            raise ValueError(
                f"the images in {self.source} differ from those that this run started with: files were added, removed "
                f"or changed. To continue with the new images, choose another out folder and add init={self.out}. To "
                f"start again, choose another out folder or remove {self.out}"
            )

    def unlisted(self) -> Sequence[Skipped]:
        """Return the unreadable images that were found since this method was last called."""
        skipped = self.loader.skipped[self._n_listed :]
        self._n_listed += len(skipped)
        held_out = [Skipped(*item) for item in self.held_out_broken.items()][self._n_held_out_listed :]
        self._n_held_out_listed += len(held_out)
        return [*skipped, *held_out]


@contextmanager
def open_data(listing: Listing, settings: ImageSettings, world: World, console: Console) -> Iterator[Data]:
    """Open the listed images of a run for the duration of a `with` block.

    Unreadable images are listed in `skipped.txt` in the run's folder, and their number is printed on the console. At
    the end, one line with the numbers of used, ignored and failed files is printed.

    Raises:
        ValueError: too many images are unreadable, there are fewer images than one batch contains, or a batch cannot be
            split evenly over ranks and micro-batches.
        OSError: the images cannot be reached.
    """
    out, batch_size = listing.settings.out, settings.batch_size
    per_rank = share_of_a_batch(batch_size, world.size, settings.micro_batches)
    if len(listing.train) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(listing.train)} images to train on")
    workers = settings.reading.workers or max(1, available_cpus() // world.on_machine)
    show = partial(tell, console) if world.is_main else None
    loader = open_loader(
        listing.train,
        settings.side,
        make_plan(listing, batch_size, world, per_rank),
        cache_bytes=settings.cache_bytes,
        reading=replace(settings.reading, workers=workers),
        device=world.device,
        tell=show,
    )
    with loader:
        if len(loader) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {len(loader)} readable images")
        images = source_digest(loader.source, contents=loader.in_memory, tell=show) if world.is_main else ""
        data, tried = make_data(listing, loader, listing.digest(from_main(world, images)))
        if world.is_main:
            list_skipped([*listing.skipped, *data.unlisted()], out, console)
        try:
            yield data
        finally:  # also if too many broken images have ended the run
            if show is not None:
                list_skipped(data.unlisted(), out, console)
                show(str(account_of(listing, tried, out)))


def make_plan(listing: Listing, batch_size: int, world: World, per_rank: int) -> Plan:
    """Return the plan of a run's loader, which selects `per_rank` images of each batch for this rank."""
    share = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    if listing.mixture is None:
        return shuffled(batch_size, listing.settings.seed, share)
    return MixedPlan(listing.mixture, batch_size, listing.settings.seed, share)


def make_data(listing: Listing, loader: Loader, digest: str) -> tuple[Data, set[int]]:
    """Return the images of a run, and the set to which the numbers of held-out images are added when they are read."""
    broken: dict[str, str] = {}
    tried: set[int] = set()

    def held_out(photos: Sequence[Photo]) -> list[Photo]:
        return [HeldOut(photo.source, photo.index, broken, tried) for photo in photos]

    classes = listing.train_classes if loader.source is listing.train else loader.source.classes()
    asked = np.flatnonzero(listing.held_out_classes.numbers >= 0)
    data = Data(
        loader,
        sample(loader.source, KNN_PHOTOS),
        held_out(sample(listing.held_out, ASKED_PHOTOS)),
        sample_of_classes(loader.source, classes, KNN_PHOTOS),
        held_out([Photo(listing.held_out, int(i)) for i in asked[:: max(1, -(-len(asked) // ASKED_PHOTOS))]]),
        digest,
        listing.settings.named,
        out=listing.settings.out,
        held_out_broken=broken,
        divided={"train", "val"} <= set(listing.source.parts),
    )
    return data, tried


def account_of(listing: Listing, tried: set[int], out: Path) -> Account:
    """Return how many files of a run were used, ignored and failed.

    Args:
        listing: the listed images.
        tried: numbers of the held-out images that this process has read or tried to read.
        out: the run's folder, which may contain `skipped.txt`.
    """
    account = Account(ignored=Counter(listing.ignored))
    lines = (out / "skipped.txt").read_text().splitlines() if (out / "skipped.txt").exists() else []
    failed = dict(line.partition(": ")[::2] for line in lines)
    for name, reason in failed.items():
        account.fail(name, reason)
    # Held-out images may also have failed in an earlier process of the same run.
    failed_before = {i for i in range(len(listing.held_out)) if listing.held_out.name(i) in failed} if failed else set()
    n_held_out = len(tried | failed_before)
    n_train = len(listing.train)
    account.used = n_train + n_held_out - (account.failed - len({item.name for item in listing.skipped}))
    others = {
        "held out but not read": len(listing.held_out) - n_held_out,
        "outside the training and held-out parts": len(listing.source) - n_train - len(listing.held_out),
    }
    account.ignored.update({kind: n for kind, n in others.items() if n})
    return account


def share_of_a_batch(batch_size: int, n_ranks: int, micro_batches: Mapping[str, int | None]) -> int:
    """Return how many images of each batch go to one rank.

    `micro_batches` maps the name of each setting for a micro-batch size to its value, or to None if it is not used.

    Raises:
        ValueError: the batch cannot be split evenly over the ranks, or the images of a rank cannot be split evenly into
            micro-batches.
    """
    per_rank, rest = divmod(batch_size, n_ranks)
    for name, size in micro_batches.items():
        if rest or (size and per_rank % size):
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of {n_ranks} ranks"
                + (f" times {name}={size}" if size else "")
            )
    return per_rank


def sample(source: Source, most: int) -> list[Photo]:
    """Return every k-th image of a source, with the smallest k that gives at most `most` images."""
    return [Photo(source, i) for i in range(0, len(source), max(1, -(-len(source) // most)))]


def sample_of_classes(source: Source, classes: Classes, most: int) -> list[Photo]:
    """Return at most `most` of the images that have a class: every k-th image of each class, and at least one.

    k is the smallest number that gives at most `most` images. If there are more classes than that, every k-th image
    that has a class is returned, so that classes are missing.
    """
    labelled = np.flatnonzero(classes.numbers >= 0)
    if not len(labelled):
        return []
    by_class = labelled[np.argsort(classes.numbers[labelled], kind="stable")]
    sizes = np.bincount(classes.numbers[labelled])
    if np.count_nonzero(sizes) > most:
        chosen = labelled[:: -(-len(labelled) // most)]
    else:
        k = bisect_left(range(1, sizes.max() + 1), True, key=lambda k: (-(-sizes // k)).sum() <= most) + 1
        place = np.arange(len(by_class)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of an image in its class
        chosen = np.sort(by_class[place % k == 0])
    return [Photo(source, int(i)) for i in chosen]


def list_skipped(skipped: Sequence[Skipped], out: Path, console: Console) -> None:
    """Add unreadable images to the list `skipped.txt` in the folder `out`, and print how many there are.

    The names of the first few are also printed, each with the reason why it could not be read.
    """
    if not skipped:
        return
    listing = out / "skipped.txt"
    listed = listing.read_text().splitlines() if listing.exists() else []
    lines = [f"{item.name}: {item.reason}".replace(os.linesep, " ") for item in skipped]
    write_text(listing, "".join(line + "\n" for line in dict.fromkeys(listed + lines)))
    first = f"{len(skipped)} images could not be read and are skipped. They are listed in {listing}. The first ones:"
    tell(console, first, *(f"  {line}" for line in lines[:SHOWN]))
