"""Save the states of a run to disk, so that the run can resume after an interruption or roll back.

A state contains the student, its moving average, the optimizer, the moving centres, the step number, and the state of
the sentinels (checks that detect a failing run). Nothing else is needed, because the random choices of a step depend
only on (seed, step, sample) (`training/randomness.py`).

The newest states are stored in the folder `states/` inside the run's folder. Each state consists of a file of tensors
(such as `000001200.pt`) and a small JSON file, which is written last and contains the digest of the tensor file. If the
JSON file is missing or the digest differs, the state is incomplete, and the run uses the previous state. Tensors are
saved in full even if each rank has only a slice of them, so a run can resume with another number of ranks. States are
loaded with `weights_only`, so a state file cannot run code.

Only one run at a time may write to a run's folder (`alone_in`), because two runs would delete each other's states.
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
KEPT_BEST = f"{FOLDER}/best.safetensors"  # the best backbone so far, never whitened

# Settings that may change when a run is resumed. They concern the machine, the output, or what the run watches.
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
    *("eval_every_epochs", "evaluations", "sheet_every", "wandb", "mlflow", "whiten", "eval_resize", "eval_crop"),
    *("scale", "hours", "estimate"),  # what they chose is in the state
    *("measure_margin", "patience", "sentinel_lines", "min_rankme_share", "max_rollbacks"),
    *("on_collapse", "on_measure", "on_not_finite", "rollback_lr_factor"),
}


@dataclass(frozen=True)
class Parts:
    """The networks, the optimizer and the buffers of a run.

    `ema` is the moving average of the student. `teacher` computes the targets. It is `ema` itself or, in distillation,
    a frozen network, which is not saved. `buffers` contains the moving centres and fp16's loss scale, if the run uses
    them.
    """

    student: Network
    ema: Network
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    buffers: dict[str, Tensor]


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `settings` that must be the same when a run is resumed."""
    return {key: value for key, value in settings.items() if key not in FREE_SETTINGS}


