"""Tests of the memory limit in both cgroup versions, set at any level of the hierarchy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.memory import available_memory

ROOT = Path(__file__).parents[2]
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/other\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "1000000"}, 1_000_000),
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/\n", {}, MACHINE),
        ("0::/a/b\n", {"a/memory.max": "3000", "a/b/memory.max": "5000"}, 3000),  # the smallest counts
        ("0::/a\n", {"a/memory.max": str(2**62)}, MACHINE),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": "7000"}, 7000),
        (V1, {"memory/memory.limit_in_bytes": "8000"}, 8000),  # the container's root
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),  # no limit
        (V1, {"cpu,cpuacct/other/memory.limit_in_bytes": "7000"}, MACHINE),
    ],
)
def test_the_smallest_limit_on_the_way_up_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership)
    assert available_memory(tmp_path / "cgroup", tmp_path / "fs") == expected


KEPT = """import os, sys
from concurrent.futures import ThreadPoolExecutor
from model.decode import decode
from model.memory import return_large_blocks
from tests.hostile_images import png_of_zeros
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
if sys.argv[1] == "returned":
    return_large_blocks()
files = [png_of_zeros(side) for side in range(3600, 4400, 100)]
decode(files[0])
before = resident()
with ThreadPoolExecutor(8) as threads:
    list(threads.map(lambda file: decode(file).shape, files))
print(resident() - before)"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_large_images_goes_back_to_the_system() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", KEPT, mode], cwd=ROOT, capture_output=True, check=True).stdout)
        for mode in ("kept", "returned")
    )
    assert returned < 50, "MiB"
    assert kept > 2 * returned, "the test does not show anything any more"
