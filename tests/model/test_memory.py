"""Tests of the memory limit in both cgroup versions, set at any level of the hierarchy."""

import os
from pathlib import Path

import pytest

from model.memory import available_memory

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
