"""The stages of curation, and the folders in which their results are stored.

A stage decides which of the remaining images are left out. Its result is stored in a folder whose name contains a
digest of everything that it depends on, and the folder appears in one step. A stage whose folder exists is therefore
done, and a run that was killed continues with the first stage that is not.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.files import publish
from training.curate.drops import Drop
from training.curate.listing import digest_of
from training.curate.progress import Track
from training.curate.scan import Scanned
from training.curate.settings import CurateSettings
from training.curate.table import Images, Indices, Pixels
from training.curate.workers import Workers
from training.data.progress import Tell

POOL: Final = "images"
"""The role of the images that are curated. The other roles are those of the scanned images that stages compare with."""
DROPS, REPORT = "drops.parquet", "report.json"


@dataclass(frozen=True)
class Task:
    """What a stage works on: the remaining images, and all that it may need to decide about them.

    `indices` [n] are the numbers of the n remaining images in the whole table. `scanned` has the scans by role.
    """

    images: Images
    indices: Indices
    scanned: Mapping[str, Scanned]
    settings: CurateSettings
    folder: Path
    workers: Workers
    track: Track
    tell: Tell

    def pixels(self, index: int) -> Pixels:
        """Return the image with a number among the remaining images: RGB uint8 [height, width, 3], upright.

        Raises:
            OSError: the file cannot be read, or has changed since the scan.
        """
        return self.scanned[POOL].pixels(int(self.indices[index]))


@dataclass(frozen=True)
class Result:
    """The result of a stage. `drops` number the images as the task does. `report` has what the user wants to know, as
    JSON. `files` are further files of the dataset, by name."""

    drops: Sequence[Drop]
    report: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage of curation.

    name: the name of the stage and of its section in the settings.
    version: changes whenever the stage decides differently about the same images.
    run: the function that does the work.
    roles: the settings with the addresses of images that the stage compares with, by role.
    sections: the sections of the settings on which the result depends; none: the section of the stage's name.
    """

    name: str
    version: str
    run: Callable[[Task], Result]
    roles: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """The stored result of a stage. `drops` number the images of the whole table."""

    folder: Path
    drops: Sequence[Drop]
    report: Mapping[str, Any]
    is_new: bool

    @property
    def files(self) -> dict[str, Path]:
        """Return the further files of the dataset that the stage has made, by name."""
        return {path.name: path for path in sorted(self.folder.iterdir()) if path.name not in (DROPS, REPORT)}


def stage_digest(stage: Stage, task: Task) -> str:
    """Return a sha256 of everything that the result of a stage depends on."""
    settings = task.settings.model_dump(mode="json")
    roles = sorted({POOL, *stage.roles} & task.scanned.keys())
    return digest_of(
        stage.name,
        stage.version,
        json.dumps([settings["seed"], *(settings[name] for name in stage.sections or (stage.name,))], sort_keys=True),
        *(task.scanned[role].digest for role in roles),
        hashlib.sha256(task.indices.astype("<i8").tobytes()).hexdigest(),
    )


def run_stage(stage: Stage, task: Task) -> Stored:
    """Run a stage if it is not done, and return its stored result.

    Raises:
        ValueError, OSError: the stage cannot be done.
    """
    folder = task.folder / f"{stage.name}-{stage_digest(stage, task)[:32]}"
    is_new = not folder.exists()
    if is_new:
        result = stage.run(task)
        _store(folder, stage.name, task, result)
        for old in task.folder.glob(f"{stage.name}-*"):
            if old != folder:
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
    return Stored(folder, _read_drops(folder, stage.name), json.loads((folder / REPORT).read_text()), is_new)


def _store(folder: Path, name: str, task: Task, result: Result) -> None:
    """Store the result of a stage in a folder, in one step."""
    for drop in result.drops:
        assert drop.stage == name, (drop, name)
    assert not {DROPS, REPORT} & set(result.files), sorted(result.files)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    drops = sorted(result.drops, key=lambda drop: drop.index)
    numbers = task.indices.tolist()
    columns = {
        "index": pa.array([numbers[drop.index] for drop in drops], pa.int64()),
        "reason": pa.array([drop.reason for drop in drops], pa.string()),
        "because": pa.array([None if d.because is None else numbers[d.because] for d in drops], pa.int64()),
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    (temporary / DROPS).write_bytes(buffer.getvalue())
    report = {"stage": name, "images": len(task.images), "dropped": len({drop.index for drop in drops})}
    (temporary / REPORT).write_text(json.dumps({**report, **result.report}, indent=1) + "\n")
    for file, content in result.files.items():
        (temporary / file).write_bytes(content)
    publish(temporary, folder)


def _read_drops(folder: Path, stage: str) -> list[Drop]:
    columns = pq.read_table(folder / DROPS)
    rows = zip(*(columns[name].to_pylist() for name in ("index", "reason", "because")), strict=True)
    return [Drop(index, stage, reason, because) for index, reason, because in rows]


def without(indices: Indices, drops: Sequence[Drop]) -> Indices:
    """Return the numbers of the images that remain after decisions, in ascending order."""
    return np.setdiff1d(indices, np.array([drop.index for drop in drops], np.int64), assume_unique=False)
