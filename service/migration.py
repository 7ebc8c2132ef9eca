"""Make another model live: re-embed every collection while the service goes on answering, then switch.

    1  record the model as a candidate; every replica loads it and from then on writes vectors of both models
    2  list the items whose image can no longer be read, and decide about them
    3  embed what the candidate's collections lack, from stored originals or readable sources
    4  when nothing is lacking and every replica has loaded the candidate: switch all collections in one transaction,
       then make the generation live
    5  for a stated window the former vectors still get every write, so that `rollback` is one call

Each step can be repeated. If the process is killed, the next call goes on where this one stopped. Which model answers a
request is decided by the tag of its collection, so at no moment can an answer mix two models.
"""

import asyncio
import hashlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from model.artifact import ArtifactError
from model.decode import DEFAULT_LIMITS, DecodeLimits
from model.files import lock_file
from model.pooling import Pooling, width
from model.preprocess import preprocess
from service.artifact_choice import artifact_of
from service.errors import CollectionNotFound, Conflict, ServiceError, StorageFailed, Unavailable
from service.features.images import decode
from service.generations import Generation, Generations, State
from service.ingest.embed import vectors_of
from service.live_models import Opened
from service.originals import Originals, photo_digest
from service.search.partners import Filled, Missing, Partnership, migrations_of
from service.search.store import CollectionInfo, VectorStore
from service.tags import make_tag, model_of, tag_parts

log = logging.getLogger(__name__)

