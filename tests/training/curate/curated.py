"""Small images and outcomes of curations for the tests of what is written."""

import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from training.curate.drops import Drop
from training.curate.outcome import Outcome
from training.curate.table import Images, Pixels


def picture(seed: int, side: int = 24) -> Pixels:
    """Return smooth coloured noise, so that thumbnails show something."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def encoded(pixels: Pixels, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def table_of(files: Mapping[str, bytes], labels: Mapping[str, str | None], same_pixels: Mapping[str, str]) -> Images:
    """Return the table of encoded images by key. `same_pixels` gives images the hashes of the pixels of others."""
    keys = sorted(files)

    def digest(data: bytes) -> list[int]:
        return list(hashlib.sha256(data).digest())

    looks = [digest(files[same_pixels.get(key, key)]) for key in keys]
    draws = np.random.default_rng(0)
    embedding = draws.normal(size=(len(keys), 8)).astype(np.float32)
    return Images(
        key=keys,
        sha256=np.array([digest(files[key]) for key in keys], np.uint8),
        pixels_sha256=np.array(looks, np.uint8),
        phash=np.array([int.from_bytes(bytes(look[:8])) for look in looks], np.uint64),
        width=np.full(len(keys), 24, np.int32),
        height=np.full(len(keys), 24, np.int32),
        n_bytes=np.array([len(files[key]) for key in keys], np.int64),
        label=[labels.get(key) for key in keys],
        measures={"darkness": draws.random(len(keys)).astype(np.float32)},
        embedding=embedding / np.linalg.norm(embedding, axis=1, keepdims=True),
    )


class Pool:
    """Images in memory, and the outcome of their curation: each drop of `drops` is (key, stage, reason, kept key)."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        labels: Mapping[str, str | None] | None = None,
        same_pixels: Mapping[str, str] | None = None,
    ) -> None:
        self.files = dict(files)
        self.images = table_of(files, labels or {}, same_pixels or {})
        self.number = {key: index for index, key in enumerate(self.images.key)}
        self.n_read = 0

    def read(self, index: int) -> bytes:
        self.n_read += 1
        return self.files[self.images.key[index]]

    def drops(self, *drops: tuple[str, str, str, str | None]) -> list[Drop]:
        return [
            Drop(self.number[key], stage, reason, None if kept is None else self.number[kept])
            for key, stage, reason, kept in drops
        ]

    def outcome(
        self,
        drops: Sequence[Drop] = (),
        held_out: Sequence[str] = (),
        restored: Sequence[str] = (),
        unreadable: Sequence[tuple[str, str]] = (),
        sources: Sequence[str] = (),
    ) -> Outcome:
        back = frozenset(self.number[key] for key in restored)
        dropped = {drop.index for drop in drops} - back
        kept = np.array([index for index in range(len(self.images)) if index not in dropped], np.int64)
        out = np.array(sorted(self.number[key] for key in held_out), np.int64)
        return Outcome(self.images, kept, out, drops, back, unreadable, sources)


def cats_and_dogs(n: int = 12) -> Pool:
    """Return a pool of JPEGs `1/cats/NN.jpg` and PNGs `1/dogs/NN.png`, and one image without a class."""
    files = {f"1/cats/{i:02d}.jpg": encoded(picture(i)) for i in range(n)}
    files |= {f"1/dogs/{i:02d}.png": encoded(picture(100 + i), "PNG") for i in range(n)}
    files["2/lonely.jpg"] = encoded(picture(1000))
    return Pool(files, {key: key.split("/")[1] for key in files if key.startswith("1/")})
