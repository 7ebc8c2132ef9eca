"""Load a model on trial, to compare it with the live one before it is promoted.

A model on trial is a candidate of which no collection has vectors. Every process loads candidates
(service/live_models.py), so requests may then choose the model. A migration retires it, unless it promotes it.
"""

import asyncio

from service.errors import Conflict
from service.generations import LOADED, Generation
from service.migration.lock import migration_lock
from service.migration.work import Places
from service.model_list import KnownModel
from service.retiring import retire_unused


async def load_on_trial(places: Places, known: KnownModel, *, engine: str, precision: str) -> Generation:
    """Make a model a candidate, and return its generation. The model that was on trial before is retired. A model
    that was live before is loaded with its own engine and precision, and any other one with `engine` and `precision`. A
    model that is loaded already stays as it is.

    Raises:
        Conflict: a migration is running.
        StorageFailed: the record or the store cannot be used.
    """
    if known.generation is not None and known.generation.state in LOADED:
        return known.generation
    with await migration_lock(places.data_dir):
        generation = await _current(places, known)
        if generation is not None and generation.state in LOADED:
            return generation  # another request was faster
        if generation is not None:
            engine, precision = generation.engine, generation.precision
        await _end_trials(places)
        manifest = known.manifest
        return await asyncio.to_thread(
            places.generations.add,
            manifest.fingerprint,
            known.name,
            known.path,
            engine,
            precision,
            reason="on trial",
        )


async def end_trial(places: Places, known: KnownModel) -> None:
    """Retire a model that is on trial. If it is not loaded, nothing changes.

    Raises:
        Conflict: the model is live or former, collections have vectors of it, or a migration is running.
        StorageFailed: the record or the store cannot be used.
    """
    generation = known.generation
    if generation is None or generation.state == "retired":
        return
    if generation.state != "candidate":
        raise Conflict(f"{known.name} is {generation.state}: only a model on trial can be unloaded")
    with await migration_lock(places.data_dir):
        generation = await _current(places, known)
        if generation is None:
            return  # another request was faster
        await _end_trials(places, only=generation.number)
    every = await asyncio.to_thread(places.generations.all)
    if any(each.number == generation.number and each.state == "candidate" for each in every):
        raise Conflict(f"collections have vectors of {known.name}, so it stays loaded")


async def _current(places: Places, known: KnownModel) -> Generation | None:
    """Return the generation of a model as it is now. `known` may have been read before another process changed it."""
    every = [
        each
        for each in await asyncio.to_thread(places.generations.all)
        if each.fingerprint == known.manifest.fingerprint
    ]
    number = known.generation.number if known.generation else None
    every.sort(key=lambda each: (each.number == number, each.state in LOADED))
    return every[-1] if every else None


async def _end_trials(places: Places, only: int | None = None) -> None:
    """Retire the candidates of which no collection has vectors. Those that were never live are forgotten, so that they
    are available again. `only` is the number of the generation to retire; None means all."""
    before = await asyncio.to_thread(places.generations.all)
    keep = [each.number for each in before if only is not None and each.number != only]
    await retire_unused(places.store, places.generations, keep=keep, states=("candidate",))
    for each in before:
        if each.state == "candidate" and each.live_since is None and not each.metrics:
            await asyncio.to_thread(places.generations.forget, each.number)  # does nothing unless it is retired
