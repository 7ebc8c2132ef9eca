"""Embed files in bulk into one .npz: `dinov2 embed`, without a server.

Decoding runs in threads ahead of the engine, so the engine waits only when decoding is the slower of the two; at most
two batches are decoded ahead, so memory does not grow with the number of files. The vectors are those that the service
gives for the same bytes.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.engine import Engine, available_cpus
from model.preprocess import preprocess
from service.decode import DecodeLimits, decode
from service.errors import ServiceError
from service.pipeline import Embedded, Pooling

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EmbedReport:
    """What became of the files: how many were embedded, and which were not, with the reason."""

    embedded: int
    skipped: list[tuple[Path, str]]
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.embedded / self.seconds if self.seconds else 0.0


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and below its folders, sorted within each folder, hidden ones left out.

    Raises:
        ValueError: a path that does not exist, or no file at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
            files += [path / file for file in sorted(below) if not any(part.startswith(".") for part in file.parts)]
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    if not files:
        raise ValueError(f"no files in {', '.join(map(str, paths))}")
    return files


def embed_files(
    files: Sequence[Path],
    artifact: Artifact,
    engine: Engine,
    *,
    pooling: Pooling = "cls",
    normalize: bool = True,
    batch_size: int = 16,
    limits: DecodeLimits | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Path], FloatArray, EmbedReport]:
    """Vectors of all readable files.

    Args:
        files: images in any format that the service reads.
        advance: called with the number of files just dealt with.

    Returns:
        The files embedded, their vectors [n, D] float32 (D doubles for "cls+mean"), and the report.
    """
    started = time.perf_counter()
    limits, spec = limits or DecodeLimits(), artifact.manifest.preprocess

    def load(path: Path) -> FloatArray | str:
        try:
            return preprocess(decode(path.read_bytes(), limits), spec)
        except ServiceError as error:
            return error.detail
        except (OSError, ValueError) as error:
            return str(error)

    done: list[Path] = []
    vectors: list[FloatArray] = []
    skipped: list[tuple[Path, str]] = []
    for batch in _loaded(files, load, batch_size):
        good = [(path, pixels) for path, pixels in batch if not isinstance(pixels, str)]
        skipped += [(path, pixels) for path, pixels in batch if isinstance(pixels, str)]
        if good:
            features = engine.run(np.stack([pixels for _, pixels in good]))
            means = features.patches.mean(axis=1)  # [B, D]
            for (path, _), cls, mean in zip(good, features.cls, means, strict=True):
                done.append(path)
                vectors.append(Embedded(cls, mean, tokens=0).vector(pooling, normalize))
        advance(len(batch))
    dims = artifact.manifest.config.embed_dim * (2 if pooling == "cls+mean" else 1)
    matrix = np.stack(vectors) if vectors else np.zeros((0, dims), np.float32)
    return done, matrix, EmbedReport(len(done), skipped, time.perf_counter() - started)


def _loaded(
    files: Sequence[Path], load: Callable[[Path], FloatArray | str], batch_size: int
) -> Iterator[list[tuple[Path, FloatArray | str]]]:
    """Batches of loaded files in order, two batches ahead."""
    ahead: deque[tuple[Path, Future[FloatArray | str]]] = deque()
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="decode") as pool:
        rest = iter(files)

        def fill() -> None:
            while len(ahead) < 2 * batch_size and (path := next(rest, None)) is not None:
                ahead.append((path, pool.submit(load, path)))

        fill()
        while ahead:
            batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
            loaded = [(path, future.result()) for path, future in batch]
            fill()
            yield loaded


def save_vectors(
    out: Path, files: Sequence[Path], vectors: FloatArray, artifact: Artifact, tag: dict[str, object]
) -> None:
    """Write `paths` [n], `vectors` [n, D], `fingerprint` and what else decides a vector, aside and then renamed.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "paths": np.array([str(path) for path in files], dtype=np.str_),
        "vectors": vectors,
        "fingerprint": np.array(artifact.fingerprint),
        **{key: np.array(value) for key, value in tag.items()},
    }
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
