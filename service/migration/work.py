"""What a migration works on, its options and its progress."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from model.decode import DEFAULT_LIMITS, DecodeLimits
from model.pooling import Pooling, width
from service.features.patch_store import PatchStore
from service.generations import Generations
from service.live_models import Opened
from service.originals import Originals
from service.search.partners import Migrations, Missing, migrations_of
from service.search.store import CollectionInfo, VectorStore
from service.tags import make_tag, tag_parts

PAGE: Final = 256
"""The number of items that are read at once."""
DEFAULT_KEEP_S: Final = 24 * 3600.0
"""The default length of the window for a rollback, in seconds."""

Lost = Literal["refuse", "drop", "keep"]
"""What to do about items whose image cannot be read: refuse the migration, drop these items, or keep their collections
on the old model."""


@dataclass(frozen=True)
class MigrationOptions:
    """The options of a migration.

    collections: the names of the collections to re-embed. None means all collections of models that are or were live.
    lost: what to do about items whose image cannot be read.
    keep_s: the length of the window for a rollback, in seconds.
    share: the share of its time for which the copier may embed, above 0 and up to 1.
    replicas_s: how long to wait for replicas to load the model, in seconds.
    promote: whether the model becomes live. If not, only the collections change.
    end_window: whether the window of an earlier switch may end, so that its former model can no longer become live at
        once.
    """

    collections: tuple[str, ...] | None = None
    lost: Lost = "refuse"
    keep_s: float = DEFAULT_KEEP_S
    share: float = 1.0
    batch_size: int = 8
    replicas_s: float = 900.0
    limits: DecodeLimits = DEFAULT_LIMITS
    promote: bool = True
    end_window: bool = False
    reason: str = "promoted"


@dataclass
class MigrationReport:
    """The progress and the result of a migration. `lost` lists the ids of the items whose image cannot be read, by
    collection."""

    stage: str = "starting"
    embedded: int = 0
    pending: int = 0
    lost: dict[str, list[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    switched: list[str] = field(default_factory=list)
    generation: int = 0


OnProgress = Callable[[MigrationReport], Awaitable[None] | None]


@dataclass(frozen=True)
class Places:
    """What a migration works on. `read_source` returns the image at the `source` of an item that has no stored
    original. If it is None, only stored originals are read. The new patch features of stored images are written to
    `patches`, if it is not None."""

    store: VectorStore
    generations: Generations
    originals: Originals
    data_dir: Path
    read_source: Callable[[str], bytes] | None = None
    patches: PatchStore | None = None

    @property
    def migrates(self) -> bool:
        """Whether the collections of the store can be re-embedded."""
        return "migrations" in self.store.capabilities

    @property
    def migrations(self) -> Migrations:
        """The methods of the store that re-embed collections. `migrates` must be true."""
        return migrations_of(self.store)


@dataclass
class Work:
    """A migration that is running, with the model `opened` from the artifact folder `path`.

    rule: what to do about items whose image cannot be read. It may change during the migration.
    lost: for each collection, the number of the version of each item that cannot be read, by the id of the item.
    """

    places: Places
    path: Path
    opened: Opened
    options: MigrationOptions
    on_progress: OnProgress
    rule: Lost
    report: MigrationReport = field(default_factory=MigrationReport)
    lost: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def model(self) -> tuple[str, str]:
        """The fingerprint and the precision of the new vectors."""
        return self.opened.artifact.fingerprint, self.opened.engine.precision

    def tag(self, info: CollectionInfo) -> str:
        """Return the tag of the new vectors of a collection."""
        artifact, pooling = self.opened.artifact, tag_parts(info.tag).pooling
        return make_tag(artifact.fingerprint, pooling or "", artifact.manifest.input_size, self.model[1])

    def dimension(self, pooling: Pooling) -> int:
        """Return the dimension of the new vectors."""
        return width(pooling, self.opened.artifact.manifest.config.embed_dim)

    def lose(self, name: str, item: Missing) -> None:
        """Note that the image of an item of the collection `name` cannot be read."""
        self.lost.setdefault(name, {})[item.id] = item.number
        self.report.lost = {each: sorted(ids) for each, ids in self.lost.items() if ids}

    async def tell(self, stage: str) -> None:
        """Report a stage."""
        self.report.stage = stage
        answer = self.on_progress(self.report)
        if answer is not None:
            await answer
