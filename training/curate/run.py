"""Curate images: scan them, run the stages one after the other, and write the dataset.

Everything that a run has found out is in the folder `.curate` of the dataset, which readers of the dataset ignore. If a
run ends early, however it ends, the same command continues where it was. Equal images and settings give equal files.
"""

import errno
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from model.artifact import bundled_artifact, read_manifest
from model.files import lock_file, write_text
from model.folder import on_one_line
from training.curate import write_stage
from training.curate.copy_stages import COPIES, LEAKS
from training.curate.embedding_stages import BALANCE, EXAMPLES, RETRIEVE, SENSITIVE_CONTENT
from training.curate.faces import FaceSettings
from training.curate.progress import Track
from training.curate.quality_stage import QUALITY
from training.curate.report import reason_kind
from training.curate.rows import read_problems, remaining
from training.curate.scan import Scanned, ScanSettings, scan
from training.curate.settings import CurateSettings
from training.curate.stages import POOL, Stage, Stored, Task, run_stage, without
from training.curate.table import Images
from training.curate.workers import RunAll, Workers
from training.curate.write_stage import WriteTask, write_dataset
from training.data.listing import check_apart, check_different
from training.data.progress import Tell

WORK: Final = ".curate"
LOG, STORED, COMMAND = "log.jsonl", "stages", "command.json"
ALL: Final = (QUALITY, EXAMPLES, COPIES, LEAKS, SENSITIVE_CONTENT, RETRIEVE, BALANCE)
STAGES: Final = {stage.name: stage for stage in ALL}
"""The stages between the scan and the writing of the dataset. `training.curate.settings.STAGES` has their order."""
FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Curation:
    """A command to curate: the paths or URLs of the images, the folder of the dataset, and the settings.

    Raises:
        ValueError: there are no sources, a source is given twice or contains another one, or the dataset's folder is in
            a source or in a folder of the images that stages compare with.
    """

    sources: tuple[str, ...]
    out: Path
    settings: CurateSettings

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no sources of images are given")
        check_different(self.sources, "the source ", "name it once")
        addresses = [address for stage in ALL for name in stage.roles.values() for address in self.settings.value(name)]
        check_apart([*self.sources, *addresses], self.out, "the source ", "the dataset would become one of its sources")


@dataclass(frozen=True)
class Command:
    """The command that has written a dataset: the directory in which it ran, and to which its paths are relative, the
    paths or URLs of the images, and the settings."""

    directory: Path
    sources: tuple[str, ...]
    settings: CurateSettings


@dataclass(frozen=True)
class Tools:
    """What a curation works with: what scans the images, the local workers of the other stages, and functions that show
    the progress and lines to the user."""

    run_all: RunAll
    workers: Workers
    track: Track
    tell: Tell


def curate(curation: Curation, tools: Tools) -> None:
    """Run a curation, or continue one.

    Raises:
        ValueError: a source or the model cannot be used, no image is left, or another process curates into the same
            folder.
        OSError: a server or a disk failed, the disk is full, or a worker was killed. The same command continues.
    """
    work = curation.out / WORK
    with _clear_errors(curation.out):
        work.mkdir(parents=True, exist_ok=True)
        lock = lock_file(work / "lock")
        if lock is None:
            raise ValueError(f"another process curates into {curation.out}")
        with lock:
            _run(curation, tools, work)


