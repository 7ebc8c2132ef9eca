"""Retire generations that nothing needs any more, and delete the former vectors of a generation whose window ends."""

import asyncio
import logging
from collections.abc import Sequence

from service.generations import Generation, Generations, State
from service.search.partners import migrations_of
from service.search.store import VectorStore
from service.tags import model_of

log = logging.getLogger(__name__)


async def end_window(store: VectorStore, generations: Generations, former: Generation) -> None:
    """Delete the vectors of a former generation, and retire it. A rollback to it is not possible afterwards."""
    if "migrations" in store.capabilities:
        migrations = migrations_of(store)
        for pair in await migrations.partnerships():
            if pair.role == "former" and model_of(pair.partner.tag) == former.model:
                await migrations.end(pair.collection.name)
    if former.model in {model_of(info.tag) for info in await store.collections()}:
        await asyncio.to_thread(generations.keep, former.number)  # its collections can still be searched
        return
    await asyncio.to_thread(generations.retire, former.number)
    log.info("generation %d is retired: %s", former.number, former.name)


async def keep_used(store: VectorStore, generations: Generations) -> None:
    """Let replicas load the retired models of which a collection still has vectors, so that it can be searched."""
    used = {model_of(info.tag) for info in await store.collections()}
    for each in await asyncio.to_thread(generations.all):
        if each.state == "retired" and each.model in used:
            await asyncio.to_thread(generations.keep, each.number)


async def retire_unused(
    store: VectorStore, generations: Generations, *, keep: Sequence[int], states: Sequence[State]
) -> None:
    """Retire the generations in these states of which no collection has vectors, except those with the numbers in
    `keep`."""
    used = {model_of(info.tag) for info in await store.collections()}
    if "migrations" in store.capabilities:
        used |= {model_of(pair.partner.tag) for pair in await migrations_of(store).partnerships()}
    for each in await asyncio.to_thread(generations.all):
        if each.state in states and each.model not in used and each.number not in keep:
            await asyncio.to_thread(generations.retire, each.number)
