"""Curations with all stages: what each stage drops, and that a kill in the middle of any stage changes no byte."""

import json
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from tests.training.curate.killed import exit_code_of
from tests.training.curate.small_images import FakeEmbedder, picture
from tests.training.curate.test_run import done_stages, files
from training.curate.manifest import Entry, read_manifest
from training.curate.progress import in_lines
from training.curate.run import LOG, WORK, Curation, Tools, curate
from training.curate.settings import STAGES, load_settings
from training.curate.workers import Workers
from training.curate.write_stage import CERTIFICATE

SIZE = (120, 100)
N = 30
REPLACED = {"training.curate.scan.Embedder": FakeEmbedder, "training.curate.scan.PART_IMAGES": 16}


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


def run(folder: Path, out: Path) -> list[str]:
    told: list[str] = []
    overrides = [
        *("scan.min_side=8", "write.shard_images=6", "write.held_out_share=0.2", "quality.drop=['dark']"),
        *(f"leaks.evaluation={folder / 'evaluation'}", f"retrieve.seeds={folder / 'seeds'}", "retrieve.k=6"),
        *(f"sensitive.examples={folder / 'red'}", f"sensitive.harmless={folder / 'harmless'}"),
        *(f"examples.good=['{folder / 'harmless'}', '{folder / 'red'}']", f"examples.bad={folder / 'green'}"),
        *("copies.neighbours=4", "leaks.candidates=4", "balance.size=12"),
    ]
    tools = Tools(Workers(1), Workers(1), in_lines(lambda line: None), told.append)
    curate(Curation((str(folder / "pool"),), out, load_settings(None, overrides)), tools)
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


POINTS = {
    "scan": ("training.curate.scan.write_bytes", 5),
    "quality": ("training.curate.quality_stage.find_issues", 1),
    "examples": ("training.curate.embedding_stages.learn_score", 1),
    "copies": ("training.curate.pair_cache.PairStore.add", 2),
    "leaks": ("training.curate.copy_stages.find_leaks", 1),
    "sensitive": ("training.curate.embedding_stages.learn_score", 2),
    "retrieve": ("training.curate.embedding_stages.retrieve_by_sample", 1),
    "balance": ("training.curate.stages.publish", 7),
    "write": ("training.curate.write.write_shard", 2),
    "report": ("training.curate.write_stage.write_report", 1),
    "certificate": ("training.curate.write_stage.write_certificate", 1),
}


@pytest.mark.parametrize("stage", POINTS)
def test_a_kill_in_the_middle_of_a_stage_changes_no_byte(whole: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "out"
    if stage != "scan":
        shutil.copytree(whole / "whole" / WORK / "scan", out / WORK / "scan")
    where, call = POINTS[stage]
    assert exit_code_of(partial(run, whole, out), [where], call, REPLACED) == -signal.SIGKILL
    before = done_stages(out) if (out / WORK / LOG).exists() else []
    run(whole, out)
    assert files(out) == files(whole / "whole")
    after = done_stages(out)
    assert after[: len(before)] == before
    assert len(after) == len(set(after))
