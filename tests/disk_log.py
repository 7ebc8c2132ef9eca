"""A recorder of the order in which code flushes files to the disk and renames them.

A power cut can only leave states that this order allows.
"""

import os
from pathlib import Path

import pytest


class DiskLog:
    """A recorder of all calls of `os.fsync` and `os.replace` after its creation. The calls are still executed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int, str]] = []  # "flushed" or "renamed", inode, name after a rename
        fsync, replace = os.fsync, os.replace

        def logged_fsync(descriptor: int) -> None:
            self.events.append(("flushed", os.fstat(descriptor).st_ino, ""))
            fsync(descriptor)

        def logged_replace(source: str | Path, target: str | Path) -> None:
            self.events.append(("renamed", os.stat(source).st_ino, str(target)))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_replace)  # Path.replace calls os.replace

    def assert_durable(self, path: Path) -> None:
        """Assert that the file at `path` got its name by a rename, and that the rename survives a power cut.

        The file's content must have been flushed before the rename, and its folder after the rename.
        """
        renames = [i for i, (what, _, name) in enumerate(self.events) if what == "renamed" and name == str(path)]
        assert renames, f"{path} was not renamed into place"
        at = renames[-1]
        assert ("flushed", self.events[at][1], "") in self.events[:at], f"{path}: not flushed before the rename"
        assert ("flushed", path.parent.stat().st_ino, "") in self.events[at:], f"{path.parent}: not flushed after it"
