"""The stage `write`: divide the kept images into training and held-out images, and write the dataset."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model.files import write_text
from training.curate.drops import Drop
from training.curate.listing import digest_of
from training.curate.manifest import read_restored, with_restored
from training.curate.outcome import Outcome, split
from training.curate.progress import Track
from training.curate.rows import read_problems
from training.curate.scan import Scanned
from training.curate.settings import CurateSettings
from training.curate.table import Indices
from training.curate.tars import WriteSettings
from training.curate.write import write
from training.data.curated import open_curation

NAME: Final = "write"
VERSION: Final = "1"


@dataclass(frozen=True)
class Written:
    """A written dataset: the digest of its images, the number of images of each part, and whether it is new."""

    digest: str
    counts: dict[str, int]
    n_restored: int
    is_new: bool
    marker: Path


def write_dataset(
    scanned: Scanned,
    kept: Indices,
    drops: Sequence[Drop],
    sources: Sequence[str],
    settings: CurateSettings,
    out: Path,
    folder: Path,
    track: Track,
) -> Written:
    """Write the dataset, unless it is complete and nothing has changed that it depends on.

    Args:
        scanned: the scan of all images.
        kept: the numbers of the images that all stages keep, in ascending order.
        drops: the decisions of all stages. They number the images of the scan.
        sources: the addresses of the images.
        settings: all settings.
        out: the folder of the dataset.
        folder: the folder in which the results of stages are stored.
        track: shows the progress.

    Raises:
        ValueError: no image is kept, `out` contains other images, or an image has changed since the scan.
        OSError: the disk is full, or reading or writing failed. Complete shards are kept for the next try.
    """
    section = settings.write
    images, problems = scanned.images, read_problems(scanned.folder)
    all_kept, restored = with_restored(images, kept, read_restored(out))
    held_out = split(images, all_kept, drops, section.held_out_share, settings.seed)
    outcome = Outcome(images, all_kept, held_out, drops, restored, problems, sources)
    inputs = digest_of(
        VERSION,
        scanned.digest,
        json.dumps([settings.seed, section.model_dump(mode="json"), list(sources)], sort_keys=True),
        *(hashlib.sha256(numbers.astype("<i8").tobytes()).digest() for numbers in (all_kept, held_out)),
        *(text for drop in drops for text in (str(drop.index), drop.stage, drop.reason, str(drop.because))),
    )
    marker = folder / f"{NAME}-{inputs[:32]}.json"
    is_new = not (marker.exists() and _is_complete(out))
    if is_new:
        form = WriteSettings(**section.model_dump(exclude={"held_out_share"}))
        with track("write", len(all_kept)) as advance:
            digest = write(outcome, scanned.encoded, out, form, done=advance)
        counts = {"train": len(outcome.train), "val": len(held_out)}
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{NAME}-*.json"):
            old.unlink()
        write_text(marker, json.dumps({"stage": NAME, "digest": digest, "counts": counts}, indent=1) + "\n")
    facts = json.loads(marker.read_text())
    return Written(facts["digest"], facts["counts"], len(restored), is_new, marker)


def _is_complete(out: Path) -> bool:
    """Return whether the files of the dataset in a folder are complete. See `open_curation`."""
    try:
        return open_curation(out) is not None
    except ValueError:
        return False
