"""Tests of the manifest and of bringing dropped images back."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training.curate.curated import Pool, cats_and_dogs
from training.curate.manifest import Entry, read_manifest, read_restored, restore, with_restored
from training.curate.outcome import Outcome, split
from training.curate.tars import WriteSettings
from training.curate.write import write

DROPS = (
    ("1/cats/01.jpg", "duplicates", "a copy with other colours", "1/cats/00.jpg"),
    ("1/cats/05.jpg", "quality", "blurry", None),
    ("1/dogs/02.png", "leaks", "a copy of the evaluation image val/1.jpg", None),
)
UNREADABLE = [("1/zebra.jpg", "truncated"), ("0/first.jpg", "empty"), ("1/cats/<b>\n.jpg", "not an image")]


def curated(pool: Pool, out: Path) -> Outcome:
    """Write a dataset as the stage `write` does: with the images that were restored."""
    drops = pool.drops(*DROPS)
    kept = np.setdiff1d(np.arange(len(pool.images)), [drop.index for drop in drops])
    kept, restored = with_restored(pool.images, kept, read_restored(out))
    held_out = split(pool.images, kept, drops, 0.3, 0)
    outcome = Outcome(pool.images, kept, held_out, drops, restored, UNREADABLE)
    write(outcome, pool.read, out, WriteSettings(shard_images=4))
    return outcome


def test_every_image_is_in_the_manifest(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    outcome = curated(pool, tmp_path)
    entries = {entry.key: entry for entry in read_manifest(tmp_path)}
    assert list(entries) == sorted([*pool.images.key, *(key for key, _ in UNREADABLE)])
    for key, stage, reason, kept in DROPS:
        sha256 = pool.images.sha256[pool.number[key]].tobytes().hex()
        label = key.split("/")[1]
        assert entries[key] == Entry(key, sha256, label, stage=stage, reason=reason, kept=kept)
    for key, reason in UNREADABLE:
        assert entries[key] == Entry(key, stage="scan", reason=reason)
    for index in outcome.kept.tolist():
        entry = entries[pool.images.key[index]]
        assert entry.part == ("val" if index in outcome.held_out else "train")
        assert entry.stage is entry.reason is entry.kept is None
        assert f"{entry.sample}.json".encode() in (tmp_path / str(entry.shard)).read_bytes()


def test_a_restored_image_is_in_the_next_dataset(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    first = curated(pool, tmp_path)
    assert [entry.reason for entry in restore(tmp_path, ["1/cats/05.jpg", "1/cats/01.jpg"])] == ["blurry", DROPS[0][2]]
    second = curated(pool, tmp_path)
    assert len(second.kept) == len(first.kept) + 2
    entries = {entry.key: entry for entry in read_manifest(tmp_path)}
    assert entries["1/cats/05.jpg"].reason == "blurry"
    assert entries["1/cats/01.jpg"].part == entries["1/cats/00.jpg"].part, "a copy is in the part of its original"
    restore(tmp_path, ["1/cats/05.jpg"])  # again: no error
    restore(tmp_path, ["1/dogs/02.png"])
    assert read_restored(tmp_path) == ["1/cats/01.jpg", "1/cats/05.jpg", "1/dogs/02.png"]
    assert len(curated(pool, tmp_path).kept) == 25


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("1/cats/99.jpg", r"1/cats/99\.jpg is not in .*manifest\.jsonl"),
        ("1/cats/00.jpg", r"1/cats/00\.jpg was not dropped: it is in the part (train|val)"),
        ("1/zebra.jpg", r"1/zebra\.jpg cannot be restored, because it cannot be read: truncated"),
    ],
)
def test_a_wrong_key_restores_nothing(tmp_path: Path, key: str, message: str) -> None:
    curated(cats_and_dogs(), tmp_path)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, ["1/cats/05.jpg", key])
    assert read_restored(tmp_path) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.jsonl, so it is not a dataset"):
        restore(tmp_path, ["1/a.jpg"])
    (tmp_path / "manifest.jsonl").write_text('{"name": 1}\n')
    with pytest.raises(ValueError, match=r"manifest\.jsonl is damaged"):
        restore(tmp_path, ["1/a.jpg"])
    for content in ("{", json.dumps({"a": 1}), json.dumps([1])):
        (tmp_path / "restored.json").write_text(content)
        with pytest.raises(ValueError, match=r"restored\.json is damaged"):
            read_restored(tmp_path)


def test_keys_that_are_gone_or_kept_anyway_restore_nothing() -> None:
    images = cats_and_dogs().images
    kept, restored = with_restored(images, np.array([0, 2]), [images.key[0], images.key[1], "9/gone.jpg"])
    assert kept.tolist() == [0, 1, 2]
    assert restored == {1}


@pytest.mark.parametrize("line", ["[1]", '{"key": ["a"]}', '{"key": "a", "reason": 5}', '{"x": "a"}', "[" * 100_000])
def test_a_line_that_is_no_entry_is_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"manifest.jsonl is damaged"):
        restore(tmp_path, ["1/cats/05.jpg"])
    assert not (tmp_path / "restored.json").exists()
