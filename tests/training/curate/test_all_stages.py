"""Curations with all stages: what each stage drops, and that a kill in the middle of any stage changes no byte."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from benchmarks.curation_kills import (
    IN_STAGE,
    MIB,
    POINTS,
    done_stages,
    files_of,
    fill_up,
    interrupted,
    kill_this_process,
    set_size,
    small_disk,
)
from tests.training.curate.killed import exit_code_of
from tests.training.curate.small_images import FakeEmbedder, picture
from training.curate.manifest import Entry, read_manifest
from training.curate.progress import in_lines
from training.curate.run import WORK, Curation, Tools, curate
from training.curate.settings import STAGES, load_settings
from training.curate.workers import Workers
from training.curate.write_stage import CERTIFICATE

SIZE = (120, 100)
N = 30
REPLACED = {
    "training.curate.scan.Embedder": FakeEmbedder,
    "training.curate.views.Embedder": FakeEmbedder,
    "training.curate.scan.PART_IMAGES": 16,
}


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def reddish(seed: int) -> Image.Image:
    """Return a picture in which red dominates. It stands for sensitive content."""
    pixels = np.asarray(picture(seed, SIZE), np.float32) * (0.3, 0.15, 0.15) + (170, 0, 0)
    return Image.fromarray(pixels.astype(np.uint8))


def greenish(seed: int) -> Image.Image:
    """Return a picture in which green dominates. It stands for bad quality."""
    pixels = np.asarray(picture(seed, SIZE), np.float32) * (0.15, 0.3, 0.15) + (0, 170, 0)
    return Image.fromarray(pixels.astype(np.uint8))


def fill(folder: Path) -> None:
    """Write the images to curate and those that the stages compare with."""
    for seed in range(N):
        save(picture(seed, SIZE), folder / "pool" / "abc"[seed % 3] / f"{seed:02d}.png")
    picture(3, SIZE).save(folder / "pool" / "a" / "03-again.jpg", quality=80)
    picture(4, SIZE).resize((60, 50), Image.Resampling.BICUBIC).save(folder / "pool" / "b" / "04-small.png")
    shutil.copy(folder / "pool" / "a" / "00.png", folder / "pool" / "c" / "00-same.png")
    Image.new("RGB", SIZE, (9, 9, 9)).save(folder / "pool" / "a" / "dark.png")
    for seed in range(3):
        reddish(900 + seed).save(folder / "pool" / "a" / f"red{seed}.png")
        greenish(950 + seed).save(folder / "pool" / "b" / f"green{seed}.png")
    picture(7, SIZE).save(folder / "pool" / "c" / "leak.jpg", quality=85)
    save(picture(7, SIZE), folder / "evaluation" / "test7.png")
    save(picture(777, SIZE), folder / "evaluation" / "test777.png")
    for seed in range(12):
        save(picture(1000 + seed, SIZE), folder / "harmless" / f"{seed}.png")
        save(reddish(1100 + seed), folder / "red" / f"{seed}.png")
        save(greenish(1200 + seed), folder / "green" / f"{seed}.png")
        save(picture(1300 + seed, SIZE), folder / "seeds" / f"{seed}.png")


def run(folder: Path, out: Path, *settings: str) -> list[str]:
    told: list[str] = []
    overrides = [
        *("scan.min_side=8", "write.shard_images=6", "write.held_out_share=0.2", "quality.drop=['dark']"),
        *(f"leaks.evaluation={folder / 'evaluation'}", f"retrieve.seeds={folder / 'seeds'}", "retrieve.k=6"),
        *(f"sensitive.examples={folder / 'red'}", f"sensitive.harmless={folder / 'harmless'}"),
        *(f"examples.good=['{folder / 'harmless'}', '{folder / 'red'}']", f"examples.bad={folder / 'green'}"),
        *("copies.neighbours=4", "leaks.candidates=4", "balance.size=12"),
    ]
    tools = Tools(Workers(1), Workers(1), in_lines(lambda line: None), told.append)
    curate(Curation((str(folder / "pool"),), out, load_settings(None, [*overrides, *settings])), tools)
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the images, and a curation of them in its subfolder `whole`."""
    folder = tmp_path_factory.mktemp("all")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in REPLACED.items():
            patch.setattr(name, value)
        run(folder, folder / "whole")
        yield folder


def entries(out: Path) -> dict[str, Entry]:
    return {entry.key: entry for entry in read_manifest(out)}


