"""The cross-entropy of student logits with soft teacher targets over K prototypes, computed in little memory.

With K = 65,536 to 262,144 prototypes, memory access limits the speed. A plain implementation stores the scaled logits,
their log-softmax and the products. Each of these arrays is as large as the logits, and autograd keeps it in memory.
This module uses the following formulas instead, where x are the logits and p the targets of a row:

    loss = -sum_k p log softmax(x / temp) = mass * logsumexp(x / temp) - sum_k p x / temp,   mass = sum_k p
    dloss/dx = (mass * softmax(x / temp) - p) / temp

The backward pass therefore needs only the logits, the targets and two numbers per row. On a GPU, the forward and the
backward pass are one Triton kernel each (`triton_cross_entropy.py`). On other devices, torch computes both passes in
chunks of rows that fit into the cache (benchmarks/cross_entropy.py). The tests compare both implementations with the
definition, `plain_cross_entropy`.

Targets can also be given as the teacher's logits and two vectors (`TeacherTargets`). The Triton kernels then compute
the targets from them, and never store the array of targets.

Legend: K prototypes, B rows of targets, T teacher views (their targets are summed), S student views, R = S * B rows of
the student.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.teacher_targets import TeacherTargets


def plain_cross_entropy(student_logits: Tensor, targets: Tensor | TeacherTargets, student_temp: float) -> Tensor:
    """Compute the result of `soft_cross_entropy` directly from its definition.

    The computation is in float32, or in float64 if the student's logits are float64.
    """
    probs = _views(targets.probs() if isinstance(targets, TeacherTargets) else targets).sum(dim=0)  # [B, K]
    student = student_logits.double() if student_logits.dtype == torch.float64 else student_logits.float()
    log_probs = F.log_softmax(student / student_temp, dim=-1).view(-1, *probs.shape)  # [S, B, K]
    return -(probs * log_probs).sum(dim=-1).flatten()


def soft_cross_entropy(student_logits: Tensor, targets: Tensor | TeacherTargets, student_temp: float) -> Tensor:
    """Compute the cross-entropy -sum_k p log softmax(student_logits / student_temp) with the targets p for each row.

    The result is differentiable with respect to the student's logits. The targets get no gradient.

    Args:
        student_logits: [R, K] for R rows and K prototypes, of any float type. R must be a multiple of B, the
            number of rows of targets. The targets of row r are in row r % B of `targets`.
        targets: [B, K], or [T, B, K] for T teacher views, which are summed. The targets of a row need not sum to one.
        student_temp: the student's temperature.

    Returns:
        the cross-entropy of each row, float32 [R].

    Raises:
        ValueError: the shapes do not match, or the targets require a gradient.
    """
    _check(student_logits, targets)
    if not len(student_logits):
        return student_logits.float().sum(dim=-1)
    if student_logits.device.type == "cuda" and why_no_triton() is None:
        from training.triton_cross_entropy import triton_cross_entropy

        return triton_cross_entropy(student_logits, targets, student_temp)
    return torch_cross_entropy(student_logits, targets, student_temp)


def torch_cross_entropy(student_logits: Tensor, targets: Tensor | TeacherTargets, student_temp: float) -> Tensor:
    """Compute the result of `soft_cross_entropy` with torch operations on a few rows at a time."""
    views = _views(targets.probs() if isinstance(targets, TeacherTargets) else targets)
    probs = views[0] if len(views) == 1 else views.sum(dim=0)
    return _TorchCrossEntropy.apply(student_logits, probs, student_temp)  # type: ignore[no-untyped-call]


def chunk_elements(device: torch.device) -> int:
    """Return the number of array elements to process at a time, such that they fit into CPU cache or GPU memory."""
    return 1 << 19 if device.type == "cpu" else 1 << 27


class _TorchCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, probs: Tensor, temp: float) -> Tensor:
        ctx.temp = temp
        ctx.save_for_backward(student_logits, probs)
        out = torch.empty(len(student_logits), device=student_logits.device)  # [R]
        with torch.autocast(
            student_logits.device.type, enabled=False
        ):  # autocast would compute the products in half precision
            for rows, target_rows in _chunks(student_logits, len(probs)):
                log_probs = torch.log_softmax(student_logits[rows].float() / temp, dim=-1)
                torch.linalg.vecdot(log_probs, probs[target_rows].float(), out=out[rows])
        return out.neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student_logits, probs = ctx.saved_tensors
        mass = probs.sum(dim=-1, keepdim=True, dtype=torch.float32)  # [B, 1]
        grad = (grad / ctx.temp).unsqueeze(-1)  # [R, 1]
        out = torch.empty_like(student_logits)
        for rows, target_rows in _chunks(student_logits, len(probs)):
            piece = torch.softmax(student_logits[rows].float() / ctx.temp, dim=-1)
            out[rows] = piece.mul_(mass[target_rows]).sub_(probs[target_rows]).mul_(grad[rows])
        return out, None, None


def _chunks(student_logits: Tensor, n_targets: int) -> Iterator[tuple[slice, slice]]:
    """Yield pairs of slices: a slice of the student's rows, and the slice of the corresponding rows of targets."""
    size = max(1, chunk_elements(student_logits.device) // student_logits.shape[1])
    for view in range(0, len(student_logits), n_targets):
        for start in range(0, n_targets, size):
            end = min(start + size, n_targets)
            yield slice(view + start, view + end), slice(start, end)


def _views(targets: Tensor) -> Tensor:
    """Return targets [B, K] of one teacher view as [1, B, K], and targets [T, B, K] of T views unchanged."""
    return targets if targets.dim() == 3 else targets.unsqueeze(0)


def _check(student_logits: Tensor, targets: Tensor | TeacherTargets) -> None:
    written = targets.logits if isinstance(targets, TeacherTargets) else targets
    shape, target_shape = tuple(student_logits.shape), tuple(written.shape)
    fits = len(shape) == 2 and len(target_shape) in (2, 3) and shape[1] == target_shape[-1]
    if not fits or (shape[0] % target_shape[-2] if target_shape[-2] else shape[0]):
        raise ValueError(
            f"student logits {list(shape)} do not fit targets {list(target_shape)}: wanted [R, K] and [B, K] or"
            " [T, B, K] with R a multiple of B"
        )
    if written.requires_grad:
        raise ValueError("targets require a gradient, but this loss gives them none: pass targets.detach()")


@functools.cache
def why_no_triton() -> str | None:
    """Return the reason why Triton's kernels cannot run in this environment, or None if they can.

    When a kernel runs for the first time, Triton compiles C code that starts it (`triton/runtime/build.py`). This needs
    a C compiler and the header files of Python, so this function compiles a file with the compiler that Triton chooses.
    torch.compile uses Triton on a GPU, and therefore needs the same.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "Triton needs a C compiler, and neither gcc nor clang is installed"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")
        headers = sysconfig.get_path("include", "posix_prefix")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", str(Path(folder, "probe.so"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)  # noqa: S603 - as Triton does
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"Triton needs a C compiler, and {compiler} does not run ({error})"
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        return f"Triton needs a C compiler, and {compiler} does not compile: {' '.join(errors[:1])}"
    return None
