"""Jobs of the kind `reindex`: embed collections with another model while they are in use, and, with `promote`, make
this model live. The work is done by `dinov2 models promote` or `dinov2 reindex` in a child process, which goes on where
an earlier one was interrupted. If the job is cancelled, what was prepared is removed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from service.errors import ModelNotFound
from service.generations import Generations
from service.jobs.context import Cancelled, Context
from service.jobs.kind import JobParams
from service.jobs.roots import model_source
from service.jobs.train import read_object
from service.migration.giving_up import abandon_all
from service.migration.planning import items_without_image
from service.migration.work import Places
from service.model_list import known_models, model_named
from service.originals import Originals
from service.schema_base import ONE_OR_MORE
from service.search.checks import NAME_PATTERN
from service.search.opening import open_store
from service.settings import Settings
from service.tags import model_of

PROGRESS: Final = "migration.json"


class MigrationParams(JobParams):
    """How collections are embedded again."""

    lost: Literal["refuse", "drop", "keep"] = Field(
        "refuse",
        description="what to do about items whose image cannot be read: refuse, drop them, or keep their collections",
    )
    share: float = Field(1.0, ge=0.01, le=1, description="share of the time for which images are embedded")
    end_window: bool = Field(
        False, description="whether to start even if a rollback to the former model is then no longer possible"
    )
    keep_hours: float = Field(24.0, ge=0, le=8760, description="hours for which a rollback is possible")


class ReindexParams(MigrationParams):
    """What `POST /v1/jobs` accepts for embedding collections again."""

    model: str = Field("auto", description="name, fingerprint or generation of a model, or auto (the live model)")
    collections: Annotated[list[Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]], ONE_OR_MORE] = Field(
        default=[], max_length=1000, description="collections to embed again; not with promote, which embeds all"
    )
    promote: bool = Field(False, description="whether the model becomes live")

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.promote == bool(self.collections):
            raise ValueError("either collections or promote=true is needed: promote embeds all collections again")
        return self

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with the path of the model. See `JobParams.resolved`."""
        return self.model_copy(update={"model": local_model(self.model, settings)})


def local_model(name: str, settings: Settings) -> str:
    """Return the name of a model of the data folder or of a published model, a path that a job may read, or "auto".

    Raises:
        ValueError: there is no such model.
    """
    if name == "auto":
        return name
    generations = Generations(settings.data_dir) if Generations.exists(settings.data_dir) else None
    try:
        known = model_named(known_models(settings.data_dir, generations), name)
        return name if name.isdecimal() else known.name  # the number of a generation also means a precision
    except ModelNotFound:
        return model_source(name, settings)


def reindex(context: Context[ReindexParams]) -> None:
    """Do the work of a job."""
    params = context.params
    arguments = ["models", "promote", params.model] if params.promote else ["reindex", f"--model={params.model}"]
    context.step("migrate", lambda: run_migration(context, params, arguments, params.collections))


def run_migration(
    context: Context[Any],
    params: MigrationParams,
    arguments: list[str],
    collections: list[str],
    share: tuple[float, float] = (0.0, 1.0),
) -> Any:
    """Run the command `arguments`, and return its report. `share` is the part of the job's progress that it covers.

    Raises:
        JobFailed: the migration is not possible. The live model is unchanged.
    """
    progress = context.folder / PROGRESS
    options = [f"--data-dir={context.data_dir}", f"--lost={params.lost}", f"--share={params.share}"]
    options += [f"--progress={progress}"]
    if params.end_window:
        options.append("--end-window")
    if arguments[0] == "models":
        options.append(f"--keep-hours={params.keep_hours}")

    def watch() -> None:
        report = read_object(progress)
        embedded, pending = report.get("embedded", 0), report.get("pending", 0)
        done = embedded / (embedded + pending) if embedded + pending else 0.0
        stage = str(report.get("stage", "starting"))
        context.report(share[0] + (share[1] - share[0]) * done, stage, {"pending": pending})

    try:
        context.run_command([*arguments, *options, "--", *collections], watch)
    except Cancelled:
        asyncio.run(_give_up(context.settings))
        raise
    report = read_object(progress)
    return {name: report.get(name) for name in ("generation", "embedded", "switched", "kept")} | {
        "lost": {name: len(ids) for name, ids in report.get("lost", {}).items()}
    }


async def _give_up(settings: Settings) -> None:
    async with _opened(settings) as places:
        await abandon_all(places)


async def items_to_embed(settings: Settings) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the numbers of items that a migration of all collections embeds again, and the ids of those that it could
    not embed again, by collection. Nothing is created if there is no vector store.

    Raises:
        Conflict: the store cannot re-embed collections.
    """
    if settings.vector_store == "embedded" and not (settings.data_dir / "search.sqlite3").exists():
        return {}, {}
    async with _opened(settings) as places:
        models = {each.model for each in await asyncio.to_thread(places.generations.all)}
        infos = await places.store.collections()
        counts = {info.name: info.count for info in infos if model_of(info.tag) in models}
        return counts, await items_without_image(places)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Places]:
    store = await open_store(settings)
    originals = Originals(settings.originals_place)
    try:
        yield Places(store, Generations(settings.data_dir), originals, settings.data_dir)
    finally:
        await originals.close()
        await store.close()


def path_of(result: Any, data_dir: Path) -> Path:
    """Return the absolute path of an artifact from the result of an export."""
    return data_dir / str(result["artifact"])
