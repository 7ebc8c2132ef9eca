"""What the routes work with: one record, made when the application starts, reachable as `request.app.state.service`.

It is whole from the beginning. What is needed before, and while the service stops, is the `Lifecycle`.
"""

from dataclasses import dataclass
from typing import Any

from model.artifact import Artifact
from model.engines.protocol import Engine, Tried
from model.pooling import DEFAULT_POOLING, Pooling
from model.zoo import ENTRIES
from service.errors import ModelNotFound
from service.features.pipeline import Pipeline
from service.originals import Originals
from service.search.store import VectorStore
from service.settings import Settings
from service.tags import make_tag, tag_parts
from service.telemetry import Metrics


@dataclass
class Lifecycle:
    """Where the process stands between start and end: the border counts, shutdown waits, /readyz tells."""

    warm: bool = False
    draining: bool = False  # shutting down: what runs may finish, nothing begins
    in_flight: int = 0
    buffered_bytes: int = 0


@dataclass
class Service:
    """The collaborators of one running service."""

    settings: Settings
    artifact: Artifact
    engine: Engine
    tried: tuple[Tried, ...]  # engines at the start, in order, the one that serves last
    metrics: Metrics
    lifecycle: Lifecycle
    store: VectorStore
    originals: Originals
    pipeline: Pipeline

    def tag(self, fingerprint: str | None = None, pooling: Pooling = DEFAULT_POOLING) -> str:
        """What two vectors must share to be compared; `fingerprint` of another model, if not the served one's."""
        size = self.artifact.manifest.input_size
        return make_tag(fingerprint or self.artifact.fingerprint, pooling, size, self.engine.precision)

    @property
    def model_names(self) -> list[str]:
        """What the `model` field of a request may say for the model that is served, beside "" and "auto"."""
        manifest = self.artifact.manifest
        names = [self.artifact.name, manifest.name, manifest.fingerprint]
        entry = ENTRIES.get(manifest.name)
        return names + list(entry.aliases if entry else ())

    def check_model(self, name: str) -> None:
        """Refuse a request that asks for another model than the one served.

        Raises:
            ModelNotFound: it does; the message names what is served.
        """
        if name and name != "auto" and name not in self.model_names:
            raise ModelNotFound(
                f"model {name!r} is not served here; this service has {self.artifact.name} (also: auto, "
                f"{', '.join(self.model_names[1:])})",
                param="model",
            )

    def identity(self, tag: str | None = None) -> dict[str, Any]:
        """What an answer says about the model that made its vectors: the one served, or the one that a collection's tag
        names; of another than the served one only the fingerprint is known."""
        fingerprint = self.artifact.fingerprint if tag is None else tag_parts(tag).fingerprint
        name = self.artifact.name if fingerprint == self.artifact.fingerprint else None
        return {"model": name, "fingerprint": fingerprint}
