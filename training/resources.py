"""Measure the memory of this process and device, and find how much memory and disk space a run may use.

On a GPU, torch counts the bytes of all tensors. On a CPU, Linux counts the peak resident memory of the process, and
lets the process restart this count. Other systems cannot restart it, so the peak includes everything that the process
has done before.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from training.distributed import World
from training.watch.monitor import peak_memory_bytes

MIB = 2**20
WRITTEN_BYTES = 64 * MIB  # at most, to measure the speed of the disk
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # memory of this process, on Linux
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
MEMORY_LIMITS = (  # limit and usage of a container, and its cached files, for both versions of cgroups
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Free:
    """The memory and the disk space that a run may use. None means unknown.

    `device_bytes` and `host_bytes` are the memory of the device and the main memory for this rank, including what the
    process already uses. The two are the same memory if the device is the CPU.
    """

    device_bytes: int | None
    host_bytes: int | None
    disk_bytes: int | None


def restart_peak(device: torch.device) -> None:
    """Restart the count of the peak memory. On a CPU this is possible only on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        with suppress(OSError):  # some containers forbid it; the peak then includes what happened before
            CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `restart_peak`, in bytes (see the top of this file)."""
    if device.type == "cpu" and STATUS.exists():
        return 1024 * _numbers(STATUS)["VmHWM"]
    return peak_memory_bytes(device) or 0


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers in a file of lines such as `VmHWM:   1234 kB`, keyed by name."""
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(value) for name, value, *_ in (w for w in words if len(w) > 1) if value.isdecimal()}


def free_resources(out: Path, world: World) -> Free:
    """Find how much memory and disk space this rank may use. The ranks on a machine share its memory evenly."""
    host = _available()
    if host is not None:
        own = 1024 * _numbers(STATUS)["VmRSS"]
        host = host // world.on_machine + own
    device = host
    if world.device.type == "cuda":
        device = torch.cuda.mem_get_info(world.device)[0] + torch.cuda.memory_reserved(world.device)
    return Free(device, host, shutil.disk_usage(existing(out)).free)


def _available() -> int | None:
    """Return the main memory that is available on this machine, in this container, or None if it is not Linux."""
    if not MEMORY.exists():
        return None
    available = 1024 * _numbers(MEMORY)["MemAvailable"]
    for limit, usage, cached in MEMORY_LIMITS:
        text = (CGROUP / limit).read_text().strip() if (CGROUP / limit).exists() else "max"
        if text != "max":
            files = _numbers((CGROUP / usage).with_name("memory.stat"))[cached]  # can be dropped
            available = min(available, int(text) - int((CGROUP / usage).read_text()) + files)
    return available


def least_free(ranks: Sequence[Free]) -> Free:
    """Return the least memory and disk space that any rank has."""

    def least(values: Iterable[int | None]) -> int | None:
        return min((value for value in values if value is not None), default=None)

    return Free(
        least(free.device_bytes for free in ranks),
        least(free.host_bytes for free in ranks),
        least(free.disk_bytes for free in ranks),
    )


def write_speed(out: Path, n_bytes: int) -> float:
    """Write `n_bytes`, but at most 64 MiB, to the disk of the folder `out`, and return the speed in bytes/s.

    Raises:
        OSError: the file cannot be written.
    """
    blocks = min(WRITTEN_BYTES, max(n_bytes, MIB)) // MIB
    block = os.urandom(MIB)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=existing(out)) as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return blocks * MIB / (time.perf_counter() - start)


def existing(out: Path) -> Path:
    """Return the folder `out` or, if it does not exist yet, the nearest folder above it that exists."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
