"""Finds out how much memory this process may use: the limit of its cgroup and of that cgroup's ancestors, or the memory
of the machine. Also lets the process give the memory of images back to the system.

In cgroup version 2, the file `memory.max` contains the limit in bytes or "max". In version 1, the file
`memory.limit_in_bytes` contains a huge number if there is no limit.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

from model.cpus import CGROUPS, MEMBERSHIP, cgroup_folders

LARGE_BYTES: Final = 2**25
"""glibc's own limit for this value."""
_M_MMAP_THRESHOLD: Final = -3


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


def return_large_blocks() -> None:
    """Let every block of at least `LARGE_BYTES` go back to the system when it is freed. Call this before the first
    image is decoded.

    Otherwise glibc keeps what threads have freed, 2.8 GB after 16 images of 64 megapixels, and Pillow divides large
    images into smaller blocks. Other C libraries than glibc are left as they are.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    from PIL import Image  # only this function needs it, and commands that handle no image call the others

    Image.core.set_block_size(2 * LARGE_BYTES)  # type: ignore[attr-defined]  # documented as the block allocator


def return_small_blocks() -> None:
    """Give small blocks that were freed back to the system, too. With 16 threads that decode, they add up to 100 MB.
    Other threads wait for memory meanwhile, a few milliseconds for each 100 MB."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
