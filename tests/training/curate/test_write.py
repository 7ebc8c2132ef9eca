"""Tests of the files of a curated dataset: their content, their bytes, and what an interruption leaves."""

import errno
import hashlib
import json
import signal
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.training.curate.curated import Pool, cats_and_dogs, encoded, picture
from tests.training.curate.killed import exit_code_of
from training.config import TrainConfig
from training.curate import write as writing
from training.curate.outcome import data_digest
from training.curate.tars import WriteSettings, plan_shards, sample_name
from training.curate.write import write
from training.data.curated import CURATION, STAGING, open_curation
from training.data.curation_facts import curation_facts
from training.data.dataset import split_indices
from training.data.sources import open_source
from training.provenance import provenance

SMALL = WriteSettings(shard_images=5)
HELD_OUT = ("1/cats/03.jpg", "1/dogs/07.png")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_pool(pool: Pool, out: Path, settings: WriteSettings = SMALL) -> str:
    return write(pool.outcome(held_out=HELD_OUT), pool.read, out, settings)


def test_training_reads_the_shards_with_their_parts_and_classes(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    write_pool(pool, tmp_path / "set")
    source = open_source(tmp_path / "set", tmp_path / "index")
    assert len(source) == len(pool.images) == 25
    assert not source.skipped
    train, held_out = split_indices(source, 0.5, 0)
    key_of = {sample_name(key): key for key in pool.images.key}
    parts = [sorted(key_of[Path(source.name(i)).stem] for i in part.tolist()) for part in (train, held_out)]
    assert parts[1] == sorted(HELD_OUT)
    assert parts[0] == sorted(set(pool.images.key) - set(HELD_OUT))
    classes = source.classes()
    for index in range(len(source)):
        key = key_of[Path(source.name(index)).stem]
        assert source.encoded(index) == pool.files[key]
        number = classes.numbers[index]
        assert (None if number < 0 else classes.names[number]) == pool.images.label[pool.number[key]]


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        write_pool(cats_and_dogs(), tmp_path / out)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b
    assert len([name for name in a if name.endswith(".tar")]) > 3
    members = []
    for shard in sorted((tmp_path / "a").glob("*.tar")):
        with tarfile.open(shard) as tar:
            samples = [member.name.partition(".")[0] for member in tar]
            assert samples == sorted(samples)
            members += tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_digest_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    digests = [write_pool(pool, tmp_path / str(n), WriteSettings(shard_images=n)) for n in (1, 4, 100)]
    lists = write(pool.outcome(held_out=HELD_OUT), pool.read, tmp_path / "list", WriteSettings("list"))
    assert set(digests) == {lists} == {data_digest(pool.images, np.arange(25))}
    changed = Pool(pool.files | {"2/lonely.jpg": encoded(picture(7777))})
    assert data_digest(changed.images, np.arange(25)) != lists
    assert data_digest(pool.images, np.arange(24)) != lists


def test_a_shard_keeps_its_content_if_another_gets_one_more_image() -> None:
    files = {f"1/{i:05d}.jpg": i.to_bytes(4) for i in range(3000)}
    pool = Pool(files)
    settings = WriteSettings(shard_images=100)
    shards = plan_shards(pool.images, np.arange(3000), "train", settings)
    fewer = plan_shards(pool.images, np.delete(np.arange(3000), 700), "train", settings)
    assert sum(len(shard.indices) for shard in shards) == 3000
    assert max(len(shard.indices) for shard in shards) <= 100
    assert 40 <= np.mean([len(shard.indices) for shard in shards]) <= 60
    assert len({shard.digest for shard in shards} - {shard.digest for shard in fewer}) <= 3


def test_no_shard_is_larger_than_the_maximum_unless_one_image_is() -> None:
    pool = Pool({f"1/{i:03d}.jpg": bytes([i]) * (300 if i % 10 else 5000) for i in range(100)})
    for shard in plan_shards(pool.images, np.arange(100), "val", WriteSettings(shard_bytes=1000)):
        assert len(shard.indices) == 1 or pool.images.n_bytes[shard.indices].sum() <= 1000
        assert shard.name.startswith("val-0")


def test_writing_again_reads_only_the_images_of_changed_shards(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    write_pool(pool, tmp_path)
    before, pool.n_read = contents(tmp_path), 0
    write_pool(pool, tmp_path)
    assert pool.n_read == 0
    assert contents(tmp_path) == before
    drops = pool.drops(("2/lonely.jpg", "quality", "blurry", None))
    write(pool.outcome(drops, HELD_OUT), pool.read, tmp_path, SMALL)
    assert pool.n_read < 6
    fresh = tmp_path.with_name("fresh")
    write(pool.outcome(drops, HELD_OUT), pool.read, fresh, SMALL)
    assert contents(tmp_path) == contents(fresh)


def test_files_of_an_older_dataset_are_removed(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    (tmp_path / "notes.txt").write_text("mine")
    write_pool(pool, tmp_path, WriteSettings(shard_images=1))
    write_pool(pool, tmp_path, WriteSettings())
    assert {path.name for path in tmp_path.glob("*.tar")} == {"train-000000.tar", "val-000000.tar"}
    write_pool(pool, tmp_path, WriteSettings("list"))
    assert not list(tmp_path.glob("*.tar"))
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"manifest.jsonl", "train.jsonl", "val.jsonl"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_with_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1)))
    with pytest.raises(ValueError, match=r"a\.jpg is not part of a curated dataset"):
        write_pool(cats_and_dogs(), tmp_path)


