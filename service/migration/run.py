"""Run a migration from beginning to end. service/migration/__init__.py lists its steps."""

import asyncio
from contextlib import suppress
from pathlib import Path

from service.errors import CollectionNotFound, Conflict, StorageFailed, Unavailable
from service.generations import Generation, State
from service.live_models import Opened
from service.migration import planning, switching
from service.migration.giving_up import abandon
from service.migration.lock import migration_lock
from service.migration.work import MigrationOptions, MigrationReport, OnProgress, Places, Work
from service.retiring import keep_used, retire_unused
from service.tags import model_of


async def migrate(
    places: Places,
    path: Path,
    opened: Opened,
    options: MigrationOptions,
    on_progress: OnProgress = lambda report: None,
) -> MigrationReport:
    """Re-embed the collections with the model `opened` from the artifact folder `path`, and make it live.

    `on_progress` is called after each step and batch. An exception that it raises ends the migration, which can be
    continued later.

    Raises:
        Conflict: items cannot be embedded again and `lost` is "refuse", the store cannot re-embed collections, the
            window of an earlier switch would end and `end_window` is false, another migration is running, or the live
            model has changed meanwhile.
        Unavailable: a replica does not load the model.
        StorageFailed: the disk has not enough space for the second set of vectors, or the store failed.
    """
    with await migration_lock(places.data_dir):
        return await _run(Work(places, path, opened, options, on_progress, options.lost))


async def _run(work: Work) -> MigrationReport:
    await planning.check_possible(work)
    artifact, engine = work.opened.artifact, work.opened.engine
    generations = work.places.generations
    live = generations.live()
    candidate = generations.add(
        artifact.fingerprint, artifact.name, work.path, engine.name, engine.precision, reason=work.options.reason
    )
    work.report.generation = candidate.number
    try:
        await _change(work, candidate, live)
    except (Conflict, StorageFailed, Unavailable):
        if candidate.state != "live":
            await abandon(work.places, candidate)
        raise
    await _end_without_rollback(work)
    await keep_used(work.places.store, generations)
    await retire_unused(work.places.store, generations, keep=[candidate.number], states=("candidate",))
    await work.tell("done")
    return work.report


async def _change(work: Work, candidate: Generation, live: Generation | None) -> None:
    names = await planning.decided(work)
    await _end_earlier(work, candidate)
    await switching.switch(work, names, candidate, live)
    if work.options.collections is None:
        # A collection may have been created with the old model since the first decision.
        await asyncio.sleep(2 * switching.WAIT_S)
        await _switch_rest(work, candidate)


async def _switch_rest(work: Work, candidate: Generation) -> None:
    """Switch the collections of old models that were created in the meantime. It is too late to refuse the migration,
    so those with items whose image cannot be read stay on the old model."""
    if work.rule == "refuse":
        work.rule = "keep"
    live = await asyncio.to_thread(work.places.generations.live)
    if work.options.promote and (live is None or live.number != candidate.number):
        return  # rolled back already
    if names := await planning.decided(work):
        await switching.switch(work, names, candidate, live)


async def _end_earlier(work: Work, candidate: Generation) -> None:
    """Delete the second set of vectors that an earlier switch or an interrupted migration left behind, because a
    collection can have only one. Collections that this migration has switched already keep theirs."""
    places = work.places
    if places.migrates:
        for pair in await places.migrations.partnerships():
            if candidate.model not in (model_of(pair.partner.tag), model_of(pair.collection.tag)):
                await places.migrations.end(pair.collection.name)
    states: tuple[State, ...] = ("candidate",) if candidate.state == "live" else ("candidate", "former")
    await retire_unused(places.store, places.generations, keep=[candidate.number], states=states)


async def _end_without_rollback(work: Work) -> None:
    """Delete the former vectors of collections whose old model is not the one that a rollback would make live."""
    models = {each.model for each in work.places.generations.all() if each.state == "former"}
    for name in work.report.switched:
        with suppress(CollectionNotFound):  # the collection was deleted
            former = await work.places.migrations.former(name)
            if former is not None and model_of(former.tag) not in models:
                await work.places.migrations.end(name)
