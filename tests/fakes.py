"""Test doubles: an engine that computes features from pixels by a fixed rule, and an artifact for it.

A test can slow the engine down, block it with an event, make it fail on chosen images, or end its worker thread. The
engine records the shapes of its inputs.
"""

import asyncio
import contextlib
import functools
import gc
import io
import json
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from model.artifact import Artifact, Manifest, ParityRecord
from model.config import ViTConfig
from model.dinotxt.store import TEXT_ENCODER, VOCABULARY
from model.engines.protocol import Features, FloatArray
from model.preprocess import PreprocessSpec
from service.app import create_app
from service.features.pipeline import Embedded
from service.live_models import Record
from service.outcomes import Outcome, numbered
from service.search.store import VectorStore
from service.settings import Settings
from service.state import Service

DIMS = 8
SPEC = PreprocessSpec(resize=32, crop=28)
INNER = ("queries.0", "keys.0", "tokens.0")
N_PATCHES = 4


@functools.cache
def _weights(seed: int) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(3 * 14 * 14, DIMS)).astype(np.float32) / 10


class WorkerKilled(BaseException):
    """The error that ends a worker thread. It is not an `Exception`, so no code handles it as a failed forward pass."""


@dataclass
class FakeEngine:
    """An engine that multiplies the pixels of each patch by a fixed matrix, which depends on `seed`.

    The class token is computed from the mean of the patch tokens.
    """

    name: str = "fake"
    precision: str = "fp32"
    device: str = "cpu"
    delay_s: float = 0.0
    gate: threading.Event | None = None  # each pass waits until the event is set
    fails: Callable[[FloatArray], bool] = field(default=lambda pixels: False)  # gets a batch, [B, 3, h, w]
    error: Exception | None = None  # each pass raises it
    killed: bool = False
    batches: list[tuple[int, ...]] = field(default_factory=list)  # shapes of the inputs
    entered: threading.Event = field(default_factory=threading.Event)
    closed: bool = False
    seed: int = 0

    @property
    def images(self) -> int:
        return sum(shape[0] for shape in self.batches)

    def run(self, pixels: FloatArray) -> Features:
        self.batches.append(pixels.shape)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        time.sleep(self.delay_s)
        if self.killed:
            raise WorkerKilled
        if self.error is not None:
            raise self.error
        if self.fails(pixels):
            raise RuntimeError("the fake engine was told to fail; secret-internals")
        batch, _, height, width = pixels.shape
        cut = pixels.reshape(batch, 3, height // 14, 14, width // 14, 14).transpose(0, 2, 4, 1, 3, 5)
        patches = np.tanh(cut.reshape(batch, -1, 3 * 14 * 14) @ _weights(self.seed))  # [B, N, D]
        return Features(np.tanh(2 * patches.mean(axis=1) + 0.1), patches, np.zeros((batch, 0, DIMS), np.float32))

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        return all(side % 14 == 0 for side in size) and set(outputs) <= {*Features._fields, *INNER}

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Return features, or inner outputs that consist of the class token followed by the patches."""
        features = self.run(pixels)._asdict()
        tokens = np.concatenate([features["cls"][:, None], features["patches"]], axis=1)
        return {name: features.get(name, tokens) for name in names}

    def close(self) -> None:
        self.closed = True


def fake_artifact(name: str = "dinov2_fake", digit: str = "a") -> Artifact:
    """Return an artifact without files. Its fingerprint is `digit`, repeated 64 times."""
    manifest = Manifest(
        name=name,
        fingerprint=digit * 64,
        config=ViTConfig(embed_dim=DIMS, depth=1, num_heads=1, img_size=28),
        preprocess=SPEC,
        input_size=(28, 28),
        parity=[
            ParityRecord(
                engine="fake",
                precision="fp32",
                images=1,
                max_abs_error=0.0,
                min_cosine_cls=1.0,
                min_cosine_patches=1.0,
                neighbour_agreement=1.0,
            )
        ],
        provenance={"made_by": "tests"},
        licence="Apache-2.0",
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    return Artifact(path=Path("artifacts") / f"{name}-{digit * 8}", manifest=manifest, locations={})


class FakeDinoTxt:
    """A dino.txt head for the fake artifact. The vision head changes nothing, and a text has a random vector."""

    def __init__(self) -> None:
        files = {name: SimpleNamespace(sha256=name) for name in (TEXT_ENCODER, VOCABULARY)}
        self.record = SimpleNamespace(files=files, name="fake")
        self.tokenizer = SimpleNamespace(prompt=lambda text: [1, *text.encode(), 0])
        self.text_encoder = SimpleNamespace(shape=SimpleNamespace(context_length=77), encode=self._encode)
        self.vision_head = SimpleNamespace(refine=lambda tokens: tokens)
        self.encoded: list[list[int]] = []

    def _encode(self, prompts: Sequence[list[int]]) -> FloatArray:
        self.encoded.extend(prompts)
        rows = [np.random.default_rng(prompt).normal(size=2 * DIMS) for prompt in prompts]
        return np.array(rows, np.float32)


def photo(seed: int = 0, *, size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    """Return an encoded image of random noise with `size` (width, height) pixels. Each seed gives a different image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def plain_photo(value: int) -> bytes:
    """Return an encoded image that has one uniform grey value. A test can make the engine fail on this value."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Running:
    """A running service without a web server. Requests go directly to the application."""

    app: FastAPI
    client: httpx.AsyncClient
    service: Service
    engine: FakeEngine

    async def embed(self, images: Sequence[bytes]) -> list[Outcome[Embedded]]:
        """Return the pipeline's result for each image. All images must be decodable."""
        return await self.service.pipeline.embed(numbered(images))


@asynccontextmanager
async def running(
    data_dir: Path,
    *,
    engine: FakeEngine | None = None,
    artifact: Artifact | None = None,
    cache: Any = None,
    store: VectorStore | None = None,
    record: Record | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Start a service for the duration of a `with` block.

    The service uses the embedded vector store unless `store` is given. The engine's records do not include the warm-up.
    """

    async def open_given() -> VectorStore:
        assert store is not None
        return store

    engine = engine or FakeEngine()
    chosen = Settings(data_dir=data_dir, **{"decode_workers": 2, "batch_max_patches": 2048} | settings)
    open_store = open_given if store else None
    app = create_app(chosen, artifact or fake_artifact(), engine, cache=cache, open_store=open_store, record=record)
    async with app.router.lifespan_context(app):
        engine.batches.clear()
        engine.entered.clear()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            yield Running(app, client, app.state.service, engine)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Run other tasks of the event loop until the condition is true. Fail if this takes more than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.002)


def most_s(body: bytes) -> float:
    """Return the maximum CPU time in seconds that refusing `body` may take.

    It is one second plus 20 times the time that parsing the JSON takes on this machine.
    """
    started = time.process_time()
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(body)
    return 1 + 20 * (time.process_time() - started)


@contextmanager
def no_file_left_open() -> Iterator[None]:
    """Fail if the `with` block leaves an open file for the garbage collector to close."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    left = [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)]
    assert not [text for text in left if "nclosed file" in text]