def _whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather tensors that may be sharded, and return them on the CPU, keyed by name.

    If `keep` is False, the result is empty. Tensors are gathered one at a time to save memory. All ranks must call this
    function, because each contributes its slices.
    """
    copies = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            copies[name] = value.cpu()
    return copies


def _optimizer_tensors(parts: Parts) -> dict[str, Tensor]:
    """Return the tensors of the optimizer's state, named `PARAMETER/KEY` with keys such as `exp_avg`."""
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
    """Write the state after `step` steps, and delete states that are no longer needed.

    Every rank must call this function. Rank 0 writes the state and returns it. The other ranks return None.

    Args:
        out: the run's folder.
        parts: the networks, the optimizer and the buffers to save.
        step: the number of steps done.
        settings: the run's settings. Those that must not change (see `comparable`) are stored in the state.
        memory: values to store in addition to tensors, as JSON types: the digests of the images and of the teacher, and
            the state of the sentinels (checks that detect a failing run).
        keep: the number of newest states to keep.
        world: the rank of this process and the number of ranks.
        needed: steps that the run may have to roll back to. For each of them, the newest state from that step or
            earlier is kept too.

    Raises:
        OSError: the state cannot be written. Earlier states are unchanged.
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
    """Write the tensors of a state to a file, and return the digest of the file."""
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:  # given a path, torch.save would write the path's name into the file
                torch.save(state, file)
        except RuntimeError as error:  # torch raises this for a full disk
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
        return _digest(temporary)


def _notes(folder: Path) -> list[Path]:
    """Return the paths of the JSON files of all states in `folder`, newest state first."""
    return sorted((path for path in folder.glob("*.json") if path.stem.isdecimal()), reverse=True)


def _drop(note: Path) -> None:
    """Delete a state from disk. Its JSON file `note` is deleted first, so that a half-deleted state is never used."""
    note.unlink()
    note.with_suffix(".pt").unlink(missing_ok=True)


def _prune(folder: Path, step: int, keep: int, needed: Sequence[int]) -> None:
    """Delete the states that are neither among the newest `keep` states nor needed for a rollback.

    For each step in `needed`, the newest state from that step or earlier is kept. `step` is the step of the state that
    was just written.
    """
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
    """A complete state on disk: the path of its tensor file, its step, and the content of its JSON file.

    `settings` contains only the settings that must be the same when a run is resumed. `memory` contains the values that
    were passed to `save_state` as `memory`.
    """

    path: Path
    step: int
    settings: dict[str, Any]
    memory: dict[str, Any]


def find_state(out: Path, at_most: int | None = None) -> tuple[Saved | None, list[str]]:
    """Find the newest complete state of a run, and list the newer states that are damaged.

    Args:
        out: the run's folder.
        at_most: the latest step to consider. By default the states of all steps are considered.

    Returns:
        two values: the newest complete state (None if there is none), and a list of messages about newer states,
        all of which are damaged.
    """
    broken: list[str] = []
    for note in _notes(out / FOLDER):
        path = note.with_suffix(".pt")
        if at_most is not None and int(path.stem) > at_most:
            continue
        try:
            record = json.loads(note.read_text())
            if _digest(path) != record["digest"]:
                raise ValueError("its digest differs from the digest in the JSON file")
            return Saved(path, record["step"], record["settings"], record["memory"]), broken
        except (OSError, ValueError, KeyError, TypeError) as error:  # TypeError: JSON, but not an object
            broken.append(f"{path.name} is damaged ({error}): using the state before it")
    return None, broken


def start_from(out: Path) -> tuple[Saved | None, list[str]]:
    """Return two values: the state from which a run in the folder `out` resumes, and messages about damaged states.

    The state is None if the run has to start at step 0. Only the process that holds the lock of `out` may call this
    function, because it removes incomplete files that killed processes have left.

    Raises:
        ValueError: the folder contains states later than step 0, but no complete state. The user has to restore or
            remove them.
    """
    folder = out / FOLDER
    for leftover in [*folder.glob("*.part"), *out.glob(".*.part")]:
        leftover.unlink()
    saved, broken = find_state(out)
    written = {path.stem for path in (*_notes(folder), *folder.glob("*.pt")) if path.stem.isdecimal()}
    lost = sorted(int(stem) for stem in written if int(stem) > 0)  # losing the state of step 0 does no harm
    if saved is None and lost:
        reasons = "; ".join(message.partition(":")[0] for message in broken) or "their .json files are missing"
        raise ValueError(
            f"{folder} has states of a run up to step {lost[-1]}, but none is complete: {reasons}. Restore one, or "
            f"remove {folder} to start again (init={out / 'checkpoint.safetensors'} uses the trained backbone)"
        )
    if saved is not None:
        noted = {note.stem for note in _notes(folder)}
        for path in folder.glob("*.pt"):
            if path.stem not in noted:  # the process was killed before it wrote the note, or inside `_drop`
                path.unlink()
    return saved, broken


def remember(saved: Saved, memory: dict[str, Any]) -> None:
    """Replace the entry `memory` in the JSON file of a saved state (see `save_state`).

    Raises:
        OSError: the JSON file cannot be written. The state is unchanged.
    """
    note = saved.path.with_suffix(".json")
    write_text(note, json.dumps({**json.loads(note.read_text()), "memory": memory}))


def drop_states(out: Path, after: int) -> None:
    """Remove the states of all steps later than `after` from the run's folder `out`."""
    for note in _notes(out / FOLDER):
        if int(note.stem) > after:
            _drop(note)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the lock of the run's folder `out` inside the block. The lock is released even if the process is killed.

    If the file system does not support locks, the function warns the user and does not lock the folder.

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
    """Check that a run resumes with the settings of its saved state.

    Raises:
        ValueError: a setting that must not change differs. The message names each such setting.
    """
    mine, theirs = comparable(settings), comparable(saved.settings)
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in differing)
        raise ValueError(
            f"{saved.path.parent} is from a run with other settings ({changes}); use another out folder or remove it. "
            f"To continue with the network and heads of this run, choose another out folder and add "
            f"init={saved.path.parent.parent}"
        )


@torch.no_grad()
def load_state(saved: Saved, parts: Parts) -> None:
    """Load a saved state into the networks, the optimizer and the buffers of `parts`.

    The number of ranks may differ from the number of ranks that saved the state.
    """
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
        if name in state["buffers"]:  # a run that begins in bf16 and continues in fp16 has no loss scale yet
            value.copy_(state["buffers"][name])
