"""A service whose model the tests change while it answers requests."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact import MANIFEST
from service.generations import Generation, Generations
from service.live_models import Opened, Record
from service.migration.run import migrate
from service.migration.work import MigrationOptions, MigrationReport, Places
from tests.fakes import FakeEngine, Running, fake_artifact, photo, running, until

MODELS = {digit * 64: (fake_artifact(f"model_{digit}", digit), seed) for seed, digit in enumerate("abc")}
"""Artifacts with the seeds of their engines, by fingerprint."""


def opened(digit: str) -> Opened:
    artifact, seed = MODELS[digit * 64]
    return Opened(artifact, FakeEngine(seed=seed))


def vector_of(fingerprint: str, image: bytes) -> np.ndarray:
    """Compute the vector that a model gives an image, without the service."""
    from model.preprocess import preprocess
    from service.features.images import decode
    from service.ingest.embed import vectors_of

    artifact, seed = MODELS[fingerprint]
    pixels = preprocess(decode(image), artifact.manifest.preprocess)
    return vectors_of(FakeEngine(seed=seed), [pixels], "cls", True)[0]


@dataclass
class Life:
    """A service with generation 1 (model a), and what a migration needs."""

    run: Running
    generations: Generations
    places: Places

    async def migrate(self, digit: str = "b", **options: Any) -> MigrationReport:
        model = opened(digit)
        return await migrate(self.places, Path("artifacts") / digit, model, MigrationOptions(**options))

    async def ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        answer = await self.run.client.request(method, path, **content)
        assert answer.status_code < 300, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def put(self, name: str, item_id: str, image: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "image/png"}
        return await self.ask("PUT", f"/v1/collections/{name}/items/{item_id}", content=image, headers=headers)

    async def search(self, name: str, image: bytes, k: int = 1) -> dict[str, Any]:
        headers = {"Content-Type": "image/png"}
        return await self.ask("POST", f"/v1/collections/{name}/search?k={k}", content=image, headers=headers)

    async def embed(self, image: bytes) -> dict[str, Any]:
        return await self.ask("POST", "/v1/embeddings", content=image, headers={"Content-Type": "image/png"})

    async def live_is(self, digit: str) -> None:
        await until(lambda: self.run.app.state.service.artifact.fingerprint == digit * 64)


@asynccontextmanager
async def life(
    data_dir: Path, load: Callable[[Generation], Opened] | None = None, **settings: Any
) -> AsyncIterator[Life]:
    generations = Generations(data_dir)
    for artifact, _ in MODELS.values():
        folder = data_dir / "artifacts" / artifact.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(artifact.manifest.model_dump_json())
    first = opened("a")
    made = generations.add("a" * 64, first.artifact.name, Path("artifacts/a"), "fake", "fp32", reason="first")
    made = generations.promote(made.number, expected=None, keep_s=0)
    record = Record(generations, made, load or (lambda generation: opened(generation.fingerprint[0])))
    async with running(data_dir, engine=first.engine, artifact=first.artifact, record=record, **settings) as run:
        yield Life(run, generations, Places(run.service.store, generations, run.service.originals, data_dir))


async def make_collection(one: Life, name: str = "c", count: int = 5) -> list[bytes]:
    await one.ask("PUT", f"/v1/collections/{name}", json={"originals": True})
    images = [photo(100 + n) for n in range(count)]
    for n, image in enumerate(images):
        await one.put(name, f"i{n}", image)
    return images


async def meanwhile(one: Life, stage: str, action: Callable[[], Any], digit: str = "b", **options: Any) -> Any:
    """Migrate, and do something once when this stage begins. Return the report."""
    done = False

    async def on_progress(report: MigrationReport) -> None:
        nonlocal done
        if report.stage.startswith(stage) and not done:
            done = True
            await action()

    model = opened(digit)
    return await migrate(one.places, Path("artifacts") / digit, model, MigrationOptions(**options), on_progress)


async def models_of(one: Life) -> dict[str, str]:
    """Return the model of each collection."""
    return {info.name: info.tag[0] for info in await one.places.store.collections()}