PAGE: Final = 256
WAIT_S: Final = 0.2
DEFAULT_KEEP_S: Final = 24 * 3600.0
"""The default length of the window for a rollback, in seconds."""
ROLLED_BACK: Final = "rolled back"
MOVED: Final = 5
"""How often a switch is tried again because collections changed in the meantime."""

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
    """

    collections: tuple[str, ...] | None = None
    lost: Lost = "refuse"
    keep_s: float = DEFAULT_KEEP_S
    share: float = 1.0
    batch_size: int = 8
    replicas_s: float = 900.0
    limits: DecodeLimits = DEFAULT_LIMITS
    promote: bool = True
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


@dataclass(frozen=True)
class Places:
    """What a migration works on. `read_source` returns the image at the `source` of an item that has no stored
    original. If it is None, only stored originals are read."""

    store: VectorStore
    generations: Generations
    originals: Originals
    data_dir: Path
    read_source: Callable[[str], bytes] | None = None


async def migrate(
    places: Places,
    path: Path,
    opened: Opened,
    options: MigrationOptions,
    on_progress: Callable[[MigrationReport], Awaitable[None] | None] = lambda report: None,
) -> MigrationReport:
    """Re-embed the collections with the model `opened` from the artifact folder `path`, and make it live.

    `on_progress` is called after each step and batch. An exception that it raises ends the migration, which can be
    continued later.

    Raises:
        Conflict: items cannot be embedded again and `lost` is "refuse", another migration is running, or the live model
            has changed meanwhile.
        Unavailable: a replica does not load the model.
        StorageFailed: the disk has not enough space for the second set of vectors, or the store failed.
    """
    lock = lock_file(places.data_dir / "migration.lock")
    if lock is None:
        raise Conflict("another migration is running")
    with lock:
        return await _Migration(places, path, opened, options, on_progress).run()


class _Migration:
    def __init__(
        self,
        places: Places,
        path: Path,
        opened: Opened,
        options: MigrationOptions,
        on_progress: Callable[[MigrationReport], Awaitable[None] | None],
    ) -> None:
        self._places, self._path, self._opened, self._options = places, path, opened, options
        self._on_progress = on_progress
        self._report = MigrationReport()
        self._lost: dict[str, dict[str, int]] = {}  # collection -> id -> number of the version that cannot be read
        self._rule: Lost = options.lost

    async def run(self) -> MigrationReport:
        artifact, engine = self._opened.artifact, self._opened.engine
        generations = self._places.generations
        live = generations.live()
        candidate = generations.add(
            artifact.fingerprint, artifact.name, self._path, engine.name, engine.precision, reason=self._options.reason
        )
        self._report.generation = candidate.number
        try:
            await self._change(candidate, live)
        except (Conflict, StorageFailed, Unavailable):
            if candidate.state != "live":
                await abandon(self._places, candidate)
            raise
        await self._end_without_rollback()
        await keep_used(self._places)
        await retire_unused(self._places, keep=[candidate.number], states=("candidate",))
        await self._tell("done")
        return self._report

    async def _change(self, candidate: Generation, live: Generation | None) -> None:
        names = await self._decided()
        await self._end_earlier(candidate)
        await self._switch(names, candidate, live)
        if self._options.collections is None:
            # A collection may have been created with the old model since the first decision.
            await asyncio.sleep(2 * WAIT_S)
            await self._switch_rest(candidate)

    async def _tell(self, stage: str) -> None:
        self._report.stage = stage
        answer = self._on_progress(self._report)
        if answer is not None:
            await answer

    async def _switch_rest(self, candidate: Generation) -> None:
        """Switch the collections of old models that were created in the meantime. It is too late to refuse the
        migration, so those with items whose image cannot be read stay on the old model."""
        if self._rule == "refuse":
            self._rule = "keep"
        live = await asyncio.to_thread(self._places.generations.live)
        if self._options.promote and (live is None or live.number != candidate.number):
            return  # rolled back already
        if names := await self._decided():
            await self._switch(names, candidate, live)

    async def _decided(self) -> list[str]:
        """Return the names of the collections to re-embed, after deciding about items whose image cannot be read."""
        names = [name for name in await self._wanted() if name not in self._report.kept]
        await self._tell("listing items without a readable image")
        for name in list(names):
            try:
                await self._survey(name)
            except CollectionNotFound:
                if self._options.collections is not None:
                    raise
                names.remove(name)  # the collection was deleted
        return await self._without_lost(names)

    async def _end_earlier(self, candidate: Generation) -> None:
        """End the window of an earlier switch, because a collection can have only one second set of vectors.
        Collections that this migration has switched already keep theirs."""
        if "migrations" in self._places.store.capabilities:
            migrations = migrations_of(self._places.store)
            for pair in await migrations.partnerships():
                if candidate.model not in (model_of(pair.partner.tag), model_of(pair.collection.tag)):
                    await migrations.end(pair.collection.name)
        states: tuple[State, ...] = ("candidate",) if candidate.state == "live" else ("candidate", "former")
        await retire_unused(self._places, keep=[candidate.number], states=states)

    async def _end_without_rollback(self) -> None:
        """Delete the former vectors of collections whose old model is not the one that a rollback would make live."""
        models = {each.model for each in self._places.generations.all() if each.state == "former"}
        for name in self._report.switched:
            with suppress(CollectionNotFound):  # the collection was deleted
                former = await migrations_of(self._places.store).former(name)
                if former is not None and model_of(former.tag) not in models:
                    await migrations_of(self._places.store).end(name)

    # ---- which collections

    async def _wanted(self) -> list[str]:
        """Return the names of the collections to re-embed. Those that have vectors of the new model already are left
        out."""
        infos = {info.name: info for info in await self._places.store.collections()}
        if self._options.collections is None:
            models = {each.model for each in self._places.generations.all()}
            chosen = [info for info in infos.values() if model_of(info.tag) in models]
        else:
            if unknown := [name for name in self._options.collections if name not in infos]:
                raise CollectionNotFound(f"there is no collection {unknown[0]!r}")
            chosen = [infos[name] for name in self._options.collections]
        names = [info.name for info in chosen if info.tag != self._tag(info) and tag_parts(info.tag).pooling]
        if names and "migrations" not in self._places.store.capabilities:
            raise Conflict(
                f"this vector store cannot re-embed {', '.join(names)}: fill a new collection and move an alias to it"
            )
        self._check_disk([infos[name] for name in names])
        return names

    def _tag(self, info: CollectionInfo) -> str:
        """Return the tag of the new vectors of a collection."""
        artifact, pooling = self._opened.artifact, tag_parts(info.tag).pooling
        size = artifact.manifest.input_size
        return make_tag(artifact.fingerprint, pooling or "", size, self._opened.engine.precision)

    def _dimension(self, pooling: Pooling) -> int:
        return width(pooling, self._opened.artifact.manifest.config.embed_dim)

    def _check_disk(self, infos: Sequence[CollectionInfo]) -> None:
        """Raise StorageFailed if the second set of vectors and of segments does not fit on the disk."""
        needed = 0
        for info in infos:
            pooling = tag_parts(info.tag).pooling
            assert pooling is not None
            needed += 2 * info.count * self._dimension(pooling) * (2 if info.spec.dtype == "float16" else 4)
        free = shutil.disk_usage(self._places.data_dir).free
        if needed > 0.9 * free:
            raise StorageFailed(
                f"a second set of vectors needs about {needed / 2**20:.0f} MiB; only {free / 2**20:.0f} MiB are free"
            )

    # ---- embedding

    async def _without_lost(self, names: list[str]) -> list[str]:
        """Decide about the items whose image cannot be read. Return the collections that are re-embedded anyway.

        Raises:
            Conflict: there are such items, and the options refuse them.
        """
        self._report.lost = {name: sorted(ids) for name, ids in self._lost.items() if ids}
        if self._report.lost and self._rule == "refuse":
            count = sum(map(len, self._report.lost.values()))
            raise Conflict(
                f"{count} items of {len(self._report.lost)} collections have no image that can be read "
                f"({described(self._report.lost)}): drop them (--lost drop), or keep their collections on the old "
                "model (--lost keep; in a job lost=drop or lost=keep)"
            )
        if self._rule == "keep":
            self._report.kept += [name for name in names if self._report.lost.get(name)]
        return [name for name in names if name not in self._report.kept]

    async def _survey(self, name: str) -> None:
        """Note the items whose image is neither stored nor at a source that may be read."""
        lost, tag = self._lost.setdefault(name, {}), self._tag(await self._places.store.info(name))
        after = 0
        while page := await migrations_of(self._places.store).missing(name, tag, after=after, limit=PAGE):
            after = page[-1].number
            for item in page:
                if not await has_image(self._places, item):
                    lost[item.id] = item.number

    async def _fill(self, name: str) -> bool:
        """Embed the items that the partner of a collection lacks. Return whether any were embedded."""
        migrations, lost = migrations_of(self._places.store), self._lost.setdefault(name, {})
        info = await self._places.store.info(name)
        tag, pooling = self._tag(info), tag_parts(info.tag).pooling
        if info.tag == tag or pooling is None:
            return False  # switched before this migration was interrupted, or created again for other vectors
        await migrations.start(name, tag, self._dimension(pooling))
        after, added = 0, 0
        while page := await migrations.missing(name, tag, after=after, limit=self._options.batch_size):
            after = page[-1].number
            wanted = [item for item in page if lost.get(item.id) != item.number]
            if not wanted:
                continue
            started = time.monotonic()
            try:
                added += await self._embed(name, wanted, tag, pooling)
            except Conflict:  # the collection was deleted and created again: begin with the new one
                return True
            self._report.embedded += len(wanted)
            self._report.pending = await migrations.pending()
            await self._tell(f"embedding {name}")
            busy = time.monotonic() - started
            await asyncio.sleep(busy * (1 / self._options.share - 1))
        return added > 0

    async def _embed(self, name: str, wanted: Sequence[Missing], tag: str, pooling: Pooling) -> int:
        images = [await self._read(name, item) for item in wanted]
        readable = [(item, image) for item, image in zip(wanted, images, strict=True) if image is not None]
        filled = await asyncio.to_thread(self._vectors, name, readable, pooling)
        return await migrations_of(self._places.store).fill(name, tag, filled) if filled else 0

    async def _partners(self) -> list[Partnership]:
        return await migrations_of(self._places.store).partnerships()

    async def _read(self, name: str, item: Missing) -> bytes | None:
        """Return the image of an item, or note the item as lost and return None."""
        digest = photo_digest(item)
        try:
            if digest is not None and await self._places.originals.size(digest) is not None:
                return await self._places.originals.get(digest)
            if item.source is not None and self._places.read_source is not None:
                image = await asyncio.to_thread(self._places.read_source, item.source)
                if digest in (None, hashlib.sha256(image).hexdigest()):
                    return image
                log.warning("item %r of %r: the image at its source has changed", item.id, name)
        except (OSError, ValueError, ServiceError) as error:
            log.warning("item %r of %r: %s", item.id, name, error)
        self._lose(name, item)
        return None

    def _vectors(self, name: str, images: Sequence[tuple[Missing, bytes]], pooling: Pooling) -> list[Filled]:
        """Embed images with the new model, as the service does."""
        spec = self._opened.artifact.manifest.preprocess
        decoded = []
        for item, image in images:
            try:
                decoded.append((item, preprocess(decode(image, self._options.limits), spec)))
            except (ServiceError, ValueError) as error:
                log.warning("item %r of %r: %s", item.id, name, error)
                self._lose(name, item)
        if not decoded:
            return []
        vectors = vectors_of(self._opened.engine, [pixels for _, pixels in decoded], pooling, True)
        filled = []
        for (item, _), vector in zip(decoded, vectors, strict=True):
            if np.isfinite(vector).all() and vector.any():
                filled.append(Filled(item.number, item.id, vector))
            else:
                self._lose(name, item)
        return filled

    def _lose(self, name: str, item: Missing) -> None:
        self._lost.setdefault(name, {})[item.id] = item.number
        self._report.lost = {each: sorted(ids) for each, ids in self._lost.items() if ids}

    # ---- switching

    async def _switch(self, names: list[str], candidate: Generation, live: Generation | None) -> None:
        """Fill what is lacking until all collections can be switched, and switch them together with the model."""
        for attempt in range(MOVED):
            for name in list(names):
                try:
                    while await self._fill(name):
                        pass
                except (CollectionNotFound, ValueError):
                    if name in {info.name for info in await self._places.store.collections()}:
                        raise
                    names.remove(name)  # the collection was deleted
            await self._keep_lost(names)
            await self._wait_for_replicas(candidate)
            await self._check_live(candidate, live)
            if await self._try_switch(names, last=attempt == MOVED - 1):
                break
        if self._options.promote:
            await asyncio.to_thread(
                self._places.generations.promote,
                candidate.number,
                expected=live.number if live else None,
                keep_s=self._options.keep_s,
                reason=self._options.reason,
            )
        self._report.switched += names
        await self._tell("switched")

    async def _keep_lost(self, names: list[str]) -> None:
        """Leave collections on the old model if an image turned out to be unreadable and the options say so."""
        for name in list(names) if self._rule == "keep" else ():
            try:
                if await self._still_lost(name):
                    await migrations_of(self._places.store).end(name)
                    self._report.kept.append(name)
                    names.remove(name)
            except CollectionNotFound:
                names.remove(name)

    async def _check_live(self, candidate: Generation, live: Generation | None) -> None:
        """Raise Conflict if another generation has become live since the start. The collections must not be switched
        then, because the model could not follow."""
        now = await asyncio.to_thread(self._places.generations.live)
        allowed = {candidate.number, live and live.number}
        if self._options.promote and (now and now.number) not in allowed:
            raise Conflict(
                f"generation {now and now.number} is live, not {live and live.number}: the live model was changed "
                "during the migration; start it again to go on"
            )

    async def _try_switch(self, names: list[str], *, last: bool) -> bool:
        pairs = {pair.collection.name: pair for pair in await self._partners()} if names else {}
        names[:] = [name for name in names if name in pairs]  # the others were deleted and perhaps created again
        if not names:
            return True
        lost = {name: await self._still_lost(name) for name in names}
        if any(lost.values()) and self._rule != "drop":
            name = next(name for name in lost if lost[name])
            raise Conflict(f"{lost[name]} items of {name!r} cannot be embedded with the new model; see the log")
        tags = {name: self._tag(pairs[name].collection) for name in names}
        try:
            await migrations_of(self._places.store).switch(tags, may_lack=lost)
        except (Conflict, CollectionNotFound):  # items were written or a collection was deleted in the meantime
            if last:
                raise
            return False
        return True

    async def _still_lost(self, name: str) -> int:
        """Return the number of items that the partner lacks because they cannot be read."""
        lost, after, count = self._lost.get(name, {}), 0, 0
        if not lost:
            return 0
        tag = self._tag(await self._places.store.info(name))
        while page := await migrations_of(self._places.store).missing(name, tag, after=after, limit=PAGE):
            after = page[-1].number
            count += sum(lost.get(item.id) == item.number for item in page)
        return count

    async def _wait_for_replicas(self, candidate: Generation) -> None:
        deadline = time.monotonic() + self._options.replicas_s
        while waiting := [
            each.id
            for each in await asyncio.to_thread(self._places.generations.replicas)
            if candidate.number not in each.loaded
        ]:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{', '.join(waiting)} did not load the model within {self._options.replicas_s:g} s; see its log"
                )
            await self._tell(f"waiting for {len(waiting)} replicas to load the model")
            await asyncio.sleep(WAIT_S)


def described(lost: Mapping[str, Sequence[str]], most: int = 10) -> str:
    """Return a text that names items by their collections, at most `most` of each."""
    return "; ".join(
        f"{name}: {', '.join(ids[:most])}{f' and {len(ids) - most} more' if len(ids) > most else ''}"
        for name, ids in lost.items()
    )


async def abandon(places: Places, candidate: Generation) -> None:
    """Delete the vectors of a candidate and retire it. The live model stays as it is."""
    if "migrations" in places.store.capabilities:
        migrations = migrations_of(places.store)
        for pair in await migrations.partnerships():
            if pair.role == "candidate" and model_of(pair.partner.tag) == candidate.model:
                await migrations.end(pair.collection.name)
    others = [each.number for each in places.generations.all() if each.number != candidate.number]
    await retire_unused(places, keep=others, states=("candidate",))


async def keep_used(places: Places) -> None:
    """Let replicas load the retired models of which a collection still has vectors, so that it can be searched."""
    used = {model_of(info.tag) for info in await places.store.collections()}
    for each in await asyncio.to_thread(places.generations.all):
        if each.state == "retired" and each.model in used:
            await asyncio.to_thread(places.generations.keep, each.number)


async def items_without_image(places: Places) -> dict[str, list[str]]:
    """Return the ids of the items that a migration of all collections could not embed again, by collection."""
    models = {each.model for each in await asyncio.to_thread(places.generations.all)}
    lost: dict[str, list[str]] = {}
    for info in await places.store.collections():
        if model_of(info.tag) not in models or "migrations" not in places.store.capabilities:
            continue
        after = 0
        while page := await migrations_of(places.store).missing(info.name, "", after=after, limit=PAGE):
            after = page[-1].number
            lost.setdefault(info.name, []).extend([item.id for item in page if not await has_image(places, item)])
    return {name: ids for name, ids in lost.items() if ids}


async def has_image(places: Places, item: Missing) -> bool:
    """Return whether the image of an item is stored, or may be read from its source."""
    digest = photo_digest(item)
    if digest is not None and await places.originals.size(digest) is not None:
        return True
    return item.source is not None and places.read_source is not None


async def abandon_all(places: Places) -> None:
    """Delete the vectors of every candidate, and retire candidates of which no collection has vectors. If a migration
    was killed after its collections were switched and before its model became live, they are switched back first.

    Raises:
        Conflict: a migration is running, or the vectors of the live model lack items that were written since.
    """
    lock = lock_file(places.data_dir / "migration.lock")
    if lock is None:
        raise Conflict("a migration is running: cancel it first")
    with lock:
        if "migrations" in places.store.capabilities:
            migrations = migrations_of(places.store)
            every = await asyncio.to_thread(places.generations.all)
            live = {each.model for each in every if each.state == "live"}
            candidates = {each.model for each in every if each.state == "candidate"}
            pairs = await migrations.partnerships()
            half_done = {
                pair.collection.name: pair.partner.tag
                for pair in pairs
                if pair.role == "former"
                and model_of(pair.partner.tag) in live
                and model_of(pair.collection.tag) in candidates
            }
            await migrations.switch(half_done)
            for pair in pairs:
                if pair.role == "candidate" or pair.collection.name in half_done:
                    await migrations.end(pair.collection.name)
        await retire_unused(places, keep=(), states=("candidate",))


async def retire_unused(places: Places, *, keep: Sequence[int], states: Sequence[State]) -> None:
    """Retire the generations in these states of which no collection has vectors, except those with the numbers in
    `keep`."""
    used = {model_of(info.tag) for info in await places.store.collections()}
    if "migrations" in places.store.capabilities:
        used |= {model_of(pair.partner.tag) for pair in await migrations_of(places.store).partnerships()}
    for each in await asyncio.to_thread(places.generations.all):
        if each.state in states and each.model not in used and each.number not in keep:
            await asyncio.to_thread(places.generations.retire, each.number)


@dataclass(frozen=True)
class RolledBack:
    """The result of a rollback. `created_since` are the collections that were created after the switch. They have
    vectors of the model that was live until now."""

    generation: Generation
    collections: list[str]
    lacking: Mapping[str, int]
    created_since: list[str]


async def roll_back(places: Places, *, keep_s: float = DEFAULT_KEEP_S, force: bool = False) -> RolledBack:
    """Make the former generation live again, with its collections as they are now.

    Raises:
        Conflict: there is no former generation whose window is open, or the last switch was a rollback too (so a
            request that is repeated does not go forward again). Or `force` is false, and the former generation lacks
            items that were written without an image since the switch, or its artifact is gone, so that no process could
            load it.
    """
    every = await asyncio.to_thread(places.generations.all)
    live = next((each for each in every if each.state == "live"), None)
    former = next((each for each in every if each.state == "former"), None)
    if live is None or former is None:
        raise Conflict("there is no former generation to go back to: the window for a rollback has ended")
    if live.reason == ROLLED_BACK:
        raise Conflict(
            f"generation {live.number} is live after a rollback; to go forward, promote generation {former.number}"
        )
    if not force:
        try:
            await asyncio.to_thread(artifact_of, former, places.data_dir)
        except ArtifactError as error:
            raise Conflict(f"after a restart, the service could not load it: {error}") from error
    pairs: list[Partnership] = []
    if "migrations" in places.store.capabilities:
        pairs = [
            pair
            for pair in await migrations_of(places.store).partnerships()
            if pair.role == "former" and model_of(pair.partner.tag) == former.model
        ]
    lacking = {}
    for pair in pairs:
        if lacks := await migrations_of(places.store).lacking(pair.collection.name):
            lacking[pair.collection.name] = lacks
    if lacking and not force:
        raise Conflict(
            f"the vectors of generation {former.number} lack {sum(lacking.values())} items that were written since the "
            "switch without an image; force=true goes back without them"
        )
    if pairs:
        tags = {pair.collection.name: pair.partner.tag for pair in pairs}
        await migrations_of(places.store).switch(tags, may_lack=lacking)
    promoted = await asyncio.to_thread(
        places.generations.promote, former.number, expected=live.number, keep_s=keep_s, reason=ROLLED_BACK
    )
    names = [pair.collection.name for pair in pairs]
    new = [info.name for info in await places.store.collections() if model_of(info.tag) == live.model]
    return RolledBack(promoted, names, lacking, [name for name in new if name not in names])
