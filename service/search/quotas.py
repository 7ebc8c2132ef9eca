"""The quotas of the embedded store: how many collections, items and snapshots it accepts.

Each quota is a setting of the same name (service/settings.py). A change is made first and then counted within the same
transaction, which is undone if there is too much. A quota that was lowered refuses only what is new.
"""

import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.errors import QuotaExceeded
from service.search.store import CollectionInfo


@dataclass(frozen=True)
class Quotas:
    """The highest numbers that the store accepts. None means that there is no limit."""

    max_collections: int | None = None
    max_items: int | None = None
    max_collection_items: int | None = None
    max_snapshots: int | None = None
    max_snapshot_bytes: int | None = None

    def check_collections(self, db: sqlite3.Connection) -> None:
        """Raise QuotaExceeded if there are too many collections. Call this after one was created."""
        if self.max_collections is not None:
            (count,) = db.execute("SELECT count(*) FROM collections WHERE name NOT LIKE '%:%'").fetchone()
            if count > self.max_collections:
                raise QuotaExceeded(
                    f"there would be {count} collections, but max_collections={self.max_collections}: delete one first"
                )

    def check_items(self, db: sqlite3.Connection, before: int, info: CollectionInfo) -> None:
        """Raise QuotaExceeded if there are too many items. Call this after a write to a collection, which had `before`
        items before it."""
        if info.count <= before:
            return
        if self.max_collection_items is not None and info.count > self.max_collection_items:
            raise QuotaExceeded(
                f"collection {info.name!r} would have {info.count} items, but max_collection_items="
                f"{self.max_collection_items}: delete items first"
            )
        if self.max_items is not None:
            (count,) = db.execute("SELECT sum(count) FROM collections WHERE name NOT LIKE '%:%'").fetchone()
            if count > self.max_items:
                raise QuotaExceeded(
                    f"all collections together would have {count} items, but max_items={self.max_items}: delete items "
                    "first"
                )

    def check_snapshots(self, root: Path, *, adding: int | None = None) -> None:
        """Raise QuotaExceeded if there is no room for another snapshot below `root`. `adding` is its size in bytes, or
        None if it is not known yet."""
        if self.max_snapshots is None and self.max_snapshot_bytes is None:
            return
        sizes = _sizes(root)
        if self.max_snapshots is not None and len(sizes) >= self.max_snapshots:
            raise QuotaExceeded(
                f"{len(sizes)} snapshots exist, and max_snapshots={self.max_snapshots}: delete one first"
            )
        if self.max_snapshot_bytes is not None and sum(sizes) + (adding or 1) > self.max_snapshot_bytes:
            size = "another one" if adding is None else f"{adding} more bytes"
            raise QuotaExceeded(
                f"the snapshots have {sum(sizes)} bytes, and max_snapshot_bytes={self.max_snapshot_bytes} has no room "
                f"for {size}: delete one first"
            )


def _sizes(root: Path) -> list[int]:
    """Return the sizes in bytes of all snapshots below `root`."""
    sizes = []
    for path in root.glob("*/*.sqlite3"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            sizes.append(path.lstat().st_size)
    return sizes
