"""How many CPUs this process may use: its affinity, cut by the CPU quota of its cgroup and of every cgroup above it.

Two kernels' layouts are read. Version 2 has `cpu.max` ("quota period", or "max"), version 1 `cpu.cfs_quota_us` (-1: no
quota) and `cpu.cfs_period_us`. `/proc/self/cgroup` says where the process is; inside a container without a namespace of
its own that path is the host's, of which the container sees only the root, so paths that do not exist are passed over.

A fraction is rounded down. A group that uses up its quota is stopped whole until the period ends, its event loop with
it; the fraction is what decoding and HTTP run on while the engine's threads are at work.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """CPUs this process may use, at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_quota(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> float | None:
    """The smallest CPU quota of this process' cgroup and those above it, in CPUs; None where nothing cuts it."""
    quotas = [quota for folder in _folders(membership, cgroups) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(membership: Path, cgroups: Path) -> Iterator[Path]:
    """The folders that may hold a quota, the roots among them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in ["0::/", *lines]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        inner = [part for part in path.split("/") if part not in ("", ".", "..")]
        for root in [cgroups / controllers, cgroups / "cpu"] if controllers else [cgroups]:
            for depth in range(len(inner) + 1):
                yield root.joinpath(*inner[:depth])


def _quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or a file of something else
        return None
    return cpus if cpus > 0 else None
