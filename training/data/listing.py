"""List the images of a run, and divide them into training images and held-out images.

Listing reads no image. It comes first, because the settings of a run may depend on the number of its images.
`training.data.run_images.open_data` then reads the listed images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from training.data.dataset import Skipped, Source, split_source
from training.data.sources import open_source
from training.distributed import World, wait_for_all

INDEX = "index"  # folder in the run's folder, with the indices of tar shards


@dataclass(frozen=True)
class SourceSettings:
    """The settings that select the images of a run, and divide them into training images and held-out images.

    `data` contains paths and URLs of images, and `out` is the run's folder. `seed` selects the share `held_out_share`
    of the images to hold out, unless the data is already divided.
    """

    data: tuple[str, ...]
    out: Path
    seed: int
    held_out_share: float

    @property
    def named(self) -> str:
        """Return the paths and URLs of the images as one text for messages."""
        return ", ".join(self.data)


@dataclass(frozen=True)
class Listing:
    """The listed images of a run.

    `source` contains all images, `train` those to train on, and `held_out` those held out for evaluation.
    """

    settings: SourceSettings
    source: Source
    train: Source
    held_out: Source

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Return the images that were found to be unreadable when they were listed. They are not in `source`."""
        return self.source.skipped

    @property
    def ignored(self) -> Mapping[str, int]:
        """Return the number of files that are not images, by kind."""
        return self.source.ignored


def check_apart(data: Sequence[str], out: Path) -> None:
    """Check that a run's folder is not inside a folder of its images.

    Otherwise the run would train on the images that it writes.

    Raises:
        ValueError: `out` is a folder of images, or is inside it.
    """
    for address in data:
        folder = Path(address.removeprefix("file://"))
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"out={out} is inside data={address}: the run would train on its own image sheets; choose another out"
            )


def list_images(settings: SourceSettings, world: World, console: Console) -> Listing:
    """List the images of a run, and divide them into training images and held-out images.

    Every rank must call this function. Rank 0 makes the indices of tar shards in the run's folder, and the other ranks
    read them.

    Raises:
        ValueError: the data cannot be used, or contains no images.
        OSError: the data cannot be reached.
    """
    if len(settings.data) != 1:
        raise ValueError(f"data has {len(settings.data)} sources ({settings.named}); give one")
    settings.out.mkdir(parents=True, exist_ok=True)
    if not world.is_main:
        wait_for_all(world)
    source = open_source(settings.data[0], settings.out / INDEX)
    if world.is_main:
        wait_for_all(world)
    train, held_out = split_source(source, settings.held_out_share, settings.seed)
    return Listing(settings, source, train, held_out)
