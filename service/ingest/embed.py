"""Embed many image files and write the vectors to one .npz file, without a server: the command `dinov2 embed`.

Several threads decode images in advance, so the engine waits only if decoding is slower than the neural network. At
most two batches of decoded images wait for the engine, so memory does not grow with the number of images. The service
returns the same vectors for the same files. `dinov2 index` (`service/ingest/index.py`) also uses `load_ahead` and
`pooled`.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.cpus import available_cpus
from model.decode import DecodeLimits, sniff
from model.engines.protocol import Engine, Features
from model.files import replacing
from model.folder import HEAD_BYTES, OTHER_SUFFIXES, Account, suffix_of, walk
from model.pooling import DEFAULT_POOLING, Pooling, width
from model.preprocess import preprocess
from service.errors import BrokenImage
from service.features.forward import compute_parts
from service.features.images import decode
from service.features.pipeline import Embedded
from service.outcomes import Outcome, failures, indexed, numbered

FloatArray = npt.NDArray[np.float32]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class EmbedReport:
    """The result of a run: the number of embedded files, the skipped files with the reason for each, and the duration
    of the run."""

    embedded: int
    skipped: list[tuple[Path, str]]
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.embedded / self.seconds if self.seconds else 0.0


def find_files(paths: Sequence[Path], account: Account | None = None) -> list[Path]:
    """Return the images at these paths. For a folder, return all images in it at any depth, sorted by path.

    `model/folder.py` decides which files of a folder are images. A file in `paths` is ignored only if it has the suffix
    of another kind of file, such as `.txt`, and its content is not an image.

    Args:
        paths: files and folders.
        account: counts the files that are ignored, and those that cannot be read.

    Raises:
        ValueError: a path does not exist, or no image was found.
    """
    account = account or Account()
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            if suffix_of(path.name) in OTHER_SUFFIXES and sniff(_head(path)) is None:
                account.ignored[suffix_of(path.name)] += 1
            else:
                files.append(path)
            continue
        for listed in walk(path):
            if listed.ignored is not None:
                account.ignored[listed.ignored] += 1
            elif listed.problem is not None:
                account.fail(listed.path, listed.problem)
            else:
                files.append(Path(listed.path))
    if not files:
        hint = "" if any(path.is_dir() for path in paths) else "; `dinov2 index` also reads lists and archives"
        raise ValueError(f"no images in {', '.join(map(str, paths))} ({account}){hint}")
    return files


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def embed_files(
    files: Sequence[Path],
    artifact: Artifact,
    engine: Engine,
    *,
    pooling: Pooling = DEFAULT_POOLING,
    normalize: bool = True,
    batch_size: int = 16,
    limits: DecodeLimits | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Path], FloatArray, EmbedReport]:
    """Embed image files. A file that cannot be decoded is skipped and listed in the report.

    Args:
        files: image files, in any format that the service can decode.
        advance: called after each batch with the number of files in the batch.

    Returns:
        Three values: the n files that were embedded, their vectors as float32 [n, D], and the report. D is the number
        that `vector_dims` returns.
    """
    started = time.perf_counter()
    limits, spec = limits or DecodeLimits(), artifact.manifest.preprocess

    def pixels_of(path: Path) -> FloatArray:
        try:
            return preprocess(decode(path.read_bytes(), limits), spec)
        except (OSError, ValueError) as error:
            raise BrokenImage(str(error)) from error

    def load(path: Outcome[Path]) -> Outcome[FloatArray]:
        return path.then(pixels_of)

    done: list[Path] = []
    vectors: list[FloatArray] = []
    skipped: list[tuple[Path, str]] = []
    loaded = load_ahead(numbered(files), load, ahead=2 * batch_size)
    while batch := [pixels for _, pixels in islice(loaded, batch_size)]:
        good = indexed(batch)
        skipped += [(files[failure.index], failure.error.detail) for failure in failures(batch)]
        if good:
            done += [files[index] for index, _ in good]
            vectors += vectors_of(engine, [pixels for _, pixels in good], pooling, normalize)
        advance(len(batch))
    dims = vector_dims(artifact, pooling)
    matrix = np.stack(vectors) if vectors else np.zeros((0, dims), np.float32)
    return done, matrix, EmbedReport(len(done), skipped, time.perf_counter() - started)


def vectors_of(engine: Engine, pixels: Sequence[FloatArray], pooling: Pooling, normalize: bool) -> list[FloatArray]:
    """Run one forward pass over preprocessed images [3, h, w], which must all have the same size. Return one vector [D]
    for each image."""
    return pooled(engine.run(np.stack(pixels)), pooling, normalize)


def pooled(features: Features, pooling: Pooling, normalize: bool) -> list[FloatArray]:
    """Return the vector [D] of each image of a forward pass."""
    return [Embedded(parts, tokens=0).vector(pooling, normalize) for parts in compute_parts(features)]


def vector_dims(artifact: Artifact, pooling: Pooling) -> int:
    """Return the number of dimensions of the vectors that this model computes with this pooling."""
    return width(pooling, artifact.manifest.config.embed_dim)


def load_ahead(
    tasks: Iterable[T], load: Callable[[T], R], *, ahead: int, workers: int | None = None
) -> Generator[tuple[T, R], None, None]:
    """Yield each task with the result of `load(task)`, in order. At any time, at most `ahead` tasks have been started
    and not yet yielded.

    `load` runs in `workers` threads, by default one per CPU. A separate thread iterates over `tasks`, so `tasks` may
    wait for a disk or a network connection without delaying the consumer. If `load` or `tasks` raises an exception, the
    generator raises it too. When the generator is closed, no more tasks are started, and the threads end once the
    running calls of `load` return.
    """
    begun: SimpleQueue[tuple[T, Future[R]] | None] = SimpleQueue()
    room, closed = threading.Semaphore(ahead), threading.Event()
    pool = ThreadPoolExecutor(workers or available_cpus(), thread_name_prefix="decode")
    feeder = ThreadPoolExecutor(1, thread_name_prefix="feed")

    def feed() -> None:
        try:
            for task in tasks:
                room.acquire()
                if closed.is_set():
                    return
                begun.put((task, pool.submit(load, task)))
        finally:
            begun.put(None)

    try:
        feeding = feeder.submit(feed)
        while (first := begun.get()) is not None:
            task, future = first
            room.release()
            yield task, future.result()
        feeding.result()
    finally:
        closed.set()
        room.release()
        feeder.shutdown()
        pool.shutdown(cancel_futures=True)


def save_vectors(
    out: Path, files: Sequence[Path], vectors: FloatArray, artifact: Artifact, tag: dict[str, object]
) -> None:
    """Write an .npz file with the arrays `paths` [n], `vectors` [n, D] and `fingerprint`, and one array for each entry
    of `tag`, which describes how the vectors were computed. The file is first written under a temporary name and then
    renamed.

    Raises:
        OSError: the file cannot be written. An existing file at `out` stays unchanged.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "paths": np.array([str(path) for path in files], dtype=np.str_),
        "vectors": vectors,
        "fingerprint": np.array(artifact.fingerprint),
        **{key: np.array(value) for key, value in tag.items()},
    }
    with replacing(out) as path, path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
