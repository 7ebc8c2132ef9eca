"""Measure the time and memory of two operations of training: the cross-entropy of teacher and student, and
Sinkhorn-Knopp.

    python benchmarks/cross_entropy.py [--prototypes 65536 1024] [--rows 256] [--rounds 9] [--dtype float32]

All implementations take turns within each round, so that other load affects them equally. The column `x plain` is the
speed relative to the plain expression, as the median over the rounds. GB/s is the minimum memory traffic divided by the
best time. The minimum traffic of the cross-entropy is the logits and targets in the forward pass, and both again plus
the gradient in the backward pass. For comparison, the rate of a plain copy is measured in the same run. On a GPU, the
Triton kernels are included, and the peak memory that each implementation adds is measured.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.kernels import plain_cross_entropy, soft_cross_entropy, torch_cross_entropy
from training.losses import sinkhorn_knopp, sinkhorn_targets
from training.teacher_targets import TeacherTargets

RESULTS = Path(__file__).parent / "results"
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
Run = Callable[[], object]


def torch_expression(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Return the cross-entropy of each row, computed by F.cross_entropy with probabilities as targets."""
    return F.cross_entropy(student.float() / temp, targets, reduction="none")


def both_passes(
    loss: Callable[..., Tensor], student: Tensor, targets: Tensor | TeacherTargets, grad: Tensor
) -> Tensor | None:
    """Run the forward and backward passes of a loss, and return the gradient of `student`."""
    student.grad = None
    torch.autograd.backward(loss(student, targets, STUDENT_TEMP), grad)
    return student.grad


def plain_sinkhorn(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """Compute Sinkhorn-Knopp targets [rows, K] in the log domain. Each half of an iteration uses the whole array."""
    scores = logits.float() / temp
    u = scores.new_zeros(scores.shape[0], 1)
    for _ in range(n_iterations):
        v = torch.logsumexp(scores - u, dim=0, keepdim=True)
        u = torch.logsumexp(scores - v, dim=1, keepdim=True)
    return (scores - u - v).exp()


def candidates(rows: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, tuple[Run, int]]]:
    """Return the implementations of each operation, each with its minimum memory traffic in bytes. The implementation
    that the others are compared with is the first.
    """
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(rows, k, generator=generator) * 0.3).to(device, dtype).requires_grad_()
    teacher = (torch.randn(rows, k, generator=generator) * 0.3).to(device, dtype)
    grad = torch.full((rows,), 1 / rows, device=device)
    targets, left = sinkhorn_knopp(teacher, TEACHER_TEMP), sinkhorn_targets([teacher], TEACHER_TEMP)[0]
    logit_bytes, target_bytes = student.nbytes, targets.nbytes
    losses: dict[str, tuple[Callable[..., Tensor], Tensor | TeacherTargets]] = {
        "plain": (plain_cross_entropy, targets),
        "F.cross_entropy": (torch_expression, targets),
        "torch, in pieces": (torch_cross_entropy, targets),
    }
    if device.type == "cuda":
        losses["triton"] = (soft_cross_entropy, targets)
        losses["triton, from logits"] = (soft_cross_entropy, left)
    reads = {name: logit_bytes if given is left else target_bytes for name, (_, given) in losses.items()}
    source = torch.empty_like(targets)
    return {
        "copy": {"copy": (partial(torch.empty_like(source).copy_, source), 2 * source.nbytes)},
        "cross-entropy": {
            name: (partial(both_passes, loss, student, given, grad), 3 * logit_bytes + 2 * reads[name])
            for name, (loss, given) in losses.items()
        },
        "sinkhorn": {
            "plain": (partial(plain_sinkhorn, teacher, TEACHER_TEMP), logit_bytes + target_bytes),
            "ours": (partial(sinkhorn_knopp, teacher, TEACHER_TEMP), logit_bytes + target_bytes),
            "ours, left as logits": (partial(sinkhorn_targets, [teacher], TEACHER_TEMP), logit_bytes),
        },
    }


def seconds_of(run: Run, device: torch.device) -> float:
    """Return the wall-clock time of one call in seconds, including the GPU work that the call queues."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_mb(run: Run, device: torch.device) -> float | None:
    """Return the peak GPU memory in MB that one call adds, or None without a GPU."""
    if device.type != "cuda":
        return None
    run()  # allocates the arrays that remain after a call, such as the gradient
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)


def measure(rows: int, k: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict[str, object]]:
    """Measure every implementation, and return one table row for each."""
    operations = candidates(rows, k, dtype, device)
    times: dict[tuple[str, str], list[float]] = {(op, name): [] for op, runs in operations.items() for name in runs}
    for _ in range(rounds + 1):
        for op, name in times:
            times[op, name].append(seconds_of(operations[op][name][0], device))
    found: list[dict[str, object]] = []
    for (op, name), measured in times.items():
        run, moved = operations[op][name]
        seconds = np.array(measured[1:])  # the first round warms up
        plain = np.array(times[op, next(iter(operations[op]))][1:])
        found.append(
            {
                "prototypes": k,
                "operation": op,
                "candidate": name,
                "ms_best": round(float(seconds.min()) * 1e3, 3),
                "ms_median": round(float(np.median(seconds)) * 1e3, 3),
                "gb_per_s": round(moved / float(seconds.min()) / 1e9, 2),
                "times_plain": round(float(np.median(plain / seconds)), 2),
                "peak_mb": peak_mb(run, device),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65536, 1024])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    rows = []
    for k in arguments.prototypes:
        rows += measure(arguments.rows, k, getattr(torch, arguments.dtype), device, arguments.rounds)
    print(f"{'K':>7} {'operation':<14}{'candidate':<22}{'ms best':>9}{'median':>9}{'GB/s':>8}{'x plain':>9}{'MB':>8}")
    for row in rows:
        print(
            f"{row['prototypes']:>7} {row['operation']:<14}{row['candidate']:<22}{row['ms_best']:>9}"
            f"{row['ms_median']:>9}{row['gb_per_s']:>8}{row['times_plain']:>9}{row['peak_mb'] or '-':>8}"
        )
    result = {
        "benchmark": "cross_entropy",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows_of_logits": arguments.rows,
        "dtype": arguments.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-cross-entropy.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