def test_each_stage_drops_what_it_should(whole: Path) -> None:
    found = entries(whole / "whole")
    stage_of = {key.rpartition("/")[2]: entry.stage for key, entry in found.items()}
    assert stage_of["dark.png"] == "quality"
    assert {stage_of[f"green{i}.png"] for i in range(3)} == {"examples"}
    assert {stage_of[f"red{i}.png"] for i in range(3)} == {"sensitive"}
    assert (stage_of["00-same.png"], found["1/c/00-same.png"].kept) == ("copies", "1/a/00.png")
    assert [stage_of["03-again.jpg"], stage_of["03.png"]].count("copies") == 1
    assert [stage_of["04-small.png"], stage_of["04.png"]].count("copies") == 1
    similar = [entry for entry in found.values() if entry.stage == "copies" and entry.reason.startswith("copy of")]
    assert similar
    assert all(entry.reason.startswith(f"copy of {entry.kept} (") for entry in similar)
    assert {stage_of["07.png"], stage_of["leak.jpg"]} <= {"copies", "leaks"}
    assert "leaks" in {stage_of["07.png"], stage_of["leak.jpg"]}
    assert {"retrieve", "balance"} <= set(stage_of.values())
    assert sum(entry.part is not None for entry in found.values()) == 12
    assert done_stages(whole / "whole")[-len(STAGES) :] == list(STAGES)


def test_the_certificate_is_verified_by_a_command_and_refused_after_a_change(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    shutil.copytree(whole / "whole", out)
    arguments = ["curation", "verify", str(out), "--evaluation", str(whole / "evaluation")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "no leaks: 12 images were compared with 2 evaluation images" in done.stdout
    other = CliRunner().invoke(cli.app, [*arguments[:3], "--evaluation", str(whole / "seeds")])
    assert other.exit_code == 2
    assert "not compared" in other.output
    content = json.loads((out / CERTIFICATE).read_text())
    (out / CERTIFICATE).write_text(json.dumps({**content, "threshold": 0.1}))
    changed = CliRunner().invoke(cli.app, arguments)
    assert changed.exit_code == 2
    assert "was changed" in changed.output


def test_a_deleted_certificate_is_made_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    shutil.copytree(whole / "whole", out)
    (out / CERTIFICATE).unlink()
    run(whole, out)
    assert (out / CERTIFICATE).read_bytes() == (whole / "whole" / CERTIFICATE).read_bytes()
    assert len(done_stages(out)) == len(done_stages(whole / "whole")) + 1  # only `write`


def run_until_killed(folder: Path, out: Path, point: str) -> None:
    with interrupted(point, kill_this_process):
        run(folder, out)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_in_the_middle_of_a_stage_changes_no_byte(whole: Path, tmp_path: Path, point: str) -> None:
    out = tmp_path / "out"
    if point != "scan":
        shutil.copytree(whole / "whole" / WORK / "scan", out / WORK / "scan")
    assert exit_code_of(partial(run_until_killed, whole, out, point), replaced=REPLACED) == -signal.SIGKILL
    before = done_stages(out)
    assert IN_STAGE.get(point, point) not in before
    run(whole, out)
    assert files_of(out) == files_of(whole / "whole")
    after = done_stages(out)
    assert after[: len(before)] == before
    assert len(after) == len(set(after))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own."""
    with ExitStack() as stack:
        try:
            stack.enter_context(small_disk(tmp_path / "disk", 64 * MIB))
        except OSError as error:
            pytest.skip(f"no disk can be mounted: {error}")
        yield tmp_path / "disk"


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_that_becomes_full_in_a_stage_is_named_and_nothing_is_lost(whole: Path, disk: Path, point: str) -> None:
    if point != "scan":
        shutil.copytree(whole / "whole" / WORK / "scan", disk / WORK / "scan")
    with interrupted(point, lambda: fill_up(disk)), pytest.raises(OSError, match="pace and") as raised:
        run(whole, disk)
    assert str(disk) in str(raised.value)
    before = done_stages(disk)
    assert IN_STAGE.get(point, point) not in before
    set_size(disk, 64 * MIB)
    run(whole, disk)
    assert files_of(disk) == files_of(whole / "whole")
    after = done_stages(disk)
    assert after[: len(before)] == before
    assert len(after) == len(set(after))


def test_a_full_disk_does_not_change_an_older_dataset(whole: Path, disk: Path) -> None:
    shutil.copytree(whole / "whole", disk, dirs_exist_ok=True)
    with (
        interrupted("report", lambda: fill_up(disk)),
        pytest.raises(OSError, match="older dataset there is not changed"),
    ):
        run(whole, disk, "write.held_out_share=0.4")
    assert files_of(disk) == files_of(whole / "whole")
