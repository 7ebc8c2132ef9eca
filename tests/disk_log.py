"""What a piece of code flushes to the disk and renames, in order: what a power cut may leave follows from it."""

import os
from pathlib import Path

import pytest


class DiskLog:
    """Records `os.fsync` and `os.replace` from here on, and still does them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int, str]] = []  # flushed or renamed, inode, name after a rename
        fsync, replace = os.fsync, os.replace

        def logged_fsync(descriptor: int) -> None:
            self.events.append(("flushed", os.fstat(descriptor).st_ino, ""))
            fsync(descriptor)

        def logged_replace(source: str | Path, target: str | Path) -> None:
            self.events.append(("renamed", os.stat(source).st_ino, str(target)))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_replace)  # Path.replace calls it

    def assert_durable(self, path: Path) -> None:
        """`path` got its name by a rename, its bytes were flushed before, and the folder after."""
        renames = [i for i, (what, _, name) in enumerate(self.events) if what == "renamed" and name == str(path)]
        assert renames, f"{path} was not renamed into place"
        at = renames[-1]
        assert ("flushed", self.events[at][1], "") in self.events[:at], f"{path}: not flushed before the rename"
        assert ("flushed", path.parent.stat().st_ino, "") in self.events[at:], f"{path.parent}: not flushed after it"
