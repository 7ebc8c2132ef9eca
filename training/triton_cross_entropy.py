"""Two Triton kernels for `kernels.soft_cross_entropy`: the forward and the backward pass. Each reads the logits once.

This module is imported only when Triton is needed, because only torch's CUDA builds include Triton.

In the forward pass, one program per row reads the K logits in blocks. Each lane stores the maximum m of the logits x
that it has read, and the sum s of exp(x - m). The lanes are therefore combined only once, at the end. A new logit x
costs only one exponential, e = exp(-|x - m|). If x > m, x is the new maximum, and s becomes s * e + 1. Otherwise s
becomes s + e. In the backward pass, there is one program for each block of each row.

The programs that use the same row of targets, one for each student view, have consecutive numbers. The row is therefore
read from memory once and then from the cache.

Legend: K prototypes, B rows of targets, T teacher views (their targets are summed), S student views, R = S * B rows of
the student.
"""

# Triton has no type hints, and its constants are in capitals:
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-call, no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.teacher_targets import TeacherTargets

BLOCK = 2048
WARPS = 8


def triton_cross_entropy(student_logits: Tensor, targets: Tensor | TeacherTargets, student_temp: float) -> Tensor:
    """Compute the result of `kernels.soft_cross_entropy` on a GPU for at least one row.

    `student_logits` is [R, K] for R rows and K prototypes. Return the cross-entropy of each row, float32 [R].
    """
    if isinstance(targets, TeacherTargets):
        u, v, temp = targets.u.float().contiguous(), targets.v.float().contiguous(), targets.temp
        return _TritonCrossEntropy.apply(student_logits, targets.logits, u, v, temp, student_temp)
    return _TritonCrossEntropy.apply(student_logits, targets, None, None, 1.0, student_temp)


class _TritonCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        targets: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        target_temp: float,
        student_temp: float,
    ) -> Tensor:
        student_logits, targets = student_logits.contiguous(), targets.contiguous()
        n_rows, k = student_logits.shape
        # Triton compiles a kernel again if an argument is no longer aligned to 16 bytes. Separate tensors are always
        # aligned. Rows of one tensor would be aligned or not, depending on their length.
        loss, lse, mass = (student_logits.new_empty(n_rows, dtype=torch.float32) for _ in range(3))
        ctx.sizes = {
            "n_targets": targets.shape[-2],
            "n_students": n_rows // targets.shape[-2],
            "k": k,
            "student_scale": 1 / student_temp,
            "target_scale": 1 / target_temp,
            "N_TEACHERS": targets.shape[0] if targets.dim() == 3 else 1,
            "FACTORED": u is not None,
            "BLOCK": min(BLOCK, triton.next_power_of_2(k)),
        }
        with torch.cuda.device_of(student_logits):  # Triton launches on the current GPU
            _forward[(n_rows,)](student_logits, targets, u, v, loss, lse, mass, **ctx.sizes, num_warps=WARPS)
        ctx.save_for_backward(student_logits, targets, u, v, lse, mass)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        student_logits, targets, u, v, lse, mass = ctx.saved_tensors
        out = torch.empty_like(student_logits)
        grid = (len(student_logits), triton.cdiv(ctx.sizes["k"], ctx.sizes["BLOCK"]))
        with torch.cuda.device_of(student_logits):
            _backward[grid](
                student_logits, targets, u, v, lse, mass, grad.contiguous(), out, **ctx.sizes, num_warps=WARPS
            )
        return out, None, None, None, None, None


@triton.jit
def _rows(n_targets, n_students):
    """Return the index of the student row and the index of the target row that this program processes.

    The programs that use the same target row, one for each student view, have consecutive numbers.
    """
    program = tl.program_id(0).to(tl.int64)  # row * k exceeds 2^31
    target_row = program // n_students
    return program % n_students * n_targets + target_row, target_row


@triton.jit
def _targets(
    targets,
    u,
    v,
    row,
    columns,
    inside,
    n_targets,
    k,
    scale,
    N_TEACHERS: tl.constexpr,
    FACTORED: tl.constexpr,
):
    """Load one block of a row of targets, and return the sum over the teacher's views.

    Columns beyond the end of the row (where `inside` is False) are 0.
    """
    total = tl.zeros_like(columns).to(tl.float32)
    for view in tl.static_range(N_TEACHERS):
        view_row = view * n_targets + row
        p = tl.load(targets + view_row * k + columns, mask=inside, other=0.0).to(tl.float32)
        if FACTORED:
            p = p * scale - tl.load(u + view_row) - tl.load(v + columns, mask=inside, other=0.0)
            p = tl.where(inside, tl.exp(p), 0.0)
        total += p
    return total


@triton.jit(do_not_specialize=["n_targets", "n_students"])
def _forward(
    student, targets, u, v, loss, lse, mass,
    n_targets, n_students, k, student_scale, target_scale,
    N_TEACHERS: tl.constexpr, FACTORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, target_row = _rows(n_targets, n_students)
    lanes = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -3.0e38, tl.float32)  # not -inf: lanes beyond k subtract it from -inf
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        columns = start + lanes
        inside = columns < k
        x = tl.load(student + row * k + columns, mask=inside, other=0.0).to(tl.float32) * student_scale
        p = _targets(targets, u, v, target_row, columns, inside, n_targets, k, target_scale, N_TEACHERS, FACTORED)
        dot += p * x
        weight += p
        d = tl.where(inside, x, float("-inf")) - highest
        e = tl.exp(-tl.abs(d))
        total = tl.where(d > 0, total * e + 1.0, total + e)
        highest = tl.where(d > 0, x, highest)
    top = tl.max(highest, axis=0)
    row_lse = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
    row_mass = tl.sum(weight, axis=0)
    tl.store(lse + row, row_lse)
    tl.store(mass + row, row_mass)
    tl.store(loss + row, row_mass * row_lse - tl.sum(dot, axis=0))


@triton.jit(do_not_specialize=["n_targets", "n_students"])
def _backward(
    student, targets, u, v, lse, mass, grad, out,
    n_targets, n_students, k, student_scale, target_scale,
    N_TEACHERS: tl.constexpr, FACTORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, target_row = _rows(n_targets, n_students)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < k
    x = tl.load(student + row * k + columns, mask=inside, other=0.0).to(tl.float32) * student_scale
    p = _targets(targets, u, v, target_row, columns, inside, n_targets, k, target_scale, N_TEACHERS, FACTORED)
    d = tl.load(grad + row) * student_scale * (tl.load(mass + row) * tl.exp(x - tl.load(lse + row)) - p)
    tl.store(out + row * k + columns, d.to(out.dtype.element_ty), mask=inside)
