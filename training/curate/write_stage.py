"""The stage `write`: divide the kept images into training and held-out images, and write the dataset.

If the leaks of evaluation images were removed, a certificate says so. There is none if the user has restored an image
that was not compared with the evaluation images, or that is a leak.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from model.files import write_text
from training.curate.certificate import make_certificate, write_certificate
from training.curate.copy_stages import COUNTS, EVALUATION
from training.curate.drops import Drop
from training.curate.leaks import STAGE as LEAKS
from training.curate.leaks import Leaks
from training.curate.listing import digest_of
from training.curate.manifest import read_restored, with_restored
from training.curate.outcome import Outcome, split
from training.curate.progress import Track
from training.curate.report import write_report
from training.curate.rows import read_problems
from training.curate.scan import Scanned
from training.curate.settings import STAGES, CurateSettings
from training.curate.stages import POOL, Stored
from training.curate.table import Indices, Pixels
from training.curate.tars import WriteSettings
from training.curate.write import WriteFile, write, write_description
from training.data.curated import CURATION, open_curation, read_curation

NAME: Final = "write"
VERSION: Final = "2"
REPORT: Final = "report.html"
CERTIFICATE: Final = "leak-certificate.json"


@dataclass(frozen=True)
class WriteTask:
    """What is to be written.

    scanned: the scans by role.
    kept: the numbers of the images that all stages keep, in ascending order.
    results: the results of the stages, by name, in their order.
    sources: the addresses of the images.
    settings: all settings.
    out: the folder of the dataset.
    folder: the folder in which the results of stages are stored.
    model: the fingerprint of the model.
    """

    scanned: Mapping[str, Scanned]
    kept: Indices
    results: Mapping[str, Stored]
    sources: Sequence[str]
    settings: CurateSettings
    out: Path
    folder: Path
    model: str

    def outcome(self) -> Outcome:
        """Return what becomes of each image."""
        pool, settings = self.scanned[POOL], self.settings
        drops = [drop for stored in self.results.values() for drop in stored.drops]
        kept, restored = with_restored(pool.images, self.kept, read_restored(self.out))
        held_out = split(pool.images, kept, drops, settings.write.held_out_share, settings.seed)
        return Outcome(pool.images, kept, held_out, drops, restored, read_problems(pool.folder), self.sources)


@dataclass(frozen=True)
class Written:
    """A written dataset: the digest of its images, the number of images of each part, the number of restored ones,
    whether there is a certificate, and whether this run has written it. `marker` is the file that marks it as done."""

    digest: str
    counts: dict[str, int]
    n_restored: int
    certified: bool
    is_new: bool
    marker: Path


def write_dataset(task: WriteTask, track: Track) -> Written:
    """Write the dataset, unless it is complete and nothing has changed that it depends on. `track` shows the progress.

    If files of a written dataset are missing or have another size, they are made again. Intact shards are used again.

    Raises:
        ValueError: no image is kept, `out` contains other images, or an image has changed since the scan.
        OSError: the disk is full, or reading or writing failed. Complete shards are kept for the next try.
    """
    outcome, section = task.outcome(), task.settings.write
    inputs = digest_of(
        VERSION,
        *(scanned.digest for _, scanned in sorted(task.scanned.items())),
        json.dumps([task.settings.seed, section.model_dump(mode="json"), list(task.sources)], sort_keys=True),
        *(hashlib.sha256(numbers.astype("<i8").tobytes()).digest() for numbers in (outcome.kept, outcome.held_out)),
        *(stored.folder.name for stored in task.results.values()),
    )
    _describe_again(task)
    marker = task.folder / f"{NAME}-{inputs[:32]}.json"
    is_new = not (marker.exists() and _is_complete(task.out, json.loads(marker.read_text())["sizes"]))
    if is_new:
        _write(task, outcome, marker, track)
    facts = json.loads(marker.read_text())
    curation = facts["curation"]
    certified = CERTIFICATE in curation["extras"]
    return Written(curation["digests"]["all"], curation["counts"], len(outcome.restored), certified, is_new, marker)


def _write(task: WriteTask, outcome: Outcome, marker: Path, track: Track) -> None:
    """Write the dataset, and then the marker."""
    pool, section = task.scanned[POOL], task.settings.write
    form = WriteSettings(**section.model_dump(exclude={"held_out_share"}))
    further: dict[str, WriteFile] = {
        REPORT: partial(
            write_report, outcome=outcome, read=pool.pixels, name=section.name, beside=partial(_evaluation_image, task)
        )
    }
    if (certificate := _certificate(task, outcome)) is not None:
        further[CERTIFICATE] = partial(write_certificate, certificate=certificate)
    with track(NAME, len(outcome.kept)) as advance:
        write(outcome, pool.encoded, task.out, form, further, advance)
    curation = json.loads((task.out / CURATION).read_bytes())
    sizes = {name: (task.out / name).stat().st_size for name in curation["extras"]}
    task.folder.mkdir(parents=True, exist_ok=True)
    for old in _markers(task.folder):
        old.unlink()
    write_text(marker, json.dumps({"stage": NAME, "curation": curation, "sizes": sizes}, indent=1) + "\n")


def _markers(folder: Path) -> list[Path]:
    """Return the marker of the written dataset, if there is one."""
    return list(folder.glob(f"{NAME}-*.json"))


def _describe_again(task: WriteTask) -> None:
    """Write a missing or damaged `curation.json` from the marker. Without it, the shards look like foreign files."""
    try:
        is_described = read_curation(task.out) is not None
    except ValueError:
        is_described = False
    for marker in _markers(task.folder):
        if not is_described:
            write_description(task.out, json.loads(marker.read_text())["curation"])


def _is_complete(out: Path, sizes: Mapping[str, int]) -> bool:
    """Return whether all files of the dataset in a folder exist and have their sizes.

    `sizes` are those of the files that are neither shards nor lists, in bytes. See `open_curation` for the others.
    """
    try:
        is_complete = open_curation(out) is not None
    except ValueError:
        return False
    return is_complete and all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes.items()
    )


def _certificate(task: WriteTask, outcome: Outcome) -> dict[str, Any] | None:
    """Return the certificate that the dataset contains no leaks, or None if that is not known.

    It contains the digests of the images as they were scanned, and with hidden faces, if faces are hidden. These are
    the bytes of the dataset, because an image with other bytes is not written.
    """
    stored = task.results.get(LEAKS)
    order = list(STAGES)
    if stored is None or any(order.index(outcome.drop_of[i].stage) <= order.index(LEAKS) for i in outcome.restored):
        return None
    counts = json.loads(stored.files[COUNTS].read_text())
    n_leaks, n_rejected = (np.array(counts[name], np.int64) for name in ("n_leaks", "n_rejected"))
    settings = {name: task.settings.value(name).model_dump(mode="json") for name in ("copies", "leaks")}
    del settings["leaks"]["evaluation"]  # the certificate names the images by their digests, and no private paths
    return make_certificate(
        outcome.images.take(outcome.kept),
        task.scanned[EVALUATION].images,
        Leaks(list(stored.drops), n_leaks, n_rejected),
        removed=outcome.images.take(np.array([drop.index for drop in stored.drops], np.int64)),
        model=task.model,
        threshold=counts["threshold"],
        settings=settings,
    )


def _evaluation_image(task: WriteTask, drop: Drop) -> Pixels | None:
    """Return the evaluation image that a leak is a copy of, or None if the drop is no leak."""
    if drop.stage != LEAKS:
        return None
    evaluation = task.scanned[EVALUATION]
    words = drop.reason.partition("evaluation image ")[2]
    key = words.rpartition(" (similarity ")[0] or words
    return evaluation.pixels(list(evaluation.images.key).index(key))
