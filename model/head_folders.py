"""Finds the folders in which an artifact's heads are stored: `<artifact>/heads/<name>/`.

The folder of the bundled artifact, and one that cannot be written, do not receive heads. Their heads are stored in the
same way in `artifact.derived`. A file in each folder describes its content, so heads of several types can be told
apart (`model/heads/store.py`, `model/dinotxt/store.py`).
"""

import os
from pathlib import Path
from typing import Final

from model.artifact import BUNDLED_DIR, Artifact

_FOLDER: Final = "heads"


def head_folders(artifact: Artifact, record: str) -> dict[str, Path]:
    """Return the folders of the artifact's heads that contain a file named `record`, keyed by the head's name.

    If a name occurs twice, the head in the artifact's own folder is used.
    """
    folders: dict[str, Path] = {}
    for parent in (artifact.path / _FOLDER, artifact.derived / _FOLDER):
        for path in sorted(parent.glob(f"*/{record}")):
            if not path.parent.name.startswith("."):
                folders.setdefault(path.parent.name, path.parent)
    return folders


def folder_for_new_heads(artifact: Artifact) -> Path:
    """Return the folder in which new heads of the artifact are stored. It may not exist yet."""
    is_bundled = BUNDLED_DIR.resolve() in artifact.path.resolve().parents
    writable = not is_bundled and os.access(artifact.path, os.W_OK)
    return (artifact.path if writable else artifact.derived) / _FOLDER
