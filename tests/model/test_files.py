"""Tests that files are written completely or not at all, and durably: a flush precedes the rename, and the folder is
flushed after it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.files import lock_file, publish, replacing, sync, write_bytes, write_text

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records the names of flushed and renamed files, in order."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        order.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        order.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)  # Path.replace calls it
    return order


def test_a_file_is_flushed_before_it_gets_its_name_and_its_name_after(tmp_path: Path, calls: list[str]) -> None:
    write_text(tmp_path / "a.txt", "grün")
    assert (tmp_path / "a.txt").read_bytes() == "grün".encode()
    assert [call.replace(calls[0].split()[1], "PART") for call in calls] == [
        "sync PART",
        "rename a.txt",
        f"sync {tmp_path.name}",
    ]
    assert calls[0].startswith("sync .a.txt.")
    assert calls[0].endswith(".part")


def test_a_folder_is_flushed_with_all_its_files(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "new").mkdir()
    for name in ("one", "two"):
        (tmp_path / "new" / name).write_text(name)
    publish(tmp_path / "new", tmp_path / "there")
    assert calls == ["sync one", "sync two", "sync new", "rename there", f"sync {tmp_path.name}"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["one", "two"]


@pytest.mark.parametrize("fault", ["in the block", "at the flush", "at the rename"])
def test_after_a_failure_the_old_file_is_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    if fault != "in the block":
        monkeypatch.setattr(os, "fsync" if fault == "at the flush" else "replace", fail)

    def write() -> None:
        with replacing(target) as path:
            path.write_bytes(b"new")
            if fault == "in the block":
                fail()

    with pytest.raises(OSError, match="No space"):
        write()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [target]


def test_a_lock_excludes_other_processes_until_its_holder_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
from pathlib import Path
from model.files import lock_file
file = lock_file(Path({str(path)!r}))
print(file is not None, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert lock_file(path) is None
        holder.kill()
        holder.wait()
        file = lock_file(path, wait=True)
        assert file is not None
        with file:
            assert lock_file(path) is None
    assert path.exists()


def test_sync_takes_files_and_folders(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "f").touch()
    sync(tmp_path / "f")
    sync(tmp_path)
    assert calls == ["sync f", f"sync {tmp_path.name}"]


def test_the_size_at_the_flush_is_the_whole_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is smaller than a buffer, but none of it may remain in the process when the file is flushed."""
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), fsync(handle)))
    with replacing(tmp_path / "out") as path, path.open("wb") as file:
        file.write(b"x" * 10)
        assert not (tmp_path / "out").exists()
    assert sizes[0] == 10


def test_no_handle_stays_open(tmp_path: Path) -> None:
    held = lock_file(tmp_path / "lock")
    assert held is not None
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        sync(tmp_path)
        write_text(tmp_path / "a", "text")
        assert lock_file(tmp_path / "lock") is None
    assert len(os.listdir("/proc/self/fd")) == before
    held.close()
    again = lock_file(tmp_path / "lock")
    assert again is not None
    again.close()
