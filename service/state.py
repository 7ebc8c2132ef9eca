"""The collaborators that routes use, in one record, made when the application starts: `request.app.state.service`.

The record is complete from the start. `Lifecycle` holds the state that is needed before startup ends and during
shutdown.
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
    """The state of the process between start and end. The border updates it; shutdown and /readyz read it."""

    warm: bool = False
    draining: bool = False  # shutting down: running requests may finish, new ones are refused
    in_flight: int = 0
    buffered_bytes: int = 0


@dataclass
class Service:
    """The collaborators of one running service."""

    settings: Settings
    artifact: Artifact
    engine: Engine
    tried: tuple[Tried, ...]  # engines tried at startup, in order; the last one serves
    metrics: Metrics
    lifecycle: Lifecycle
    store: VectorStore
    originals: Originals
    pipeline: Pipeline

    def tag(self, fingerprint: str | None = None, pooling: Pooling = DEFAULT_POOLING) -> str:
        """Return the tag that two vectors must share to be comparable. `fingerprint` names another model than the
        served one."""
        size = self.artifact.manifest.input_size
        return make_tag(fingerprint or self.artifact.fingerprint, pooling, size, self.engine.precision)

    @property
    def model_names(self) -> list[str]:
        """The names of the served model that the `model` field of a request accepts, besides "" and "auto"."""
        manifest = self.artifact.manifest
        names = [self.artifact.name, manifest.name, manifest.fingerprint]
        entry = ENTRIES.get(manifest.name)
        return names + list(entry.aliases if entry else ())

    def check_model(self, name: str) -> None:
        """Refuse a request for another model than the served one.

        Raises:
            ModelNotFound: the name is another model's; the message names the served model.
        """
        if name and name != "auto" and name not in self.model_names:
            raise ModelNotFound(
                f"model {name!r} is not served here; this service serves {self.artifact.name} (also: auto, "
                f"{', '.join(self.model_names[1:])})",
                param="model",
            )

    def identity(self, tag: str | None = None) -> dict[str, Any]:
        """Return name and fingerprint of the model that made the vectors: the served one, or the one in a collection's
        tag. The name of another model than the served one is unknown."""
        fingerprint = self.artifact.fingerprint if tag is None else tag_parts(tag).fingerprint
        name = self.artifact.name if fingerprint == self.artifact.fingerprint else None
        return {"model": name, "fingerprint": fingerprint}