def test_an_image_that_has_changed_since_the_scan_is_not_written(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    pool.files["1/cats/05.jpg"] = encoded(picture(55))
    with pytest.raises(ValueError, match=r"1/cats/05\.jpg has changed since it was scanned"):
        write_pool(pool, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != STAGING]


# Interruptions


def killed_write(call: int, out: Path) -> bool:
    """Write a dataset in another process, and kill it before its call number `call` that syncs or renames a file.

    Return whether it was killed. Otherwise it has finished.
    """
    work = partial(write_pool, cats_and_dogs(8), out)
    code = exit_code_of(work, ["os.fsync", "os.replace"], call + 1)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def test_a_killed_run_is_completed_byte_for_byte(tmp_path: Path) -> None:
    """Runs are killed before their 1st, 6th, 11th, ... call that syncs or renames a file, until one is not killed."""
    call = 0
    while killed_write(call, tmp_path / str(call)):
        call += 5
    write_pool(cats_and_dogs(8), tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    n_killed, n_visible, n_read = 0, 0, []
    while (out := tmp_path / str(5 * n_killed)).exists():
        n_killed += 1
        if (out / STAGING / CURATION).exists():  # killed while it renamed complete files
            n_visible += 1
            with pytest.raises(ValueError, match="not completely written"):
                open_source(out, tmp_path / "index")
        elif not (out / CURATION).exists():
            assert [path.name for path in out.iterdir()] == [STAGING]
        pool = cats_and_dogs(8)
        write_pool(pool, out)
        n_read.append(pool.n_read)
        assert contents(out) == whole, out
    assert n_killed > 9
    assert n_visible > 1
    assert n_read == sorted(n_read, reverse=True), "complete shards are not written again"
    assert (n_read[0], n_read[-1]) == (17, 0)
    assert len(set(n_read)) > 4


def test_a_full_disk_changes_nothing_and_the_next_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = cats_and_dogs()
    write_pool(pool, tmp_path / "set", WriteSettings(shard_images=7))
    before = contents(tmp_path / "set")
    original, n_written = writing.write_shard, 0

    def full(path: Path, *args: object) -> str:
        nonlocal n_written
        n_written += 1
        if n_written == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "write_shard", full)
    with pytest.raises(OSError, match=r"disk of .* is full\. An older dataset there is not changed\. Make space"):
        write_pool(pool, tmp_path / "set")
    assert {k: v for k, v in contents(tmp_path / "set").items() if not k.startswith(STAGING)} == before
    assert not list((tmp_path / "set").rglob("*.part"))
    assert len(open_source(tmp_path / "set", tmp_path / "index")) == 25
    n_written = 10
    write_pool(pool, tmp_path / "set")
    assert n_written < 10 + len(list((tmp_path / "set").glob("*.tar"))), "two shards were complete"
    write_pool(cats_and_dogs(), tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = cats_and_dogs()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0\.1 MB, but the disk of .* has 0\.0 MB free"):
        write_pool(pool, tmp_path)
    assert pool.n_read == 0


# What training checks


def test_a_missing_or_truncated_shard_is_noticed(tmp_path: Path) -> None:
    write_pool(cats_and_dogs(), tmp_path)
    curation = open_curation(tmp_path)
    assert curation is not None
    assert curation.counts == {"train": 23, "val": 2}
    shard = tmp_path / "train-000001.tar"
    for file in curation.files:
        assert hashlib.sha256((tmp_path / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"train-000001\.tar has .* bytes, but curation\.json says"):
        open_source(tmp_path, tmp_path / "index")
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        open_source(tmp_path, tmp_path / "index")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ('{"format": "dinov2-curation-9"}', "reads only dinov2-curation-1"), (None, "has no 'form'")],
)
def test_a_damaged_description_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    (tmp_path / CURATION).write_text(content or json.dumps({"format": "dinov2-curation-1"}))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, tmp_path / "index")


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="form='zip' must be shards or list"):
        WriteSettings(form="zip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_images=0 must be at least 1"):
        replace(SMALL, shard_images=0)


