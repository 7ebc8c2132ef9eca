"""Tests of whole curations: what is written, what a second run does, and what a killed run leaves behind."""

import errno
import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.training.curate.killed import exit_code_of
from tests.training.curate.small_images import FakeEmbedder, fill_folder, picture
from training.curate import run as run_module
from training.curate import stages
from training.curate.manifest import read_manifest, restore
from training.curate.progress import in_lines
from training.curate.run import LOG, WORK, Curation, Tools, curate, last_command
from training.curate.scan import Scanned, ScanSettings
from training.curate.settings import load_settings
from training.curate.workers import Workers
from training.data.sources import open_source

SETTINGS = (
    "stages=['quality', 'write']",
    "scan.min_side=8",
    "write.held_out_share=0.25",
    "quality.drop=['dark', 'blurry']",
)


def run(source: Path, out: Path, *settings: str) -> list[str]:
    """Curate, and return what the user is told."""
    told: list[str] = []
    tools = Tools(Workers(1), Workers(1), in_lines(lambda line: None), told.append)
    curate(Curation((str(source),), out, load_settings(None, [*SETTINGS, *settings])), tools)
    return told


def files(out: Path) -> dict[str, bytes]:
    """Return the files of a dataset, without those in the working folder."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def done_stages(out: Path) -> list[str]:
    """Return the names of the stages that have been done, from the log."""
    return [json.loads(line)["stage"] for line in (out / WORK / LOG).read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path, embedder) -> Path:
    folder = fill_folder(tmp_path / "in", 10)
    Image.fromarray(np.full((40, 48, 3), 9, np.uint8)).save(folder / "a" / "dark.png")
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def test_every_image_is_accounted_for_and_the_dataset_can_be_opened(tmp_path: Path, source: Path) -> None:
    told = run(source, tmp_path / "out")
    entries = {entry.key: entry for entry in read_manifest(tmp_path / "out")}
    assert len(entries) == 12
    assert (entries["1/a/dark.png"].stage, entries["1/a/dark.png"].reason) == ("quality", "dark")
    assert entries["1/a/broken.png"].stage == "scan"
    dataset = open_source(tmp_path / "out", tmp_path / "index")
    assert len(dataset) == 10
    assert len(dataset.parts["val"]) == sum(entry.part == "val" for entry in entries.values()) > 0
    assert any(line.startswith("quality: 1 of 11 images dropped (dark: 1)") for line in told)
    assert done_stages(tmp_path / "out") == ["scan images", "quality", "write"]


def test_an_image_of_another_size_is_kept_by_default(tmp_path: Path, source: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(source / "a" / "wide.png")
    drop = list(load_settings(None).quality.drop)
    run(source, tmp_path / "out", f"quality.drop={[*drop, 'odd_size']}")
    assert {entry.key: entry for entry in read_manifest(tmp_path / "out")}["1/a/wide.png"].reason == "odd size"
    run(source, tmp_path / "out", f"quality.drop={drop}")
    assert {entry.key: entry for entry in read_manifest(tmp_path / "out")}["1/a/wide.png"].stage is None


def test_a_second_run_does_nothing_and_other_settings_do_only_what_depends_on_them(tmp_path: Path, source) -> None:
    run(source, tmp_path / "out")
    before = files(tmp_path / "out")
    assert all("done before" in line or line.startswith("dataset") for line in run(source, tmp_path / "out"))
    run(source, tmp_path / "out", "write.held_out_share=0.5")
    assert done_stages(tmp_path / "out") == ["scan images", "quality", "write", "write"]
    assert files(tmp_path / "out") != before
    run(source, tmp_path / "out", "quality.dark=0.001", "quality.drop=['dark']")
    assert done_stages(tmp_path / "out")[4:] == ["quality", "write"]
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_another_seed_balances_again(tmp_path: Path, source: Path) -> None:
    balanced = ("stages=['quality', 'balance', 'write']", "balance.size=4", "balance.levels=[2]")
    for seed in range(4):
        run(source, tmp_path / "out", *balanced, f"seed={seed}")
        run(source, tmp_path / f"fresh-{seed}", *balanced, f"seed={seed}")
        assert files(tmp_path / "out") == files(tmp_path / f"fresh-{seed}")
    assert done_stages(tmp_path / "out").count("balance") == 4


def test_a_stage_is_done_again_if_an_earlier_one_leaves_other_images(tmp_path: Path, source: Path) -> None:
    balanced = ("stages=['quality', 'balance', 'write']", "balance.size=8", "balance.levels=[2]")
    for number, drop in enumerate(("['dark']", "[]")):
        run(source, tmp_path / "out", *balanced, f"quality.drop={drop}")
        run(source, tmp_path / f"fresh-{number}", *balanced, f"quality.drop={drop}")
        assert files(tmp_path / "out") == files(tmp_path / f"fresh-{number}")
    assert done_stages(tmp_path / "out").count("balance") == 2


@pytest.mark.parametrize(("radius", "neighbours", "copies"), [(0, 0, 0), (10, 0, 1), (0, 4, 1)])
def test_candidates_for_copies_follow_the_settings(
    tmp_path: Path, embedder, radius: int, neighbours: int, copies: int
) -> None:
    size = (96, 80)
    (tmp_path / "in").mkdir()
    for seed in range(6):
        picture(seed, size).save(tmp_path / "in" / f"{seed}.png")
    brighter = np.asarray(picture(3, size)).astype(np.float32) * 0.8 + 45
    Image.fromarray(brighter.astype(np.uint8)).resize((70, 58)).save(tmp_path / "in" / "copy.jpg", quality=70)
    run(
        tmp_path / "in",
        tmp_path / "out",
        "stages=['copies', 'write']",
        f"copies.hash_radius={radius}",
        f"copies.neighbours={neighbours}",
    )
    assert sum(entry.stage == "copies" for entry in read_manifest(tmp_path / "out")) == copies


@pytest.mark.parametrize(
    ("settings", "threshold"), [([], 0.88), (["leaks.threshold=0.95"], 0.92), (["copies.threshold=0.8"], 0.8)]
)
def test_leaks_are_searched_with_the_settings(
    tmp_path: Path, source: Path, monkeypatch, settings: list[str], threshold: float
) -> None:
    similarities = np.arange(0.7, 1, 0.01, np.float32)

    class Seen(ValueError):
        pass

    class Comparison:
        def __init__(self, *given: object) -> None:
            pass

        def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return similarities

    def look(images, evaluation, views, verify, **given) -> None:
        leaks = verify(SimpleNamespace(query=np.zeros(30, np.int64), vector=np.zeros(30, np.int64)))
        raise Seen(given, similarities[leaks].min())

    monkeypatch.setattr("training.curate.copy_stages.StoredComparison", Comparison)
    monkeypatch.setattr("training.curate.copy_stages.find_leaks", look)
    ours = ["leaks.similarity=0.25", "leaks.candidates=7", "leaks.hash_bits=5", f"leaks.evaluation={source}"]
    with pytest.raises(Seen) as seen:
        run(
            fill_folder(tmp_path / "other", 3, first=50),
            tmp_path / "out",
            "stages=['leaks', 'write']",
            *ours,
            *settings,
        )
    given, least = seen.value.args
    assert given == {"threshold": 0.25, "k": 7, "hash_bits": 5}
    assert least == pytest.approx(threshold, abs=0.011)


def test_another_precision_is_calibrated_again(tmp_path: Path, source: Path, monkeypatch) -> None:
    def calibrated(images, pixels, precision: float, seed: int) -> SimpleNamespace:
        return SimpleNamespace(value=precision, describe=lambda: [f"calibrated for {precision}"])

    monkeypatch.setattr("training.curate.copy_stages.calibrate", calibrated)
    for precision in (0.9, 0.95):
        told = run(source, tmp_path / "out", "stages=['copies', 'write']", f"copies.precision={precision}")
        assert f"copies: calibrated for {precision}" in told


def test_faces_are_hidden_only_in_the_images_that_are_curated(tmp_path: Path, source: Path, monkeypatch) -> None:
    hidden: dict[str, bool] = {}

    def scan(settings: ScanSettings, *others: object) -> Scanned:
        hidden[settings.folder.name] = settings.faces is not None
        return plain_scan(replace(settings, faces=None), *others)

    plain_scan = run_module.scan
    monkeypatch.setattr(run_module, "scan", scan)
    evaluation = fill_folder(tmp_path / "evaluation", 3, first=50)
    run(source, tmp_path / "out", "stages=['leaks', 'write']", "faces.hide=true", f"leaks.evaluation={evaluation}")
    assert hidden == {"images": True, "evaluation": False}


@pytest.mark.parametrize("changed", ["pool", "evaluation"])
def test_a_changed_file_makes_the_stages_run_again(tmp_path: Path, source: Path, changed: str) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    picture(500).save(folder / "0.png")
    settings = ("stages=['leaks', 'write']", f"leaks.evaluation={folder}")
    run(source, tmp_path / "out", *settings)
    if changed == "pool":
        picture(500).save(source / "a" / "000.png")  # becomes a leak
    else:
        picture(0).save(folder / "0.png")  # 000.png becomes a leak
    run(source, tmp_path / "out", *settings)
    run(source, tmp_path / "fresh", *settings)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    entry = {entry.key: entry for entry in read_manifest(tmp_path / "out")}["1/a/000.png"]
    assert entry.stage == "leaks"


def test_added_images_give_the_same_as_a_run_from_scratch(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    fill_folder(source, 3, first=50)
    told = run(source, tmp_path / "out")
    assert "4 files read" in told[0]  # and the broken one
    run(source, tmp_path / "scratch")
    assert files(tmp_path / "out") == files(tmp_path / "scratch")


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("training.curate.scan.write_bytes", 2),
        ("training.curate.rows.publish", 1),
        ("training.curate.scan._clear", 1),
        ("training.curate.stages.publish", 1),
        ("training.curate.stages._read_drops", 1),
        ("training.curate.write.write_shard", 2),
        ("training.curate.write._finish", 2),
        ("training.curate.write_stage.write_text", 1),
    ],
)
def test_a_killed_run_continues_and_gives_the_same_bytes(tmp_path: Path, source: Path, where: str, call: int) -> None:
    run(source, tmp_path / "whole")
    replaced = {"training.curate.scan.Embedder": FakeEmbedder, "training.curate.scan.PART_IMAGES": 4}
    assert exit_code_of(partial(run, source, tmp_path / "out"), [where], call, replaced) == -signal.SIGKILL
    before = done_stages(tmp_path / "out") if (tmp_path / "out" / WORK / LOG).exists() else []
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    after = done_stages(tmp_path / "out")
    assert after[: len(before)] == before
    assert len(after) == len(set(after))


def test_restored_images_are_in_the_dataset_of_the_next_run(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    restore(tmp_path / "out", ["1/a/dark.png"])
    told = run(source, tmp_path / "out")
    entry = next(entry for entry in read_manifest(tmp_path / "out") if entry.key == "1/a/dark.png")
    assert entry.part is not None
    assert entry.stage == "quality"
    assert any("1 of them restored" in line for line in told)
    assert done_stages(tmp_path / "out")[3:] == ["write"]


@pytest.mark.parametrize("form", ["shards", "list"])
def test_what_is_missing_of_a_written_dataset_is_made_again(tmp_path: Path, source: Path, form: str) -> None:
    out, settings = tmp_path / "out", (f"write.form={form}", "write.shard_images=3")
    run(source, out, *settings)
    whole = files(out)
    assert {"manifest.jsonl", "report.html", "croissant.json", "curation.json"} < set(whole)
    for name in whole:
        for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])):
            damage(out / name)
            before = done_stages(out)
            run(source, out, *settings)
            assert files(out) == whole, name
            assert set(done_stages(out)[len(before) :]) <= {"write"}
    assert all("done before" in line or line.startswith("dataset") for line in run(source, out, *settings))


def test_intact_shards_are_not_written_again(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out", "write.shard_images=3")
    shards = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert len(shards) > 2
    (tmp_path / "out" / "manifest.jsonl").unlink()
    run(source, tmp_path / "out", "write.shard_images=3")
    assert {path: path.stat().st_ino for path in shards} == shards


def test_a_line_of_the_log_that_was_cut_off_is_removed(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out", "stages=['quality']")
    with (tmp_path / "out" / WORK / LOG).open("a") as log:
        log.write('{"stage": "wri')
    run(source, tmp_path / "out")
    assert done_stages(tmp_path / "out") == ["scan images", "quality", "write"]


def test_named_stages_are_the_only_ones(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out", "stages=['quality']")
    assert done_stages(tmp_path / "out") == ["scan images", "quality"]
    assert not files(tmp_path / "out")


def test_a_full_disk_is_told_and_the_next_run_continues(tmp_path: Path, source: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "publish", full)
        with pytest.raises(OSError, match=r"the disk of .*out is full: make space and start the same command again"):
            run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    assert done_stages(tmp_path / "out") == ["scan images", "quality", "write"]


def test_two_curations_into_one_folder_are_refused(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out", "stages=[]")
    from model.files import lock_file

    lock = lock_file(tmp_path / "out" / WORK / "lock")
    assert lock is not None
    with lock, pytest.raises(ValueError, match="another process curates into"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stages=['quallity']"], "unknown stage 'quallity': the stages are quality"),
        (["quality.dark=2"], "quality.dark=2: must be at most 1"),
        (["quality.drop=['drak']"], "quality.drop"),
        (["scan.min_side=0"], "scan.min_side=0: must be at least 1"),
        (["scan.pooling=max"], "scan.pooling"),
        (["write.form=zip"], "write.form"),
        (["write.held_out_share=1"], "write.held_out_share=1: must be less than 1"),
        (["no_such_section.a=1"], "no_such_section"),
        (["quality.drop"], "'quality.drop' must have the form section.key=value"),
        (["seed.x=1"], "seed"),
        (["=5"], "'=5' must have the form section.key=value"),
        (["quality.dark=true"], "quality.dark=True: must not be true or false"),
        (["write.shard_images=true"], "write.shard_images=True: must not be true or false"),
        (["copies.precision=true"], "copies.precision=True: must not be true or false"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_before_any_work(
    tmp_path: Path, source: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        run(source, tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_used_are_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="is inside"):
        run(source, source / "out")
    with pytest.raises(ValueError, match="given twice"):
        Curation((str(source), str(source)), tmp_path / "out", load_settings(None))
    with pytest.raises(ValueError, match="the dataset would become one of its sources"):
        run(source, source / "out")
    (tmp_path / "test").mkdir()
    settings = load_settings(None, [f"leaks.evaluation={tmp_path / 'test'}"])
    with pytest.raises(ValueError, match=r"is inside the source .*test: the dataset would"):
        Curation((str(source),), tmp_path / "test" / "out", settings)
    with pytest.raises(ValueError, match="no sources"):
        Curation((), tmp_path / "out", load_settings(None))


def test_a_stage_that_drops_everything_is_an_error(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="the stage quality drops all 11 remaining images"):
        run(source, tmp_path / "out", "quality.light=1", "quality.drop=['light']")


def test_a_settings_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "curate.toml").write_text("[quality\n")
    with pytest.raises(ValueError, match=r"curate.toml is not TOML"):
        load_settings(tmp_path / "curate.toml")
    (tmp_path / "curate.toml").write_text("seed = 3\n[quality]\ndark = 0.5\n")
    settings = load_settings(tmp_path / "curate.toml", ["quality.dark=0.25"])
    assert (settings.seed, settings.quality.dark) == (3, 0.25)


@pytest.mark.parametrize("content", ["[]", '{"sources": [5], "directory": "/", "settings": {}}', "[" * 100_000, "\xff"])
def test_a_damaged_record_of_the_command_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / ".curate").mkdir()
    (tmp_path / ".curate" / "command.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"command.json is damaged"):
        last_command(tmp_path)


def test_names_cannot_control_the_terminal(tmp_path: Path, source: Path) -> None:
    (source / "0\n\x1b[31m.jpg").write_bytes(b"")
    told = run(source, tmp_path / "out")
    assert r"0\n\x1b[31m.jpg" in told[0]
    assert all(line.isprintable() for line in told)


def test_half_of_the_examples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sensitive.examples is set, but sensitive.harmless is not"):
        load_settings(None, ["sensitive.examples=a"])
    with pytest.raises(ValueError, match=r"examples.bad is set, but examples.good is not"):
        load_settings(None, ["examples.bad=a"])
    load_settings(None, ["sensitive.examples=a", "stages=['quality']"])
