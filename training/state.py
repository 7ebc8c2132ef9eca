"""A run's state on disk: everything needed to resume after a power cut.

The random choices of a step depend only on (seed, step, sample) (`training/randomness.py`), so the networks, the
optimizer, moving centres, the sentinels' memory and the step number are the whole state.

`states/` in the run's folder holds the last few. Each is a file of tensors (`000001200.pt`) with a small JSON file that
is written last and has the tensor file's digest. A state without JSON file, or with another digest, is incomplete, and
the one before it is used. Tensors are saved whole even if the ranks hold slices, so one rank can resume a run of two.
States are read with `weights_only`: a state file cannot run code.

Only one process at a time may write there (`alone_in`): two would delete each other's states.
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

# Settings that may change when a run is resumed: those of the machine and of the output.
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
    """The parts of a run that change with each step.

    `teacher` gives the targets. It is `ema` itself or, in distillation, a larger network that never changes and is not
    part of the state. `buffers` holds the moving centres and fp16's loss scale, if there are any.
    """

    student: Network
    ema: Network
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    buffers: dict[str, Tensor]


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings (JSON types) that a resumed run must share with the saved one."""
    return {key: value for key, value in settings.items() if key not in FREE_SETTINGS}


def _whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the CPU if `keep`, else nothing. All ranks must call it; each has one whole at a time."""
    copies = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            copies[name] = value.cpu()
    return copies


def _optimizer_tensors(parts: Parts) -> dict[str, Tensor]:
    """Return the optimizer's tensors by `parameter name/key`."""
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
    """Write the state after `step` steps and delete states that are no longer needed.

    Every rank must call it; rank 0 writes the state and returns it.

    Args:
        out: the run's folder.
        settings: the run's settings; resuming with others is refused.
        memory: further data to restore (sentinels, data), as JSON types.
        keep: how many of the newest states to keep.
        needed: steps that a sentinel may roll back to. For each, the newest state of that step or before is kept too.

    Raises:
        OSError: the state cannot be written; earlier states are unchanged.
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
                f"the state of step {step} cannot be written: {error}. Earlier states are intact: free space in "
                f"{folder} (keep_states sets how many are kept), then run the same command again to resume"
            ) from error
        _prune(folder, step, keep, needed)
        saved = Saved(path, step, note["settings"], memory)
    wait_for_all(world)
    return saved


def _write_tensors(path: Path, state: dict[str, Any]) -> str:
    """Write the state's file; return its digest."""
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:  # torch.save would write the name of a path into the file
                torch.save(state, file)
        except RuntimeError as error:  # torch reports a full disk as one
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
        return _digest(temporary)


def _notes(folder: Path) -> list[Path]:
    """Return the states' JSON files, newest first."""
    return sorted((path for path in folder.glob("*.json") if path.stem.isdecimal()), reverse=True)


def _drop(note: Path) -> None:
    """Remove a state: first the JSON file, without which the state does not count."""
    note.unlink()
    note.with_suffix(".pt").unlink(missing_ok=True)


def _prune(folder: Path, step: int, keep: int, needed: Sequence[int]) -> None:
    """Delete states that are neither among the newest `keep` nor needed for a rollback."""
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
    """A complete state on disk."""

    path: Path
    step: int
    settings: dict[str, Any]
    memory: dict[str, Any]


def find_state(out: Path, at_most: int | None = None) -> tuple[Saved | None, list[str]]:
    """Return the newest complete state (of step `at_most` or before), and messages about newer damaged ones."""
    broken: list[str] = []
    for note in _notes(out / FOLDER):
        path = note.with_suffix(".pt")
        if at_most is not None and int(path.stem) > at_most:
            continue
        try:
            record = json.loads(note.read_text())
            if _digest(path) != record["digest"]:
                raise ValueError("its contents are not what was written")
            return Saved(path, record["step"], record["settings"], record["memory"]), broken
        except (OSError, ValueError, KeyError, TypeError) as error:  # TypeError: JSON, but not an object
            broken.append(f"{path.name} is damaged ({error}): using the state before it")
    return None, broken


def start_from(out: Path) -> tuple[Saved | None, list[str]]:
    """Return the state that a run in `out` resumes from, None for a fresh start, and messages about damaged states.

    Only the process that holds the lock may call it, because it removes incomplete files of killed processes.

    Raises:
        ValueError: there are states of a run, but all are damaged; the user has to decide what to do.
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
            f"{folder} has states of a run up to step {lost[-1]}, but none is complete: {reasons}. Restore one, or "
            f"remove {folder} to start again (init={out / 'checkpoint.safetensors'} starts from its backbone)"
        )
    if saved is not None:
        noted = {note.stem for note in _notes(folder)}
        for path in folder.glob("*.pt"):
            if path.stem not in noted:  # the process was killed before it wrote the note, or inside `_drop`
                path.unlink()
    return saved, broken


def remember(saved: Saved, memory: dict[str, Any]) -> None:
    """Replace what a state stores besides the tensors.

    Raises:
        OSError: it cannot be written; the state is unchanged.
    """
    note = saved.path.with_suffix(".json")
    write_text(note, json.dumps({**json.loads(note.read_text()), "memory": memory}))


def drop_states(out: Path, after: int) -> None:
    """Remove the states of steps later than `after`: damaged ones, or those that a rollback discards."""
    for note in _notes(out / FOLDER):
        if int(note.stem) > after:
            _drop(note)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Lock the run's folder. Other processes are refused until this one has ended, even if it is killed.

    Raises:
        ValueError: another process holds the lock.
    """
    path = out / LOCK
    try:
        file = lock_file(path)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise
        warnings.warn(f"{path} cannot be locked ({error}): do not start a second run in {out}", stacklevel=3)
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
    """Refuse to resume with other settings.

    Raises:
        ValueError: the state belongs to a run with other settings; the message names them.
    """
    mine, theirs = comparable(settings), comparable(saved.settings)
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in differing)
        raise ValueError(
            f"{saved.path.parent} is from a run with other settings ({changes}); choose another out folder or remove it"
        )


@torch.no_grad()
def load_state(saved: Saved, parts: Parts) -> None:
    """Load a saved state into `parts`. The number of ranks may differ from the one that wrote it."""
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
