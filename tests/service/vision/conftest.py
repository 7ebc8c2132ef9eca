"""The bundled model, loaded once for all tests of vision tasks."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from model.artifact import Artifact, bundled_artifact, load_artifact
from model.engines.onnxruntime_engine import OnnxEngine
from service.vision.local import Vision
from tests.fakes import Running, running
from tests.service.vision.head_models import add_classifier, add_linear_depth, add_segmenter

Serve = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact that ships with the project, with one head of each kind. Derived graphs are written to a temporary
    folder."""
    artifact = load_artifact(bundled_artifact(), derived_dir=tmp_path_factory.mktemp("derived"))
    add_linear_depth(artifact)
    add_segmenter(artifact)
    add_classifier(artifact)
    return artifact


@pytest.fixture(scope="session")
def vision(bundled: Artifact) -> Vision:
    """The bundled model for `Vision.run`."""
    return Vision(bundled, OnnxEngine(bundled.file("model.onnx"), threads=1, inner="always"), threads=1)


@pytest.fixture
def serve(vision: Vision, tmp_path: Path) -> Serve:
    """A function that starts a service with the bundled model: `async with serve(**settings) as run`."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Running]:
        async with running(tmp_path, engine=_Kept(vision.engine), artifact=vision.artifact, **settings) as run:
            yield run

    return start


class _Kept:
    """An engine that stays open when a service ends, with the records that `running` resets."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.batches: list[Any] = []
        self.entered = type("Entered", (), {"clear": lambda self: None})()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Leave the engine open for the next test."""
