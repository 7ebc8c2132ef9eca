"""Counts the CPUs that this process may use.

These are the CPUs in the process's affinity mask, limited by the CPU quotas of its cgroup and of that cgroup's
ancestors.

Both cgroup versions are supported. In version 2, the file `cpu.max` contains a quota or "max", and a period. In version
1, the files are `cpu.cfs_quota_us` (-1 means no quota) and `cpu.cfs_period_us`. `/proc/self/cgroup` contains the path
of the process's cgroup. In a container without its own cgroup namespace, this is the path on the host, but inside the
container its own cgroup appears as the root. Paths that do not exist are therefore skipped.

A fractional quota is rounded down. When a cgroup has used up its quota, the kernel stops all threads in the cgroup,
including the one that runs the event loop, until the period ends. The fraction of a CPU that rounding leaves unused is
available for decoding and HTTP while the engine's threads run.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_quota(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> float | None:
    """Return the smallest of the CPU quotas of this process's cgroup and its ancestors, or None if no quota is set.

    The unit is CPUs. `membership` is a file like `/proc/self/cgroup`, which contains the cgroup's path. `cgroups` is
    the root folder of the cgroup file system.
    """
    quotas = [quota for folder in cgroup_folders("cpu", membership, cgroups) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def cgroup_folders(controller: str, membership: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders in which this process's cgroup and its ancestors may store limits.

    `controller` is the name of a controller of cgroup version 1, such as "cpu". Some of these folders may not exist.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in ["0::/", *lines]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        inner = [part for part in path.split("/") if part not in ("", ".", "..")]
        for root in [cgroups / controllers, cgroups / controller] if controllers else [cgroups]:
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
    except (ValueError, ZeroDivisionError):  # "max", or an unrelated file
        return None
    return cpus if cpus > 0 else None