@contextmanager
def _clear_errors(out: Path) -> Iterator[None]:
    """Say what to do if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        if error.strerror != os.strerror(error.errno):  # `write` has said it
            raise OSError(error.strerror) from error
        disks = {path.stat().st_dev: path for path in (out / WORK, out) if path.exists()}  # `out`, if they are on one
        full = min(disks.values(), key=lambda path: shutil.disk_usage(path).free, default=out)
        raise OSError(
            f"the disk of {full} is full: make space and start the same command again, which continues where it ended"
        ) from error


def _run(curation: Curation, tools: Tools, work: Path) -> None:
    names = curation.settings.chosen_stages
    stages = [STAGES[name] for name in names if name != write_stage.NAME]
    section = curation.settings.scan
    artifact = bundled_artifact() if section.model is None else Path(section.model)
    scanned = _scan_all(curation, tools, work, stages, artifact)
    images, indices = scanned[POOL].images, np.arange(len(scanned[POOL].images))
    results = dict[str, Stored]()
    for stage in stages:
        rest = remaining(images, indices, work / "remaining.npy")
        task = Task(rest, indices, scanned, curation.settings, work / STORED, tools.workers, tools.track, tools.tell)
        begin = time.monotonic()
        results[stage.name] = stored = run_stage(stage, task)
        _tell_stage(tools.tell, work, images, stored, time.monotonic() - begin)
        indices = without(indices, stored.drops)
        if not len(indices):
            raise ValueError(f"the stage {stage.name} drops all {len(rest):,} remaining images: change its settings")
    if write_stage.NAME in names:
        model = read_manifest(artifact).fingerprint
        to_write = WriteTask(
            scanned, indices, results, curation.sources, curation.settings, curation.out, work / STORED, model
        )
        _write(to_write, tools, work)
        _record_command(curation, work)


def _write(task: WriteTask, tools: Tools, work: Path) -> None:
    begin = time.monotonic()
    written = write_dataset(task, tools.track)
    seconds = time.monotonic() - begin
    _log(work, write_stage.NAME, written.marker.stem, written.is_new, seconds)
    restored = f", {written.n_restored:,} of them restored" if written.n_restored else ""
    tools.tell(
        f"write: {written.counts['train']:,} training images and {written.counts['val']:,} held-out images{restored}; "
        + (f"{seconds:.0f} s" if written.is_new else "done before")
    )
    if LEAKS.name in task.results and not written.certified:
        tools.tell("write: no leak certificate, because restored images were not compared, or are leaks")
    tools.tell(f"dataset: {task.out}, digest {written.digest}")


def _record_command(curation: Curation, work: Path) -> None:
    """Store the command that has written the dataset, so that `last_command` finds it."""
    command = {
        "directory": str(Path.cwd()),
        "sources": list(curation.sources),
        "settings": curation.settings.model_dump(mode="json"),
    }
    text = json.dumps(command, indent=1) + "\n"
    if not (work / COMMAND).exists() or (work / COMMAND).read_text() != text:
        write_text(work / COMMAND, text)


def last_command(out: Path) -> Command:
    """Return the command that has written the dataset in the folder `out`.

    Raises:
        ValueError: the folder has no record of the command, or the record is damaged.
        OSError: the record cannot be read.
    """
    path = out / WORK / COMMAND
    try:
        command = json.loads(path.read_text())
        settings = CurateSettings.model_validate(command["settings"])
        sources = command["sources"]
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise TypeError("the sources must be a list of texts")
        return Command(Path(command["directory"]), tuple(sources), settings)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist, so the sources and settings of the dataset are unknown: start the `dinov2 curate` "
            "that made it again"
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: start the `dinov2 curate` that made the dataset again") from error


def _scan_all(
    curation: Curation, tools: Tools, work: Path, stages: Sequence[Stage], artifact: Path
) -> dict[str, Scanned]:
    """Scan the images to curate and those that the stages compare with, and return the scans by role."""
    section = curation.settings.scan
    addresses = {POOL: curation.sources}
    for stage in stages:
        roles = {role: curation.settings.value(name) for role, name in stage.roles.items()}
        addresses |= {role: named for role, named in roles.items() if named}
    scanned = {}
    for role, named in addresses.items():
        faces = curation.settings.faces
        hidden = FaceSettings(faces.threshold, faces.max_side, faces.grow) if faces.hide and role == POOL else None
        settings = ScanSettings(named, work / "scan" / role, artifact, section.pooling, section.min_side, hidden)
        begin = time.monotonic()
        scanned[role] = result = scan(settings, tools.run_all, tools.track, f"scan of {role}")
        problems = read_problems(result.folder)
        reasons = "".join(f"; {on_one_line(key)}: {problem}" for key, problem in problems[:1])
        _log(work, f"scan {role}", result.folder.name, result.is_new, time.monotonic() - begin)
        tools.tell(
            f"scan of {role}: {len(result.images):,} images, {len(problems):,} cannot be used{reasons}"
            + (f"; {result.n_read:,} files read" if result.is_new else "; done before")
        )
    return scanned


def _tell_stage(tell: Tell, work: Path, images: Images, stored: Stored, seconds: float) -> None:
    name, n = stored.report["stage"], len(stored.drops)
    kinds = Counter(
        reason_kind(drop.reason, None if drop.because is None else images.key[drop.because]) for drop in stored.drops
    )
    why = f" ({', '.join(f'{kind}: {count:,}' for kind, count in kinds.most_common(4))})" if kinds else ""
    end = f"{seconds:.0f} s" if stored.is_new else "done before"
    tell(f"{name}: {n:,} of {stored.report['images']:,} images dropped{why}; {end}")
    _log(work, name, stored.folder.name, stored.is_new, seconds)


def _log(work: Path, stage: str, result: str, is_new: bool, seconds: float) -> None:
    """Note a stage that has been done. If a kill or a full disk has cut off the last line of the log, it is removed."""
    if not is_new:
        return
    line = {
        "stage": stage,
        "result": result,
        "seconds": round(seconds, 3),
        "at": time.strftime("%FT%TZ", time.gmtime()),
    }
    log = work / LOG
    if log.exists() and (content := log.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(log, content.rfind(b"\n") + 1)
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
