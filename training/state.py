"""Where a run stands, on disk: everything needed to go on after the power was cut.

The random choices of a step depend on (seed, step, sample) alone (`training/randomness.py`), so the networks, the
optimizer, moving centres, what the sentinels remember and the step number are the whole state.

`states/` in the run's folder holds the last few, each a file of tensors (`000001200.pt`) and a small JSON beside it
that is written last and carries the file's digest: a state without it, or with another digest, was cut off, and the one
before it is taken. Tensors are whole, whatever the ranks kept of them, so a run of two ranks goes on with one.
Read with `weights_only`: a state file cannot run code.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from training.distributed import World, put, wait_for_all, whole
from training.student_teacher import Network

FOLDER = "states"

# What may change between the run that stopped and the run that goes on: where it runs, and what it shows.
FREE_SETTINGS = {
    *("out", "data", "device", "compile", "strategy", "micro_batch", "checkpoint_blocks"),
    *(
        "workers",
        "ahead_steps",
        "ahead_bytes",
        "measure_peak",
        "log_every",
        "save_every_minutes",
        "keep_states",
        "keep_checkpoints_every_epochs",
    ),
    *("eval_every_epochs", "sheet_every", "wandb", "whiten", "eval_resize", "eval_crop"),
}


@dataclass(frozen=True)
class Parts:
    """The pieces of a run that change with each step.

    `teacher` gives the targets: it is `ema` itself, or, in distillation, a larger network that never changes and is not
    part of the state. `buffers` are the moving centres and fp16's loss scale, where there are any.
    """

    student: Network
    ema: Network
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    buffers: dict[str, Tensor]


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings (JSON types) that a resumed run must share with the one it continues."""
    return {key: value for key, value in settings.items() if key not in FREE_SETTINGS}


def _whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU where `keep`, else nothing: every rank must take part, one at a time fits in memory."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu()
    return found


def _optimizer_tensors(parts: Parts) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name/key`."""
    state = parts.optimizer.state
    return {
        f"{name}/{key}": value
        for name, parameter in parts.student.named_parameters()
        for key, value in state.get(parameter, {}).items()
    }


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(
    out: Path, parts: Parts, step: int, settings: dict[str, Any], memory: dict[str, Any], keep: int, world: World
) -> None:
    """Write the state after `step` steps, and drop all but the newest `keep`. Every rank must call it; rank 0 writes.

    Args:
        out: the run's folder.
        settings: of the run; a run with others is refused.
        memory: JSON of what else must come back (sentinels, data).

    Raises:
        OSError: it cannot be written; the states before it are as they were.
    """
    state = {
        "student": _whole(parts.student.state_dict(), world.is_main),
        "ema": _whole(parts.ema.state_dict(), world.is_main),
        "optimizer": _whole(_optimizer_tensors(parts), world.is_main),
        "buffers": _whole(parts.buffers, world.is_main),
    }
    if world.is_main:
        folder = out / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{step:09}.pt"
        temporary = path.with_suffix(".part")
        try:
            torch.save(state, temporary)
            _sync(temporary)
            note = {"step": step, "digest": _digest(temporary), "settings": comparable(settings), "memory": memory}
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _write_note(path.with_suffix(".json"), note)
        for old in sorted(folder.glob("*.json"))[:-keep]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)
    wait_for_all(world)


def _write_note(path: Path, note: dict[str, Any]) -> None:
    temporary = path.with_suffix(".note.part")
    with temporary.open("w") as file:
        json.dump(note, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


@dataclass(frozen=True)
class Saved:
    """A state on disk that is whole."""

    path: Path
    step: int
    settings: dict[str, Any]
    memory: dict[str, Any]


def find_state(out: Path, at_most: int | None = None) -> tuple[Saved | None, list[str]]:
    """The newest whole state (of step `at_most` or before), and what is to be said of newer ones that are not whole."""
    broken: list[str] = []
    for note in sorted((out / FOLDER).glob("*.json"), reverse=True):
        path = note.with_suffix(".pt")
        if at_most is not None and int(path.stem) > at_most:
            continue
        try:
            found = json.loads(note.read_text())
            if _digest(path) != found["digest"]:
                raise ValueError("its contents are not what was written")
            return Saved(path, found["step"], found["settings"], found["memory"]), broken
        except (OSError, ValueError, KeyError) as error:
            broken.append(f"{path.name} is damaged ({error}): the state before it is taken")
    return None, broken


def drop_states(out: Path, after: int) -> None:
    """Remove the states of later steps than `after`: a run that was rolled back makes others."""
    for note in (out / FOLDER).glob("*.json"):
        if int(note.stem) > after:
            note.unlink()
            note.with_suffix(".pt").unlink(missing_ok=True)


def check_same_settings(saved: Saved, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings.

    Raises:
        ValueError: the state belongs to a run with other settings; the message names them.
    """
    mine, theirs = comparable(settings), comparable(saved.settings)
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in differing)
        raise ValueError(
            f"{saved.path.parent} is of a run with other settings ({changes}); choose another out folder or remove it"
        )


@torch.no_grad()
def load_state(saved: Saved, parts: Parts) -> None:
    """Put a saved state into `parts`, whatever number of ranks wrote it and reads it."""
    state = torch.load(saved.path, map_location="cpu", weights_only=True, mmap=True)
    for network, name in ((parts.student, "student"), (parts.ema, "ema")):
        targets = network.state_dict()
        assert targets.keys() == state[name].keys()
        for key, target in targets.items():
            target.copy_(put(target, state[name][key]))
    parts.optimizer.state.clear()
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_key, value in state["optimizer"].items():
        name, _, key = full_key.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    for name, parameter in parts.student.named_parameters():
        if name in by_name:
            parts.optimizer.state[parameter] = {
                key: put(parameter, value) if value.shape == parameter.shape else value.to(parameter.device)
                for key, value in by_name[name].items()
            }
    for name, value in parts.buffers.items():
        value.copy_(state["buffers"][name])
