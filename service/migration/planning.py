"""Which collections a migration re-embeds, what makes it impossible, and what happens to items without an image."""

import asyncio
import shutil
from collections.abc import Sequence

from service.errors import CollectionNotFound, Conflict, StorageFailed
from service.generations import utc
from service.migration.images import described, has_image
from service.migration.work import PAGE, Places, Work
from service.search.store import CollectionInfo
from service.tags import model_of, tag_parts


async def check_possible(work: Work) -> None:
    """Refuse a migration that would fail or lose something that the operator has not given up. Nothing is changed.

    Raises:
        Conflict: the store cannot re-embed collections, or the window of an earlier switch would end.
        CollectionNotFound: a collection of the options does not exist.
        StorageFailed: the disk has not enough space for the second set of vectors.
    """
    await _wanted(work)
    await _check_window(work)


async def decided(work: Work) -> list[str]:
    """Return the names of the collections to re-embed, after deciding about items whose image cannot be read.

    Raises:
        Conflict: there are such items, and the rule is to refuse them. Or see `check_possible`.
        CollectionNotFound, StorageFailed: see `check_possible`.
    """
    names = [name for name in await _wanted(work) if name not in work.report.kept]
    await work.tell("listing items without a readable image")
    for name in list(names):
        try:
            await _survey(work, name)
        except CollectionNotFound:
            if work.options.collections is not None:
                raise
            names.remove(name)  # the collection was deleted
    return _without_lost(work, names)


async def _wanted(work: Work) -> list[str]:
    """Return the names of the collections to re-embed. Those that have vectors of the new model already are left
    out."""
    places = work.places
    infos = {info.name: info for info in await places.store.collections()}
    if work.options.collections is None:
        models = {each.model for each in await asyncio.to_thread(places.generations.all)}
        chosen = [info for info in infos.values() if model_of(info.tag) in models]
    else:
        if unknown := [name for name in work.options.collections if name not in infos]:
            raise CollectionNotFound(f"there is no collection {unknown[0]!r}")
        chosen = [infos[name] for name in work.options.collections]
    names = [info.name for info in chosen if info.tag != work.tag(info) and tag_parts(info.tag).pooling]
    _check_store(places, names)
    _check_disk(work, [infos[name] for name in names])
    return names


def _check_store(places: Places, names: Sequence[str]) -> None:
    """Raise Conflict if the store cannot re-embed these collections."""
    if names and not places.migrates:
        raise Conflict(
            f"collections in Milvus cannot be embedded again: {', '.join(names)}. Nothing was changed. For each of "
            "them, fill a new collection with the new model, and move an alias to it"
        )


def _check_disk(work: Work, infos: Sequence[CollectionInfo]) -> None:
    """Raise StorageFailed if the second set of vectors and of segments does not fit on the disk."""
    needed = 0
    for info in infos:
        pooling = tag_parts(info.tag).pooling
        assert pooling is not None
        needed += 2 * info.count * work.dimension(pooling) * (2 if info.spec.dtype == "float16" else 4)
    free = shutil.disk_usage(work.places.data_dir).free
    if needed > 0.9 * free:
        raise StorageFailed(
            f"a second set of vectors needs about {needed / 2**20:.0f} MiB; only {free / 2**20:.0f} MiB are free"
        )


async def _check_window(work: Work) -> None:
    """Raise Conflict if the migration would end the window of an earlier switch, and the options do not allow it."""
    generations = work.places.generations
    former, live = await asyncio.to_thread(generations.window), await asyncio.to_thread(generations.live)
    if work.options.end_window or former is None or work.model in (former.model, live and live.model):
        return
    until = "" if former.keep_until is None else f" until {utc(former.keep_until)}"
    raise Conflict(
        f"generation {former.number} ({former.name}) can become live again at once{until}, and a third model would end "
        "this, because a collection has vectors of at most two models. Nothing was changed. Wait until then, or give "
        "it up with --end-window (in a job end_window=true)"
    )


async def items_without_image(places: Places) -> dict[str, list[str]]:
    """Return the ids of the items that a migration of all collections could not embed again, by collection.

    Raises:
        Conflict: the store cannot re-embed collections.
    """
    models = {each.model for each in await asyncio.to_thread(places.generations.all)}
    names = [info.name for info in await places.store.collections() if model_of(info.tag) in models]
    _check_store(places, names)
    lost: dict[str, list[str]] = {}
    for name in names:
        after = 0
        while page := await places.migrations.missing(name, "", after=after, limit=PAGE):
            after = page[-1].number
            lost.setdefault(name, []).extend([item.id for item in page if not await has_image(places, item)])
    return {name: ids for name, ids in lost.items() if ids}


async def _survey(work: Work, name: str) -> None:
    """Note the items whose image is neither stored nor at a source that may be read."""
    places, lost = work.places, work.lost.setdefault(name, {})
    tag, after = work.tag(await places.store.info(name)), 0
    while page := await places.migrations.missing(name, tag, after=after, limit=PAGE):
        after = page[-1].number
        for item in page:
            if not await has_image(places, item):
                lost[item.id] = item.number


def _without_lost(work: Work, names: list[str]) -> list[str]:
    """Decide about the items whose image cannot be read. Return the collections that are re-embedded anyway.

    Raises:
        Conflict: there are such items, and the rule is to refuse them.
    """
    report = work.report
    report.lost = {name: sorted(ids) for name, ids in work.lost.items() if ids}
    if report.lost and work.rule == "refuse":
        count = sum(map(len, report.lost.values()))
        raise Conflict(
            f"{count} items of {len(report.lost)} collections have no image that can be read "
            f"({described(report.lost)}): drop them (--lost drop), or keep their collections on the old "
            "model (--lost keep; in a job lost=drop or lost=keep)"
        )
    if work.rule == "keep":
        report.kept += [name for name in names if report.lost.get(name)]
    return [name for name in names if name not in report.kept]
