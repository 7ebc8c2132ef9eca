"""The images of one run: training images, held-out images for evaluation, and a list of the unreadable images.

`training/data/listing.py` lists the images first, because the settings of a run may depend on their number.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from model.cpus import available_cpus
from model.decode import Pixels
from model.files import write_text
from model.folder import Account
from training.data.dataset import Photo, Skipped, Source
from training.data.listing import Listing
from training.data.loader import Loader, Reading, open_loader, shuffled
from training.data.sources import source_digest
from training.distributed import World, from_main

KNN_PHOTOS = 50_000  # maximum number of training images that k-NN searches; it takes minutes on a GPU
ASKED_PHOTOS = 10_000  # maximum number of images that k-NN classifies; its accuracy is then known to half a percent
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
    """A held-out image. If it cannot be read, its name and the reason are added to `broken`."""

    broken: dict[str, str] = field(compare=False, repr=False)

    def read(self) -> Pixels:
        try:
            return super().read()
        except ValueError as error:
            self.broken[self.name] = str(error)
            raise


@dataclass
class Data:
    """The images of a run.

    `loader` loads the training images. k-NN classifies the images in `held_out` by their neighbours in `train_sample`,
    a sample of the training images. `digest` is a sha256 that identifies the training images, and `source` is the path
    or URL of the data. `held_out_broken` maps the names of unreadable held-out images to the reasons.
    """

    loader: Loader
    train_sample: list[Photo]
    held_out: Sequence[Photo]
    digest: str
    source: str
    held_out_broken: dict[str, str] = field(default_factory=dict)
    _n_listed: int = 0  # number of the loader's unreadable images that `unlisted` has already returned
    _n_held_out_listed: int = 0  # the same number for held-out images

    @property
    def has_classes(self) -> bool:
        """Return whether k-NN classification is possible.

        This needs at least two different labels in `train_sample`, and a held-out image with one of them.
        """
        labels = {photo.label for photo in self.train_sample} - {None}
        return len(labels) > 1 and any(photo.label in labels for photo in self.held_out)

    def check_same(self, digest: str) -> None:
        """Check that a saved run used the same images, because a resumed run must use them in the same order.

        Raises:
            ValueError: `digest`, which the run saved, differs from the digest of these images.
        """
        if digest != self.digest:
            raise ValueError(
                f"the images in {self.source} differ from those that this run started with: files were added, removed "
                "or changed; choose another out folder, or remove this one to start again"
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
    out, seed, batch_size = listing.settings.out, listing.settings.seed, settings.batch_size
    per_rank = share_of_a_batch(batch_size, world.size, settings.micro_batches)
    if len(listing.train) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(listing.train)} images to train on")
    share = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    workers = settings.reading.workers or max(1, available_cpus() // world.on_machine)
    loader = open_loader(
        listing.train,
        settings.side,
        shuffled(batch_size, seed, share),
        cache_bytes=settings.cache_bytes,
        reading=replace(settings.reading, workers=workers),
        device=world.device,
    )
    with loader:
        if len(loader) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {len(loader)} readable images")
        digest = from_main(world, source_digest(loader.source, contents=loader.in_memory) if world.is_main else "")
        broken: dict[str, str] = {}
        asked = [HeldOut(photo.source, photo.index, broken) for photo in sample(listing.held_out, ASKED_PHOTOS)]
        data = Data(loader, sample(loader.source, KNN_PHOTOS), asked, digest, listing.settings.named, broken)
        if world.is_main:
            list_skipped([*listing.skipped, *data.unlisted()], out, console)
        try:
            yield data
        finally:  # also if too many broken images have ended the run
            if world.is_main:
                list_skipped(data.unlisted(), out, console)
                n_asked = len(asked) if data.has_classes else 0
                account = account_of(listing.source, len(listing.train), len(listing.held_out), n_asked, out)
                console.print(str(account), markup=False, highlight=False, soft_wrap=True)


def account_of(source: Source, n_train: int, n_held_out: int, n_asked: int, out: Path) -> Account:
    """Return how many files of a run were used, ignored and failed.

    Args:
        source: the source of all images, including the held-out images.
        n_train: number of images to train on.
        n_held_out: number of held-out images.
        n_asked: number of held-out images that k-NN classifies. The others are not read.
        out: the run's folder, which may contain `skipped.txt`.
    """
    account = Account(ignored=Counter(source.ignored))
    listing = out / "skipped.txt"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        account.fail(*line.partition(": ")[::2])
    account.used = n_train + n_asked - (account.failed - len({item.name for item in source.skipped}))
    others = {
        "held out but not read": n_held_out - n_asked,
        "outside the training and held-out parts": len(source) - n_train - n_held_out,
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
    console.print(
        f"{len(skipped)} images could not be read and are skipped. They are listed in {listing}. The first ones:"
    )
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False)
