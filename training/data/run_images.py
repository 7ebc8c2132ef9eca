"""The photos of one run: what is trained on, what is kept for the evaluation, what could not be read."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from model.cpus import available_cpus
from model.files import write_text
from training.config import TrainConfig
from training.data.dataset import Photo, Skipped, Source, split_source
from training.data.loader import Loader, open_loader, shuffled
from training.data.sources import open_source, source_digest
from training.distributed import World, from_main, wait_for_all

KNN_PHOTOS = 50_000  # of the training photos: enough neighbours, and minutes on a GPU
INDEX = "index"  # of tar shards, in the run's folder
ASKED_PHOTOS = 10_000  # of the held-out ones: half a percent of accuracy
SHOWN = 5  # unreadable photos on the screen; all are in skipped.txt


@dataclass
class Data:
    """`known` are training photos that k-NN looks among, `digest` tells this data from other."""

    loader: Loader
    known: list[Photo]
    held_out: list[Photo]
    digest: str
    source: str
    _n_listed: int = 0  # of the loader's unreadable photos

    @property
    def has_classes(self) -> bool:
        """Whether there is something to classify: held-out photos, and more than one label."""
        return bool(self.held_out) and len({photo.label for photo in self.known} - {None}) > 1

    def check_same(self, digest: str) -> None:
        """Refuse to go on with other photos: their order is part of what a resumed run repeats.

        Raises:
            ValueError: the run's state was made with others.
        """
        if digest != self.digest:
            raise ValueError(
                f"the photos in {self.source} are not those of the run so far: files were added, removed or changed; "
                "choose another out folder, or remove this one to start anew"
            )

    def unlisted(self) -> Sequence[Skipped]:
        """Unreadable photos found since the last call."""
        found = self.loader.skipped[self._n_listed :]
        self._n_listed += len(found)
        return found


def check_apart(data: str, out: Path) -> None:
    """Refuse a run's folder among the photos: its picture sheets would be trained on.

    Raises:
        ValueError: `out` is the folder of the photos, or lies in it.
    """
    folder = Path(data.removeprefix("file://"))
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={out} lies in data={data}: its pictures would be taken for photos; choose another out")


@contextmanager
def open_data(config: TrainConfig, world: World, console: Console) -> Iterator[Data]:
    """Open the data of a run; unreadable photos are listed in `skipped.txt` and counted on the screen.

    Raises:
        ValueError: no data there, none readable, or fewer photos than a batch has.
        OSError: the place of the photos does not answer.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    per_rank, rest = divmod(config.batch_size, world.size)
    parts = {"micro_batch": config.micro_batch}
    if config.last_phase is not None:
        parts["last_phase.micro_batch"] = config.last_phase.micro_batch
    for name, size in parts.items():
        if rest or (size and per_rank % size):
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of {world.size} ranks"
                + (f" times {name}={size}" if size else "")
            )
    if not world.is_main:
        wait_for_all(world)  # rank 0 makes the shards' index, the others read it
    source = open_source(config.data, config.out / INDEX)
    if world.is_main:
        wait_for_all(world)
    train, held_out = split_source(source, config.held_out_share, config.seed)
    if len(train) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} is more than the {len(train)} photos to train on")
    share = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    loader = open_loader(
        train,
        config.cache_size,
        shuffled(config.batch_size, config.seed, share),
        cache_bytes=config.cache_bytes,
        workers=config.workers or max(1, available_cpus() // world.on_machine),
        ahead_steps=config.ahead_steps,
        ahead_bytes=config.ahead_bytes,
        max_broken_share=config.max_broken_share,
        device=world.device,
    )
    with loader:
        if len(loader) < config.batch_size:
            raise ValueError(f"batch_size={config.batch_size} is more than the {len(loader)} readable photos")
        digest = from_main(world, source_digest(loader.source, contents=loader.in_memory) if world.is_main else "")
        known, asked = (sample(part, most) for part, most in ((loader.source, KNN_PHOTOS), (held_out, ASKED_PHOTOS)))
        data = Data(loader, known, asked, digest, config.data)
        if world.is_main:
            list_skipped([*source.skipped, *data.unlisted()], config.out, console)
        try:
            yield data
        finally:  # what ends the run may be that so many are broken
            if world.is_main:
                list_skipped(data.unlisted(), config.out, console)


def sample(source: Source, most: int) -> list[Photo]:
    """All photos of a source, or at most so many of them, evenly taken."""
    return [Photo(source, i) for i in range(0, len(source), max(1, -(-len(source) // most)))]


def list_skipped(skipped: Sequence[Skipped], out: Path, console: Console) -> None:
    """Write unreadable photos to `skipped.txt`, and the first few to the screen."""
    if not skipped:
        return
    listing = out / "skipped.txt"
    known = listing.read_text().splitlines() if listing.exists() else []
    lines = [f"{item.name}: {item.reason}".replace(os.linesep, " ") for item in skipped]
    write_text(listing, "".join(line + "\n" for line in dict.fromkeys(known + lines)))
    console.print(f"{len(skipped)} photos could not be read and are skipped, listed in {listing}; the first:")
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False)
