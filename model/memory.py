"""Finds out how much memory this process may use: the limit of its cgroup and of that cgroup's ancestors, or the memory
of the machine.

In cgroup version 2, the file `memory.max` contains the limit in bytes or "max". In version 1, the file
`memory.limit_in_bytes` contains a huge number if there is no limit.
"""

import os
from pathlib import Path

from model.cpus import CGROUPS, MEMBERSHIP, cgroup_folders


def available_memory(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """Return the number of bytes of memory that this process may use. The arguments are those of `cpu_quota`."""
    limits = [limit for folder in cgroup_folders("memory", membership, cgroups) if (limit := _limit(folder))]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def _limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # another version, or "max"
            continue
    return None