def test_the_provenance_of_a_run_has_the_digests(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    digest = write_pool(pool, tmp_path / "set")
    (tmp_path / "plain").mkdir()
    data = [
        str(tmp_path / "plain"),
        f"file://{tmp_path}/set",
        "memory://bucket/set",
        str(tmp_path / "set/train-000000.tar"),
    ]
    config = TrainConfig(
        data=data, out=tmp_path / "run", recipe="smoke", vit={"embed_dim": 16, "depth": 1, "num_heads": 2}
    )
    facts, of_shard = provenance(config, "d" * 64, 23, "a CPU")["curation"]
    assert of_shard["source"] == 4
    held_out = [pool.number[key] for key in HELD_OUT]
    train = np.setdiff1d(np.arange(25), held_out)
    assert facts == {
        "source": 2,
        "sha256": {
            "all": digest,
            "train": data_digest(pool.images, train),
            "val": data_digest(pool.images, np.array(held_out)),
        },
        "images": {"train": 23, "val": 2},
    }
    (tmp_path / "set/val-000000.tar").unlink()
    with pytest.raises(ValueError, match="is missing"):
        provenance(config, "d" * 64, 23, "a CPU")


def facts_of(*data: str) -> list[dict[str, Any]]:
    return curation_facts(data)


def test_shards_that_are_named_have_the_digests_of_their_parts(tmp_path: Path) -> None:
    write_pool(cats_and_dogs(), tmp_path / "set")
    curation = open_curation(tmp_path / "set")
    assert curation is not None
    sha256 = {file["name"]: file["sha256"] for file in curation.files}
    n_images = {file["name"]: file["images"] for file in curation.files}
    [whole] = facts_of(str(tmp_path / "set/*.tar"))
    assert whole == {"source": 1, "sha256": curation.digests, "images": curation.counts}
    [train] = facts_of(str(tmp_path / "set/train-*.tar"))
    assert train == {"source": 1, "sha256": {"train": curation.digests["train"]}, "images": {"train": 23}}
    name = "train-000000.tar"
    [shard] = facts_of(str(tmp_path / f"set/{name}"))
    expected = {"sha256": {}, "images": {"train": n_images[name]}, "shards": {name: sha256[name]}}
    assert shard == {"source": 1, **expected}


def test_shards_at_a_url_have_the_digests_of_their_curation(tmp_path: Path) -> None:
    write_pool(cats_and_dogs(), tmp_path / "set")
    curation = open_curation(tmp_path / "set")
    assert curation is not None
    bucket = fsspec.filesystem("memory")
    for path in (tmp_path / "set").iterdir():
        if path.is_file():
            bucket.pipe(f"/curated/{path.name}", path.read_bytes())
    expected = {"sha256": curation.digests, "images": curation.counts}
    assert facts_of("memory://curated") == [{"source": 1, **expected}]
    assert facts_of(str(tmp_path), "memory://curated/*.tar") == [{"source": 2, **expected}]
    assert facts_of("memory://none") == []
    bucket.pipe("/curated/train-000000.tar", b"changed")
    assert facts_of("memory://curated") == [], "the description is not that of these shards"
    bucket.rm("/curated/curation.json")
    assert facts_of("memory://curated/val-000000.tar") == []


def test_shards_that_are_not_curated_have_no_digests(tmp_path: Path) -> None:
    write_pool(cats_and_dogs(), tmp_path / "set")
    (tmp_path / "set/foreign.tar").write_bytes(b"x")
    for data in (tmp_path / "set/*.tar", tmp_path / "set/missing.tar", tmp_path / "{1..0}.tar"):
        assert facts_of(str(data)) == []
    (tmp_path / "set/foreign.tar").unlink()
    (tmp_path / "set" / CURATION).write_text("{")
    assert facts_of(str(tmp_path / "set/train-000000.tar")) == []


# Lists


def listed(tmp_path: Path) -> Pool:
    """Write the images of a pool to two folders and to tar shards of a third source, and then a list of them."""
    pool = cats_and_dogs(4)
    for key, data in pool.files.items():
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    sources = [str(tmp_path / "images/1"), str(tmp_path / "images/2")]
    drops = pool.drops(("1/cats/02.jpg", "duplicates", "copy", "1/cats/01.jpg"))
    write(pool.outcome(drops, ["1/dogs/01.png"], sources=sources), pool.read, tmp_path / "set", WriteSettings("list"))
    return pool


def test_training_reads_a_list(tmp_path: Path) -> None:
    pool = listed(tmp_path)
    source = open_source(tmp_path / "set", tmp_path / "index")
    train, held_out = split_indices(source, 0.5, 0)
    assert [source.name(i) for i in held_out.tolist()] == ["1/dogs/01.png"]
    assert [source.name(i) for i in train.tolist()] == sorted(set(pool.files) - {"1/cats/02.jpg", "1/dogs/01.png"})
    assert all(source.encoded(i) == pool.files[source.name(i)] for i in range(len(source)))
    assert [source.label(i) for i in range(len(source))] == [
        pool.images.label[pool.number[source.name(i)]] for i in range(len(source))
    ]
    classes = source.classes()
    assert classes.names == ["cats", "dogs"]
    assert classes.numbers.tolist() == [0] * 3 + [1] * 3 + [-1] + [1]


def test_a_changed_image_of_a_list_is_not_used(tmp_path: Path) -> None:
    listed(tmp_path)
    (tmp_path / "images/1/cats/01.jpg").write_bytes(encoded(picture(321)))
    source = open_source(tmp_path / "set", tmp_path / "index")
    index = [source.name(i) for i in range(len(source))].index("1/cats/01.jpg")
    with pytest.raises(ValueError, match="changed since it was curated"):
        source.encoded(index)
    (tmp_path / "images/1/cats/01.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 8 images .* no longer in their sources: 1/cats/01\.jpg"):
        open_source(tmp_path / "set", tmp_path / "index")
