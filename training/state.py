"""Where a run stands, on disk: everything needed to go on after the power was cut.

The random choices of a step depend on (seed, step, sample) alone (`training/randomness.py`), so the networks, the
optimizer, moving centres, what the sentinels remember and the step number are the whole state.

`states/` in the run's folder holds the last few, each a file of tensors (`000001200.pt`) and a small JSON beside it
that is written last and carries the file's digest: a state without it, or with another digest, was cut off, and the one
before it is taken. Tensors are whole, whatever the ranks kept of them, so a run of two ranks goes on with one.
Read with `weights_only`: a state file cannot run code.

One process at a time may write there (`alone_in`): two would drop each other's states.
"""

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from model.files import lock_file, replacing, write_text
from training.distributed import World, put, wait_for_all, whole
from training.student_teacher import Network

FOLDER = "states"
LOCK = "lock"

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


def save_state(
    out: Path,
    parts: Parts,
    step: int,
    settings: dict[str, Any],
    memory: dict[str, Any],
    keep: int,
    world: World,
    needed: Sequence[int] = (),
) -> "Saved | None":
    """Write the state after `step` steps, and drop what is no longer needed. Every rank must call it; rank 0 writes,
    and gets what it wrote.

    Args:
        out: the run's folder.
        settings: of the run; a run with others is refused.
        memory: JSON of what else must come back (sentinels, data).
        keep: how many of the newest states stay.
        needed: steps that a sentinel may go back to: of each, the newest state of it or before stays too.

    Raises:
        OSError: it cannot be written; the states before it are as they were.
    """
    state = {
        "student": _whole(parts.student.state_dict(), world.is_main),
        "ema": _whole(parts.ema.state_dict(), world.is_main),
        "optimizer": _whole(_optimizer_tensors(parts), world.is_main),
        "buffers": _whole(parts.buffers, world.is_main),
    }
    saved = None
    if world.is_main:
        folder = out / FOLDER
        path = folder / f"{step:09}.pt"
        try:
            folder.mkdir(exist_ok=True)
            digest = _write_tensors(path, state)
            note: dict[str, Any] = {"step": step, "digest": digest, "settings": comparable(settings), "memory": memory}
            write_text(path.with_suffix(".json"), json.dumps(note))
        except OSError as error:
            raise OSError(
                f"the state of step {step} cannot be written: {error}. Those before it are whole: make room in "
                f"{folder} (keep_states says how many are kept), and the same command goes on"
            ) from error
        _prune(folder, step, keep, needed)
        saved = Saved(path, step, note["settings"], memory)
    wait_for_all(world)
    return saved


def _write_tensors(path: Path, state: dict[str, Any]) -> str:
    """The state's file; its digest."""
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:  # a path's name would become part of the content
                torch.save(state, file)
        except RuntimeError as error:  # a full disk arrives as one
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
        return _digest(temporary)


def _notes(folder: Path) -> list[Path]:
    """The states' JSON files, the newest first."""
    return sorted((path for path in folder.glob("*.json") if path.stem.isdecimal()), reverse=True)


def _drop(note: Path) -> None:
    """Remove a state: first the note, without which it counts as never written."""
    note.unlink()
    note.with_suffix(".pt").unlink(missing_ok=True)


def _prune(folder: Path, step: int, keep: int, needed: Sequence[int]) -> None:
    """Drop states that are neither among the newest `keep` nor what a sentinel may go back to."""
    notes = _notes(folder)
    stay = set(notes[:keep])
    for old in needed:
        stay |= set([note for note in notes if int(note.stem) <= old][:1])
    assert folder / f"{step:09}.json" in stay, "a state of a later step is left"
    for note in notes:
        if note not in stay:
            _drop(note)


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
    for note in _notes(out / FOLDER):
        path = note.with_suffix(".pt")
        if at_most is not None and int(path.stem) > at_most:
            continue
        try:
            found = json.loads(note.read_text())
            if _digest(path) != found["digest"]:
                raise ValueError("its contents are not what was written")
            return Saved(path, found["step"], found["settings"], found["memory"]), broken
        except (OSError, ValueError, KeyError, TypeError) as error:  # TypeError: JSON, but no object
            broken.append(f"{path.name} is damaged ({error}): the state before it is taken")
    return None, broken


def start_from(out: Path) -> tuple[Saved | None, list[str]]:
    """What a run in `out` goes on from, None for a fresh start, and what is to be said of damaged states.

    Only the process that holds the lock may call it: what a killed one left half written is removed.

    Raises:
        ValueError: states of a run are there, and not one is whole: starting anew is not for us to decide.
    """
    folder = out / FOLDER
    for leftover in [*folder.glob("*.part"), *out.glob(".*.part")]:
        leftover.unlink()
    saved, broken = find_state(out)
    written = {path.stem for path in (*_notes(folder), *folder.glob("*.pt")) if path.stem.isdecimal()}
    lost = sorted(int(stem) for stem in written if int(stem) > 0)  # before the first step there is nothing to lose
    if saved is None and lost:
        reasons = "; ".join(message.partition(":")[0] for message in broken) or "their .json files are missing"
        raise ValueError(
            f"{folder} holds states of a run up to step {lost[-1]}, and none is whole: {reasons}. Put a whole one "
            f"back, or remove {folder} to start anew (init={out / 'checkpoint.safetensors'} starts from its backbone)"
        )
    if saved is not None:
        known = {note.stem for note in _notes(folder)}
        for path in folder.glob("*.pt"):
            if path.stem not in known:  # killed before its note was written, or between the two steps of `_drop`
                path.unlink()
    return saved, broken


def remember(saved: Saved, memory: dict[str, Any]) -> None:
    """Replace what a state remembers besides the tensors.

    Raises:
        OSError: it cannot be written; the state is as it was.
    """
    note = saved.path.with_suffix(".json")
    write_text(note, json.dumps({**json.loads(note.read_text()), "memory": memory}))


def drop_states(out: Path, after: int) -> None:
    """Remove the states of later steps than `after`: damaged ones, or those of a run that was rolled back."""
    for note in _notes(out / FOLDER):
        if int(note.stem) > after:
            _drop(note)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the run's folder: another process that comes here is refused until this one has ended, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    path = out / LOCK
    try:
        file = lock_file(path)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise
        warnings.warn(f"{path} cannot be locked ({error}): start no second run in {out}", stacklevel=3)
        yield
        return
    if file is None:
        holder = path.read_text().strip() or "unknown"
        raise ValueError(f"another process trains in {out} ({holder}): wait for it, or choose another out")
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield


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
