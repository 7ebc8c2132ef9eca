"""The lock that one migration at a time holds, in all processes that use the data folder.

A serving process also takes it for a moment, to end the window of a former model. A migration that begins in this
moment waits.
"""

import asyncio
import time
from pathlib import Path
from typing import BinaryIO, Final

from model.files import lock_file
from service.errors import Conflict

WAIT_S: Final = 3.0
"""How long a migration waits for the lock, in seconds."""
_LOOK_S: Final = 0.05


async def migration_lock(data_dir: Path) -> BinaryIO:
    """Return the locked file. The lock ends when the file is closed.

    Raises:
        Conflict: a migration is running.
    """
    deadline = time.monotonic() + WAIT_S
    while (lock := lock_file(data_dir / "migration.lock")) is None:
        if time.monotonic() > deadline:
            raise Conflict("a migration is running: wait for its end, or cancel it")
        await asyncio.sleep(_LOOK_S)
    return lock
