"""Give up a migration: delete what was prepared, and leave the live model as it is."""

import asyncio

from service.generations import Generation
from service.migration.lock import migration_lock
from service.migration.work import Places
from service.retiring import retire_unused
from service.tags import model_of


async def abandon(places: Places, candidate: Generation) -> None:
    """Delete the vectors of a candidate and retire it. The live model stays as it is."""
    if places.migrates:
        for pair in await places.migrations.partnerships():
            if pair.role == "candidate" and model_of(pair.partner.tag) == candidate.model:
                await places.migrations.end(pair.collection.name)
    others = [each.number for each in places.generations.all() if each.number != candidate.number]
    await retire_unused(places.store, places.generations, keep=others, states=("candidate",))


async def abandon_all(places: Places) -> None:
    """Delete the vectors of every candidate, and retire candidates of which no collection has vectors. If a migration
    was killed after its collections were switched and before its model became live, they are switched back first.

    Raises:
        Conflict: a migration is running, or the vectors of the live model lack items that were written since.
    """
    with await migration_lock(places.data_dir):
        if places.migrates:
            migrations = places.migrations
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
        await retire_unused(places.store, places.generations, keep=(), states=("candidate",))
