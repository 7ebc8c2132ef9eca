"""Tests of CPU quotas in both cgroup versions, set at any level of the hierarchy."""

from pathlib import Path

import pytest

from model import cpus
from model.cpus import available_cpus, cpu_quota


def tree(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership)
    return tmp_path / "cgroup", tmp_path / "fs"


def v1(folder: str, quota: str) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}


V1 = "9:name=systemd:/\n4:memory:/other\n3:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {}, None),
        ("", {"cpu.max": "200000 100000"}, 2.0),  # no membership to read: the root
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "300000 100000"}, 0.5),  # the smallest counts
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "cpu.max": "400000 100000"}, 4.0),
        ("0::/../../host/path\n", {"cpu.max": "300000 100000"}, 3.0),  # a path outside of this namespace
        (V1, v1("cpu,cpuacct/docker/abc", "250000"), 2.5),
        (V1, v1("cpu", "100000"), 1.0),  # the container's root
        (V1, v1("cpu/docker", "-1"), None),
        (V1, v1("memory/other", "100000"), None),
    ],
)
def test_the_smallest_quota_on_the_way_up_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(*tree(tmp_path, membership, files)) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.3, 1), (1.9, 1), (2.0, 2), (7.99, 7), (64.0, 8)])
def test_fractions_are_left_to_decoding(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert available_cpus() == expected
