"""The objects that the routes use (`Service`) and the state of the process (`Lifecycle`).

The application creates the `Service` at startup and stores it in `app.state.service`. The `Lifecycle` is separate,
because it is also needed before the `Service` exists and during shutdown.
"""

from dataclasses import dataclass, field
from typing import Final

from model.artifact import Artifact
from model.engines.protocol import Engine, Tried
from model.pooling import DEFAULT_POOLING, Pooling
from model.zoo import ENTRIES
from service.answer_schemas import Identity
from service.buffer import Buffer
from service.errors import ModelNotFound, Unavailable
from service.fair import FairSlots
from service.features.pipeline import Pipeline
from service.features.served_model import ServedModel
from service.generations import Generations
from service.originals import Originals
from service.rankings import Rankings
from service.search.store import VectorStore
from service.settings import Settings
from service.shared_results import SharedResults
from service.tags import make_tag, model_of, tag_parts
from service.telemetry import Metrics
from service.web_images import WebImages

FEW_RESULTS: Final = 128
"""An answer with more results than this may occupy a lot of memory while it is made, because each result may have
64 KiB of metadata. So only `LARGE_ANSWERS` of them are made at the same time."""
LARGE_ANSWERS: Final = 4


@dataclass
class Lifecycle:
    """The state of the process from its start to its end. `Border` (service/middleware.py) updates the number of
    running requests and the memory for their bodies and answers. The shutdown code and /readyz read the state."""

    buffer: Buffer
    warm: bool = False
    draining: bool = False  # shutting down: running requests may finish, new requests get status 503
    in_flight: int = 0

    @staticmethod
    def of(settings: Settings) -> "Lifecycle":
        """Return the state of a process that starts with these settings."""
        return Lifecycle(buffer=Buffer(settings.max_buffered_bytes, settings.client_share))


@dataclass
class LoadedModels:
    """The models that this process has loaded, as services by fingerprint and precision. `expected` are the models that
    it should have loaded, and may still be loading."""

    services: dict[tuple[str, str], "Service"] = field(default_factory=dict)
    expected: frozenset[tuple[str, str]] = frozenset()
    is_behind: bool = False  # another generation is live, and this process has not loaded it yet
    unsearchable: int = 0  # collections whose model is not loaded
    failures: dict[tuple[str, str], str] = field(default_factory=dict)  # why models could not be loaded


@dataclass
class Service:
    """The objects that make up a running service with one model. If the process has loaded several models, there is one
    service for each of them, and `loaded` contains all of them. A request uses the same service from its beginning to
    its end, so no answer contains results of two models."""

    settings: Settings
    artifact: Artifact
    engine: Engine
    tried: tuple[Tried, ...]  # engines tried at startup, in order; the last one serves
    metrics: Metrics
    lifecycle: Lifecycle
    store: VectorStore
    originals: Originals
    pipeline: Pipeline
    model: ServedModel
    web_images: WebImages
    loaded: LoadedModels = field(default_factory=LoadedModels)
    generations: Generations | None = None
    shared: SharedResults = field(default_factory=SharedResults)
    rankings: Rankings = field(default_factory=Rankings)
    large_answers: FairSlots = field(default_factory=lambda: FairSlots(LARGE_ANSWERS))

    def tag(self, fingerprint: str | None = None, pooling: Pooling = DEFAULT_POOLING) -> str:
        """Return the tag of vectors that a model computed with this pooling. `fingerprint` identifies the model, and
        None means the served model. A tag is a text that describes how vectors were computed. Only vectors with the
        same tag can be compared."""
        size = self.artifact.manifest.input_size
        return make_tag(fingerprint or self.artifact.fingerprint, pooling, size, self.engine.precision)

    @property
    def model_names(self) -> list[str]:
        """The names that the field `model` of a request may contain, in addition to "" and "auto". All of them mean the
        served model."""
        manifest = self.artifact.manifest
        names = [self.artifact.name, manifest.name, manifest.fingerprint]
        entry = ENTRIES.get(manifest.name)
        return names + list(entry.aliases if entry else ())

    def named(self, name: str) -> "Service":
        """Return the service for the field `model` of a request. If it is empty or "auto", this is the service itself.

        Raises:
            ModelNotFound: no loaded model has this name.
        """
        if not name or name == "auto" or name in self.model_names:
            return self
        for other in self.loaded.services.values():
            if name in other.model_names:
                return other
        raise ModelNotFound(
            f"model {name!r} is not served here; this service serves {self.artifact.name} (other names: auto, "
            f"{', '.join(self.model_names[1:])})",
            param="model",
        )

    def for_tag(self, tag: str, name: str = "auto") -> "Service":
        """Return the service of the model that made the vectors with this tag. If that model is not loaded, or if the
        field `model` of the request names one (`name`), return the service that `named` returns.

        Raises:
            ModelNotFound: no loaded model has this name.
            Unavailable: this process is still loading the model.
        """
        model = model_of(tag)
        if name not in ("", "auto") or model == (self.artifact.fingerprint, self.engine.precision):
            return self.named(name)
        other = self.loaded.services.get(model)
        if other is None and model in self.loaded.expected:
            raise Unavailable(f"the model {model[0][:8]} is being loaded", retry_after_s=2)
        return other or self

    def identity(self, tag: str | None = None) -> Identity:
        """Return the fields `model` and `fingerprint` for an answer. Without `tag`, they describe the served model.
        With the tag of a collection, they describe the model that computed the vectors in the collection. If this
        model is not loaded, `model` is None, because only its fingerprint is known."""
        fingerprint = self.artifact.fingerprint if tag is None else tag_parts(tag).fingerprint
        for each in (self, *self.loaded.services.values()):
            if fingerprint == each.artifact.fingerprint:
                return {"model": each.artifact.name, "fingerprint": fingerprint}
        return {"model": None, "fingerprint": fingerprint}
