"""Hide the faces in the files of images when they are read, so that no later stage and no dataset ever sees them.

The result for a file is stored under the sha256 of its bytes: an empty file if there is no face, otherwise the encoded
image with hidden faces. The detector therefore runs once for each image.
"""

import hashlib
from pathlib import Path

from model.files import write_bytes
from training.curate.faces import FaceDetector, FaceSettings, find_model, hide_faces


class HiddenFaces:
    """Hides faces, and remembers the results. It can be sent to another process, which loads the detector again."""

    def __init__(self, folder: Path, settings: FaceSettings) -> None:
        """Remember the folder for results and the settings.

        Raises:
            ValueError: the detector is not installed. The message says how to install it.
        """
        self._folder, self.settings = folder, settings
        self._model = find_model()
        self._detector: FaceDetector | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_detector": None}

    def __call__(self, data: bytes) -> bytes:
        """Return an encoded image in which the faces are hidden. Without a face, it is `data` itself.

        Raises:
            ValueError: the image cannot be decoded.
            OSError: the result cannot be stored.
        """
        digest = hashlib.sha256(data).hexdigest()
        stored = self._folder / digest[:2] / digest
        if stored.exists():
            return stored.read_bytes() or data
        if self._detector is None:
            self._detector = FaceDetector(self._model, self.settings)
        hidden, count = hide_faces(data, self._detector, self.settings)
        stored.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(stored, hidden if count else b"")
        return hidden
