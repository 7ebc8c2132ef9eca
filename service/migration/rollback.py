"""Make the former generation live again, while its window is open."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from model.artifact import ArtifactError
from service.artifact_choice import artifact_of
from service.errors import Conflict
from service.generations import Generation
from service.migration.work import DEFAULT_KEEP_S, Places
from service.search.partners import Partnership
from service.tags import model_of

ROLLED_BACK: Final = "rolled back"


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
    if places.migrates:
        pairs = [
            pair
            for pair in await places.migrations.partnerships()
            if pair.role == "former" and model_of(pair.partner.tag) == former.model
        ]
    lacking = {}
    for pair in pairs:
        if lacks := await places.migrations.lacking(pair.collection.name):
            lacking[pair.collection.name] = lacks
    if lacking and not force:
        raise Conflict(
            f"the vectors of generation {former.number} lack {sum(lacking.values())} items that were written since the "
            "switch without an image; force=true goes back without them"
        )
    if pairs:
        tags = {pair.collection.name: pair.partner.tag for pair in pairs}
        await places.migrations.switch(tags, may_lack=lacking)
    promoted = await asyncio.to_thread(
        places.generations.promote, former.number, expected=live.number, keep_s=keep_s, reason=ROLLED_BACK
    )
    names = [pair.collection.name for pair in pairs]
    new = [info.name for info in await places.store.collections() if model_of(info.tag) == live.model]
    return RolledBack(promoted, names, lacking, [name for name in new if name not in names])
