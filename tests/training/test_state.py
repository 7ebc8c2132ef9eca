"""States on disk: whole or not there, the one before where one is damaged, never a new start over a long run."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.disk_log import DiskLog
from tests.training.tiny import ALONE
from training import state as states
from training.config import TrainConfig
from training.setup import make_setup
from training.state import (
    Saved,
    alone_in,
    check_same_settings,
    drop_states,
    find_state,
    load_state,
    remember,
    save_state,
    start_from,
)

SETTINGS = {
    "data": "-",
    "out": "-",
    "vit": {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 28},
    "global_size": 28,
    "local_size": 14,
    "eval_crop": 28,
    "n_prototypes": 8,
    "head_hidden_dim": 8,
    "head_bottleneck_dim": 4,
    "centering": "softmax",
}


def parts_at(step):
    """The parts of a run whose weights, centre and optimizer say which step it is."""
    config = TrainConfig.model_validate(SETTINGS)
    parts = make_setup(config, ALONE).parts
    for parameter in parts.student.parameters():
        torch.nn.init.constant_(parameter, step)
        parts.optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": torch.full_like(parameter, 7)}
    parts.buffers["dino"].fill_(step)
    return parts


def save(out, step, keep=3, needed=()):
    return save_state(out, parts_at(step), step, SETTINGS, {"note": step}, keep, ALONE, needed)


def steps_in(out):
    names = sorted(path.name for path in (out / "states").iterdir())
    assert all(f"{name[:9]}.{other}" in names for name in names for other in ("pt", "json")), names
    return sorted({int(name[:9]) for name in names})


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for step in (0, 10, 20):
        save(folder, step)
    return folder


@pytest.fixture
def out(three, tmp_path):
    return shutil.copytree(three, tmp_path, dirs_exist_ok=True)


def test_a_state_comes_back_whole(out):
    saved, broken = start_from(out)
    assert (saved.step, saved.memory, broken) == (20, {"note": 20}, [])
    parts = parts_at(5)
    load_state(saved, parts)
    assert all((p == 20).all() for p in parts.student.parameters())
    assert (parts.buffers["dino"] == 20).all()
    assert {float(state["step"]) for state in parts.optimizer.state.values()} == {20.0}
    assert all((state["exp_avg"] == 7).all() for state in parts.optimizer.state.values())


def test_student_and_average_come_back_each_as_it_was(tmp_path):
    parts = parts_at(3)
    for parameter in parts.ema.parameters():
        torch.nn.init.constant_(parameter, 8)
    save_state(tmp_path, parts, 1, SETTINGS, {}, 1, ALONE)
    other = parts_at(5)
    load_state(find_state(tmp_path)[0], other)
    assert all((p == 3).all() for p in other.student.parameters())
    assert all((p == 8).all() for p in other.ema.parameters())
    assert other.teacher is other.ema


def test_a_run_that_began_in_bf16_continues_in_fp16_with_the_first_loss_scale(out):
    """With precision=auto, the GPU decides."""
    parts = parts_at(5)
    parts.buffers["loss_scale"] = torch.tensor(2.0**16)
    load_state(find_state(out)[0], parts)
    assert float(parts.buffers["loss_scale"]) == 2.0**16
    assert (parts.buffers["dino"] == 20).all()


def test_an_optimizer_that_has_gone_further_forgets_what_the_state_has_not(tmp_path):
    parts = parts_at(3)
    parts.optimizer.state.clear()
    save_state(tmp_path, parts, 0, SETTINGS, {}, 1, ALONE)
    other = parts_at(5)
    load_state(find_state(tmp_path)[0], other)
    assert not other.optimizer.state


# What may be other in the run that goes on: where it runs, how fast, and what it shows.
FREE = {
    *("out", "data", "device", "compile", "strategy", "micro_batch", "checkpoint_blocks", "workers", "ahead_steps"),
    *("ahead_bytes", "measure_peak", "log_every", "save_every_minutes", "keep_states", "eval_every_epochs"),
    *("keep_checkpoints_every_epochs", "sheet_every", "wandb", "mlflow", "whiten", "eval_resize", "eval_crop"),
    *("scale", "hours", "estimate", "evaluations", "measure_margin", "patience", "sentinel_lines"),
    *("on_collapse", "on_measure", "on_not_finite", "min_rankme_share", "max_rollbacks", "rollback_lr_factor"),
}


@pytest.mark.parametrize("name", sorted(TrainConfig.model_fields))
def test_a_run_goes_on_with_its_own_settings_but_for_those_that_change_no_weight(name):
    settings = TrainConfig.model_validate(SETTINGS).model_dump(mode="json")
    saved = Saved(Path("run/states/000000010.pt"), 10, settings, {})
    check_same_settings(saved, dict(settings))
    changed = settings | {name: "another"}
    if name in FREE:
        check_same_settings(saved, changed)
    else:
        with pytest.raises(
            ValueError, match=rf"run/states is from a run with other settings \({name}: .* -> another\)"
        ):
            check_same_settings(saved, changed)


def cut(folder, name):
    path = folder / f"{name}.pt"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder, name):
    path = folder / f"{name}.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose(folder, name):
    (folder / f"{name}.pt").unlink()


def tear(folder, name):
    path = folder / f"{name}.json"
    path.write_text(path.read_text()[:40])


def empty(folder, name):
    (folder / f"{name}.json").write_bytes(b"")


def replace(folder, name):
    (folder / f"{name}.json").write_text("[1, 2]")


def zero(folder, name):  # what a file system may leave after the power was cut
    path = folder / f"{name}.json"
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES = [cut, flip, lose, tear, empty, replace, zero]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_and_that_is_said(out, damage):
    damage(out / "states", "000000020")
    saved, broken = start_from(out)
    assert saved.step == 10
    assert len(broken) == 1
    assert "000000020.pt is damaged" in broken[0]
    assert "the state before it" in broken[0]
    assert find_state(out, at_most=9)[0].step == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_a_whole_state_is_not_started_anew(out, damage):
    for step in (0, 10, 20):
        damage(out / "states", f"{step:09}")
    with pytest.raises(ValueError, match=r"up to step 20, but none is complete.*remove .*states to start again"):
        start_from(out)
    assert len(list((out / "states").glob("*.json"))) == 3  # still there, to be mended


def test_states_without_their_notes_are_not_thrown_away(out):
    for path in (out / "states").glob("*.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"their \.json files are missing"):
        start_from(out)
    assert len(list((out / "states").glob("*.pt"))) == 3


def test_before_the_first_step_there_is_nothing_to_lose(tmp_path):
    assert start_from(tmp_path) == (None, [])
    save(tmp_path, 0)
    flip(tmp_path / "states", "000000000")
    saved, broken = start_from(tmp_path)
    assert saved is None
    assert len(broken) == 1
    (tmp_path / "states" / "000000000.json").unlink()  # killed before the note was written
    assert start_from(tmp_path) == (None, [])


def test_what_a_killed_process_left_half_written_is_removed(out):
    folder = out / "states"
    for name in ("000000030.part", ".000000030.json.part", "000000030.pt", "000000005.pt"):
        (folder / name).write_bytes(b"half")
    (out / ".checkpoint.safetensors-abc.part").write_bytes(b"half")
    assert start_from(out)[0].step == 20
    assert steps_in(out) == [0, 10, 20]
    assert not list(out.glob(".*.part"))


def test_damaged_states_do_not_push_out_whole_ones(out):
    flip(out / "states", "000000020")
    assert start_from(out)[0].step == 10
    drop_states(out, 10)
    save(out, 15, keep=1)
    assert steps_in(out) == [15]
    assert find_state(out)[0].step == 15


def test_the_newest_stay_and_what_a_sentinel_may_go_back_to(out):
    save(out, 30, keep=1, needed=[12])
    assert steps_in(out) == [10, 30]
    save(out, 40, keep=2, needed=[35])
    assert steps_in(out) == [30, 40]
    (out / "states" / "notes of mine.json").write_text("{}")
    assert find_state(out, at_most=39)[0].step == 30


def test_what_is_remembered_changes_without_the_tensors(out):
    saved, _ = find_state(out)
    before = saved.path.read_bytes()
    remember(saved, {"note": "other"})
    again, broken = find_state(out)
    assert (again.step, again.memory, again.settings, broken) == (20, {"note": "other"}, saved.settings, [])
    assert saved.path.read_bytes() == before


def test_a_state_is_on_the_disk_before_it_has_its_name_and_before_its_note(tmp_path, monkeypatch):
    log = DiskLog(monkeypatch)
    save(tmp_path, 10)
    path = tmp_path / "states" / "000000010.pt"
    log.assert_durable(path)
    log.assert_durable(path.with_suffix(".json"))
    assert [Path(name).name for what, _, name in log.events if what == "renamed"] == [path.name, f"{path.stem}.json"]


def test_what_is_remembered_is_on_the_disk_before_it_has_its_name(out, monkeypatch):
    saved, _ = find_state(out)
    log = DiskLog(monkeypatch)
    remember(saved, {})
    log.assert_durable(saved.path.with_suffix(".json"))


def test_a_state_loses_its_note_first(out, monkeypatch):
    unlinked, unlink = [], Path.unlink

    def logged(path, missing_ok=False):
        unlinked.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", logged)
    drop_states(out, 10)
    assert unlinked == ["000000020.json", "000000020.pt"]


class FullDisk:
    """`os.fsync` of a disk that is full at the n-th call: each file is flushed, so each can be hit."""

    def __init__(self, at):
        self.left = at

    def __call__(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", [0, 1])
def test_a_full_disk_leaves_the_states_before_it(out, monkeypatch, at):
    monkeypatch.setattr(os, "fsync", FullDisk(at))
    with pytest.raises(OSError, match=r"state of step 30 cannot be written.*No space left.*free space in"):
        save(out, 30)
    monkeypatch.undo()
    saved, broken = start_from(out)
    assert (saved.step, broken) == (20, [])
    assert steps_in(out) == [0, 10, 20]


def test_torchs_own_error_of_a_full_disk_is_one_of_the_system(out, monkeypatch):
    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nstack")

    monkeypatch.setattr(states.torch, "save", full)
    with pytest.raises(OSError, match=r"step 30 cannot be written.*unexpected pos"):
        save(out, 30)
    assert not list((out / "states").glob("*.part"))


def test_one_process_at_a_time(tmp_path):
    with alone_in(tmp_path):
        with (
            pytest.raises(ValueError, match=f"another process trains in .*process {os.getpid()} on "),
            alone_in(tmp_path),
        ):
            pass
        with pytest.raises(ValueError, match="another process"), alone_in(tmp_path):  # the refused one freed nothing
            pass
    with alone_in(tmp_path):  # what lies there is no lock, if nobody holds it
        assert json.dumps(str(os.getpid())).strip('"') in (tmp_path / "lock").read_text()
