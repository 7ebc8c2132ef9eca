"""Finds a backbone's tensors inside the wrappers that training code saves around them.

Training code stores a model's tensors under a key such as `model` or `teacher`, beside the optimizer and counters, and
wrappers of torch prepend prefixes such as `module.` (DDP) and `_orig_mod.` (`torch.compile`) to the names. A wrapper is
removed only if the result is unambiguous. Otherwise the error says what to do.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from model.convert import Array, CheckpointError

_KEYS: Final = ("teacher", "state_dict", "model")  # in this order: Meta's dumps, mmcv and Lightning, others
_OTHERS: Final = ("model_ema", "ema", "state_dict_ema", "student")
_MAX_DEPTH: Final = 3
_PREFIXES: Final = ("module.", "model.", "teacher.")
_INSIDE: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_RANK_FILE: Final = re.compile(r"\.rank_\d+\.pth$")

RANK_ADVICE: Final = (
    "this is one rank's part of a sharded training state of Meta's code: load teacher_checkpoint.pth instead, which "
    "Meta's code writes to eval/training_<iteration>/ in the same folder"
)
CODE_ADVICE: Final = (
    "if you trust the file, load it with torch in your own code, and save only its tensors, "
    "e.g. torch.save(loaded['model'], 'weights.pth')"
)


def is_rank_file(path: Path) -> bool:
    """Return whether a file name is that of one rank's part of a sharded state, such as `model_0001.rank_0.pth`."""
    return _RANK_FILE.search(path.name) is not None


def tensors_in(loaded: object) -> dict[str, Array]:
    """Return the named tensors in the object of a PyTorch file. Up to three levels of keys are removed.

    Raises:
        CheckpointError: the object contains no named tensors, or it contains several models. The message says what to
            do.
    """
    for _ in range(_MAX_DEPTH):
        if not isinstance(loaded, dict):
            break
        key = next((key for key in _KEYS if isinstance(loaded.get(key), dict)), None)
        if key is None:
            break
        others = [other for other in _OTHERS if key != "teacher" and isinstance(loaded.get(other), dict)]
        if others:
            raise CheckpointError(
                f"it contains several models, {key} and {', '.join(others)}: load it with torch, and save the one you "
                f"want, e.g. torch.save(torch.load(FILE, weights_only=True)[{key!r}], 'weights.pth')"
            )
        loaded = loaded[key]
    if isinstance(loaded, dict) and {"student", "ema", "optimizer"} <= loaded.keys():
        raise CheckpointError(
            "it is a training state: give the folder of the run, or the checkpoint.safetensors in this folder"
        )
    if not isinstance(loaded, dict) or not all(isinstance(value, np.ndarray) for value in loaded.values()):
        found = list(loaded)[:10] if isinstance(loaded, dict) else type(loaded).__name__
        wanted = ", ".join(repr(key) for key in _KEYS)
        raise CheckpointError(f"expected named tensors, at the top or under {wanted}, but found {found}")
    return dict(loaded)


def without_prefixes(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors under names without the prefixes of wrappers.

    A prefix at the start of a name is removed only if all names have it. If a file has both a student and a teacher,
    only the teacher's tensors are returned.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    names = {name: _INSIDE.sub("", name) for name in tensors}
    while True:
        if _has_both(names.values()):
            names = {name: short for name, short in names.items() if short.startswith("teacher.")}
        prefix = next((p for p in _PREFIXES if names and all(n.startswith(p) for n in names.values())), None)
        if prefix is None and _is_plain_backbone(names.values()):
            prefix = "backbone."
        if prefix is None:
            break
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    plain: dict[str, Any] = {}
    for name, short in names.items():
        if short in plain:
            raise CheckpointError(f"two tensors get the name {short} if the prefixes of wrappers are removed")
        plain[short] = tensors[name]
    return plain


def _has_both(names: Iterable[str]) -> bool:
    roots = {name.split(".")[0] for name in names}
    return {"student", "teacher"} <= roots


def _is_plain_backbone(names: Iterable[str]) -> bool:
    """Return whether all names begin with `backbone.` and the format is not that of Meta's training dumps."""
    listed = list(names)
    return bool(listed) and all(name.startswith("backbone.") for name in listed) and "backbone.mask_token" not in listed
