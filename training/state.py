"""Where a run stands, on disk: everything needed to go on, written aside and renamed.

The random choices of a step depend on (seed, step) alone (`training/train.py`), so the networks, the optimizer and the
step number are the whole state. Read with `weights_only`: a state file cannot run code.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.student_teacher import Network

# What may change between the run that stopped and the run that goes on.
FREE_SETTINGS = {
    *("out", "data", "device", "compile"),
    *("log_every", "save_every_minutes", "eval_every_epochs", "whiten", "eval_resize", "eval_crop"),
}


@dataclass(frozen=True)
class Parts:
    """The pieces of a run that change with each step."""

    student: Network
    teacher: Network
    optimizer: torch.optim.Optimizer


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings (JSON types) that a resumed run must share with the one it continues."""
    return {key: value for key, value in settings.items() if key not in FREE_SETTINGS}


def save_state(path: Path, parts: Parts, step: int, settings: dict[str, Any]) -> None:
    """Write the state after `step` steps; the old file stays whole until the new one is."""
    temporary = path.with_suffix(".tmp")
    state = {
        "student": parts.student.state_dict(),
        "teacher": parts.teacher.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "step": step,
        "settings": comparable(settings),
    }
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(path: Path, parts: Parts, settings: dict[str, Any]) -> int:
    """Put a saved state into `parts`; the number of steps done.

    Raises:
        ValueError: the state belongs to a run with other settings; the message names them.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    mine, theirs = comparable(settings), comparable(state["settings"])
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in differing)
        raise ValueError(f"{path} is of a run with other settings ({changes}); choose another out folder or remove it")
    parts.student.load_state_dict(state["student"])
    parts.teacher.load_state_dict(state["teacher"])
    parts.optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"]
    return step
