"""The images of one run: training images, held-out images for evaluation, and a list of the unreadable images."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from model.cpus import available_cpus
from model.files import write_text
from training.data.dataset import Photo, Skipped, Source, split_source
from training.data.loader import Loader, Reading, open_loader, shuffled
from training.data.sources import open_source, source_digest
from training.distributed import World, from_main, wait_for_all

KNN_PHOTOS = 50_000  # limit on the training images that k-NN searches; takes minutes on a GPU
INDEX = "index"  # folder of the tar shards' index, in the run's folder
ASKED_PHOTOS = 10_000  # limit on the held-out images that k-NN classifies; accurate to half a percent
SHOWN = 5  # unreadable images shown on the screen; skipped.txt lists all


@dataclass(frozen=True)
class ImageSettings:
    """Where a run's images are, how they are split, and how they are read.

    `micro_batches` has the sizes of micro-batches by the name of their setting (None: the setting is not used). A
    rank's share of a batch must be a multiple of each size.
    """

    data: str
    out: Path
    seed: int
    batch_size: int
    micro_batches: Mapping[str, int | None]
    held_out_share: float
    side: int  # side of the squares that images are stored as, pixels
    cache_bytes: int
    reading: Reading


@dataclass
class Data:
    """The images of a run.

    `loader` has the training images. k-NN searches `train_sample`, a sample of them, and classifies `held_out`.
    `digest` identifies the training images, and `source` is the path or URL of the data.
    """

    loader: Loader
    train_sample: list[Photo]
    held_out: list[Photo]
    digest: str
    source: str
    _n_listed: int = 0  # how many of the loader's unreadable images are listed already

    @property
    def has_classes(self) -> bool:
        """Return whether k-NN is possible: there are held-out images, and the sample has at least two labels."""
        return bool(self.held_out) and len({photo.label for photo in self.train_sample} - {None}) > 1

    def check_same(self, digest: str) -> None:
        """Refuse to resume a run with other images, because a resumed run must continue their order.

        Raises:
            ValueError: `digest`, that of the saved run's images, differs from the digest of these images.
        """
        if digest != self.digest:
            raise ValueError(
                f"the images in {self.source} are not those of the run so far: files were added, removed or changed; "
                "choose another out folder, or remove this one to start again"
            )

    def unlisted(self) -> Sequence[Skipped]:
        """Return the images that were found to be unreadable since the last call."""
        skipped = self.loader.skipped[self._n_listed :]
        self._n_listed += len(skipped)
        return skipped


def check_apart(data: str, out: Path) -> None:
    """Refuse a run's folder inside the folder of its images, because the run would train on its own image sheets.

    Raises:
        ValueError: `out` is the folder of the images, or is inside it.
    """
    folder = Path(data.removeprefix("file://"))
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={out} is inside data={data}: its image sheets would be trained on; choose another out")


@contextmanager
def open_data(settings: ImageSettings, world: World, console: Console) -> Iterator[Data]:
    """Open the images of a run. Unreadable images are listed in `skipped.txt` and counted on the screen.

    Raises:
        ValueError: there are no images, none is readable, or there are fewer images than a batch needs.
        OSError: the images cannot be reached.
    """
    out, batch_size = settings.out, settings.batch_size
    out.mkdir(parents=True, exist_ok=True)
    per_rank = share_of_a_batch(batch_size, world.size, settings.micro_batches)
    if not world.is_main:
        wait_for_all(world)  # rank 0 makes the shards' index, and the others read it
    source = open_source(settings.data, out / INDEX)
    if world.is_main:
        wait_for_all(world)
    train, held_out = split_source(source, settings.held_out_share, settings.seed)
    if len(train) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(train)} images to train on")
    share = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    workers = settings.reading.workers or max(1, available_cpus() // world.on_machine)
    loader = open_loader(
        train,
        settings.side,
        shuffled(batch_size, settings.seed, share),
        cache_bytes=settings.cache_bytes,
        reading=replace(settings.reading, workers=workers),
        device=world.device,
    )
    with loader:
        if len(loader) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {len(loader)} readable images")
        digest = from_main(world, source_digest(loader.source, contents=loader.in_memory) if world.is_main else "")
        data = Data(loader, sample(loader.source, KNN_PHOTOS), sample(held_out, ASKED_PHOTOS), digest, settings.data)
        if world.is_main:
            list_skipped([*source.skipped, *data.unlisted()], out, console)
        try:
            yield data
        finally:  # too many broken images may have ended the run
            if world.is_main:
                list_skipped(data.unlisted(), out, console)


def share_of_a_batch(batch_size: int, n_ranks: int, micro_batches: Mapping[str, int | None]) -> int:
    """Return the number of images that one rank gets of each batch.

    Raises:
        ValueError: the batch cannot be split evenly over the ranks, or a rank's share evenly into micro-batches.
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
    """Add unreadable images to `skipped.txt` in the folder `out`, and print their number and the first of them."""
    if not skipped:
        return
    listing = out / "skipped.txt"
    listed = listing.read_text().splitlines() if listing.exists() else []
    lines = [f"{item.name}: {item.reason}".replace(os.linesep, " ") for item in skipped]
    write_text(listing, "".join(line + "\n" for line in dict.fromkeys(listed + lines)))
    console.print(f"{len(skipped)} images could not be read and are skipped, listed in {listing}; the first:")
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False)
