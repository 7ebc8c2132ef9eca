"""The manifest of a curated dataset: what became of every image. Dropped images can be brought back.

`manifest.jsonl` has one line for each image, in the order of the keys. `restored.json` has the keys of the images that
the user has brought back. It is the only file of a dataset that is also an input of the next run.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from model.files import write_text
from training.curate.outcome import Outcome
from training.curate.table import Images, Indices
from training.curate.tars import Shard, sample_name
from training.data.curated import PARTS

MANIFEST: Final = "manifest.jsonl"
RESTORED: Final = "restored.json"
SCAN: Final = "scan"
"""The stage of images that could not be read. They cannot be restored."""


@dataclass(frozen=True)
class Entry:
    """A line of the manifest: what became of one image.

    A kept image has the `part` `train` or `val`, and if it is in a shard, `shard` and `sample` are its place there. A
    dropped image has no part. `stage` and `reason` say why an image was dropped, and `kept` is the key of the image of
    which it is a copy. A restored image has both a part and the reason for which it was dropped. `sha256` is that of
    its file; images that could not be read have none.
    """

    key: str
    sha256: str | None = None
    label: str | None = None
    part: str | None = None
    shard: str | None = None
    sample: str | None = None
    stage: str | None = None
    reason: str | None = None
    kept: str | None = None

    def line(self) -> str:
        """Return the entry as a line of JSON, without the fields that are None."""
        return json.dumps({k: v for k, v in vars(self).items() if v is not None}, ensure_ascii=False) + "\n"


def entries(outcome: Outcome, shards: Sequence[Shard]) -> Iterator[Entry]:
    """Yield the entries of all images, in the order of their keys.

    Args:
        outcome: what became of each image.
        shards: the shards with the kept images. It is empty if the dataset consists of lists.
    """
    images = outcome.images
    part_of, shard_of = np.full(len(images), -1), np.full(len(images), -1)
    for number, indices in enumerate((outcome.train, outcome.held_out)):
        part_of[indices] = number
    for number, shard in enumerate(shards):
        shard_of[shard.indices] = number
    unreadable = sorted(outcome.unreadable)
    position = 0
    for index, key in enumerate(images.key):
        while position < len(unreadable) and unreadable[position][0] < key:
            yield Entry(unreadable[position][0], stage=SCAN, reason=unreadable[position][1])
            position += 1
        drop = outcome.drop_of.get(index)
        in_shard = shard_of[index] >= 0
        yield Entry(
            str(key),
            images.sha256[index].tobytes().hex(),
            images.label[index],
            PARTS[part_of[index]] if part_of[index] >= 0 else None,
            shards[shard_of[index]].name if in_shard else None,
            sample_name(key) if in_shard else None,
            None if drop is None else drop.stage,
            None if drop is None else drop.reason,
            None if drop is None or drop.because is None else str(images.key[drop.because]),
        )
    for key, reason in unreadable[position:]:
        yield Entry(key, stage=SCAN, reason=reason)


def write_manifest(path: Path, outcome: Outcome, shards: Sequence[Shard]) -> None:
    """Write the manifest of an outcome to a file. See `entries`."""
    with path.open("w", encoding="utf-8") as file:
        for entry in entries(outcome, shards):
            file.write(entry.line())


def read_manifest(out: Path) -> Iterator[Entry]:
    """Yield the entries of the manifest in a dataset's folder.

    Raises:
        ValueError: the folder has no manifest, or the manifest is damaged.
    """
    path = out / MANIFEST
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield _entry(json.loads(line))
    except FileNotFoundError as error:
        raise ValueError(f"{out} has no {MANIFEST}, so it is not a dataset that `dinov2 curate` has written") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _entry(content: object) -> Entry:
    """Return the entry of a line. Raise ValueError if its content is not that of an entry."""
    names = {field.name for field in fields(Entry)}
    if not isinstance(content, dict) or "key" not in content or not names.issuperset(content):
        raise ValueError("a line is not the entry of an image")
    if not all(isinstance(value, str) for value in content.values()):
        raise ValueError("a line has a value that is not text")
    return Entry(**content)


# Bringing images back


def restore(out: Path, keys: Sequence[str]) -> list[Entry]:
    """Record that dropped images are to be kept, and return their entries. The next run of the stage `write` adds them.

    If an error is raised, nothing is recorded. Images that are already restored may be named again.

    Args:
        out: the dataset's folder.
        keys: the keys of the images, as the manifest has them.

    Raises:
        ValueError: a key is not in the manifest, or its image was not dropped, or could not be read.
        OSError: `restored.json` cannot be written.
    """
    wanted = set(keys)
    found = {entry.key: entry for entry in read_manifest(out) if entry.key in wanted}
    for key in keys:
        entry = found.get(key)
        if entry is None:
            raise ValueError(f"{key} is not in {out / MANIFEST}; give keys as they are there, such as 1/cats/7.jpg")
        if entry.stage is None:
            raise ValueError(f"{key} was not dropped: it is in the part {entry.part}")
        if entry.stage == SCAN:
            raise ValueError(f"{key} cannot be restored, because it cannot be read: {entry.reason}")
    recorded = sorted(wanted.union(read_restored(out)))
    write_text(out / RESTORED, json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")
    return [found[key] for key in dict.fromkeys(keys)]


def read_restored(out: Path) -> list[str]:
    """Return the keys of the images that are to be restored in a dataset, sorted.

    Raises:
        ValueError: the file is damaged.
    """
    path = out / RESTORED
    try:
        keys: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{path} is damaged: it must be a list of keys")
    return sorted(keys)


def with_restored(images: Images, kept: Indices, keys: Sequence[str]) -> tuple[Indices, frozenset[int]]:
    """Add the images with the keys `keys` to the kept images.

    Return the numbers of all kept images, in ascending order, and the numbers of the added ones. Keys of images that
    are no longer there, or that are kept anyway, have no effect.
    """
    wanted, already = set(keys), set(kept.tolist())
    added = [index for index, key in enumerate(images.key) if key in wanted and index not in already]
    return np.union1d(kept, np.array(added, np.int64)), frozenset(added)
