"""The objects that the routes use (`Service`) and the state of the process (`Lifecycle`).

The application creates the `Service` at startup and stores it in `app.state.service`. The `Lifecycle` is separate,
because it is also needed before the `Service` exists and during shutdown.
"""

from dataclasses import dataclass, field

from model.artifact import Artifact
from model.engines.protocol import Engine, Tried
from model.pooling import DEFAULT_POOLING, Pooling
from model.zoo import ENTRIES
from service.answer_schemas import Identity
from service.errors import ModelNotFound
from service.features.pipeline import Pipeline
from service.features.served_model import ServedModel
from service.originals import Originals
from service.rankings import Rankings
from service.search.store import VectorStore
from service.settings import Settings
from service.shared_results import SharedResults
from service.tags import make_tag, tag_parts
from service.telemetry import Metrics
from service.web_images import WebImages


@dataclass
class Lifecycle:
    """The state of the process from its start to its end. `Border` (service/middleware.py) updates the number of
    running requests and the total size of their bodies. The shutdown code and /readyz read the state."""

    warm: bool = False
    draining: bool = False  # shutting down: running requests may finish, new requests get status 503
    in_flight: int = 0
    buffered_bytes: int = 0


@dataclass
class Service:
    """The objects that make up a running service."""

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
    shared: SharedResults = field(default_factory=SharedResults)
    rankings: Rankings = field(default_factory=Rankings)

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

    def check_model(self, name: str) -> None:
        """Check the field `model` of a request. It must be empty, "auto" or one of the served model's names.

        Raises:
            ModelNotFound: `name` is anything else.
        """
        if name and name != "auto" and name not in self.model_names:
            raise ModelNotFound(
                f"model {name!r} is not served here; this service serves {self.artifact.name} (other names: auto, "
                f"{', '.join(self.model_names[1:])})",
                param="model",
            )

    def identity(self, tag: str | None = None) -> Identity:
        """Return the fields `model` and `fingerprint` for an answer. Without `tag`, they describe the served model.
        With the tag of a collection, they describe the model that computed the vectors in the collection. If this is
        not the served model, `model` is None, because only its fingerprint is known."""
        fingerprint = self.artifact.fingerprint if tag is None else tag_parts(tag).fingerprint
        name = self.artifact.name if fingerprint == self.artifact.fingerprint else None
        return {"model": name, "fingerprint": fingerprint}
