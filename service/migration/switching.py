"""Switch collections and the live model to the candidate, when nothing is lacking and every replica has loaded it."""

import asyncio
import time
from typing import Final

from service.errors import CollectionNotFound, Conflict, Unavailable
from service.generations import Generation
from service.migration.copying import fill
from service.migration.work import PAGE, Work

WAIT_S: Final = 0.2
MOVED: Final = 5
"""How often a switch is tried again because collections changed in the meantime."""


async def switch(work: Work, names: list[str], candidate: Generation, live: Generation | None) -> None:
    """Fill what is lacking until all collections can be switched, and switch them together with the model."""
    for attempt in range(MOVED):
        for name in list(names):
            try:
                while await fill(work, name):
                    pass
            except (CollectionNotFound, ValueError):
                if name in {info.name for info in await work.places.store.collections()}:
                    raise
                names.remove(name)  # the collection was deleted
        await _keep_lost(work, names)
        await _wait_for_replicas(work, candidate)
        await _check_live(work, candidate, live)
        if await _try_switch(work, names, last=attempt == MOVED - 1):
            break
    if work.options.promote:
        await asyncio.to_thread(
            work.places.generations.promote,
            candidate.number,
            expected=live.number if live else None,
            keep_s=work.options.keep_s,
            reason=work.options.reason,
        )
    work.report.switched += names
    await work.tell("switched")


async def _keep_lost(work: Work, names: list[str]) -> None:
    """Leave collections on the old model if an image turned out to be unreadable and the options say so."""
    for name in list(names) if work.rule == "keep" else ():
        try:
            if await _still_lost(work, name):
                await work.places.migrations.end(name)
                work.report.kept.append(name)
                names.remove(name)
        except CollectionNotFound:
            names.remove(name)


async def _check_live(work: Work, candidate: Generation, live: Generation | None) -> None:
    """Raise Conflict if another generation has become live since the start. The collections must not be switched
    then, because the model could not follow."""
    now = await asyncio.to_thread(work.places.generations.live)
    allowed = {candidate.number, live and live.number}
    if work.options.promote and (now and now.number) not in allowed:
        raise Conflict(
            f"generation {now and now.number} is live, not {live and live.number}: the live model was changed "
            "during the migration; start it again to go on"
        )


async def _try_switch(work: Work, names: list[str], *, last: bool) -> bool:
    pairs = {pair.collection.name: pair for pair in await work.places.migrations.partnerships()} if names else {}
    names[:] = [name for name in names if name in pairs]  # the others were deleted and perhaps created again
    if not names:
        return True
    lost = {name: await _still_lost(work, name) for name in names}
    if any(lost.values()) and work.rule != "drop":
        name = next(name for name in lost if lost[name])
        raise Conflict(f"{lost[name]} items of {name!r} cannot be embedded with the new model; see the log")
    tags = {name: work.tag(pairs[name].collection) for name in names}
    try:
        await work.places.migrations.switch(tags, may_lack=lost)
    except (Conflict, CollectionNotFound):  # items were written or a collection was deleted in the meantime
        if last:
            raise
        return False
    return True


async def _still_lost(work: Work, name: str) -> int:
    """Return the number of items that the partner lacks because they cannot be read."""
    lost, after, count = work.lost.get(name, {}), 0, 0
    if not lost:
        return 0
    tag = work.tag(await work.places.store.info(name))
    while page := await work.places.migrations.missing(name, tag, after=after, limit=PAGE):
        after = page[-1].number
        count += sum(lost.get(item.id) == item.number for item in page)
    return count


async def _wait_for_replicas(work: Work, candidate: Generation) -> None:
    deadline = time.monotonic() + work.options.replicas_s
    while waiting := [
        each.id
        for each in await asyncio.to_thread(work.places.generations.replicas)
        if candidate.number not in each.loaded
    ]:
        if time.monotonic() > deadline:
            raise Unavailable(
                f"{', '.join(waiting)} did not load the model within {work.options.replicas_s:g} s; see its log"
            )
        await work.tell(f"waiting for {len(waiting)} replicas to load the model")
        await asyncio.sleep(WAIT_S)
