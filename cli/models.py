"""Commands for the models of a data folder: which one is live, and changing it while the service runs."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.compare import compare
from cli.shared import (
    DATA,
    MODEL_NAMES,
    ArtifactsDirOption,
    JsonOption,
    ThreadsOption,
    fail,
    run_with,
)
from cli.shared import _warn as warn
from model.files import write_text

if TYPE_CHECKING:
    from service.live_models import Opened
    from service.migration.work import MigrationReport, Places
    from service.search.store import VectorStore
    from service.settings import Settings

app = typer.Typer(help="List models, and make one live while the service runs.")
app.command()(compare)

NameArgument = Annotated[str, typer.Argument(help=f"{MODEL_NAMES[0].upper()}{MODEL_NAMES[1:]}.")]
LostOption = Annotated[
    Literal["refuse", "drop", "keep"],
    typer.Option(
        help="What to do about items whose image cannot be read: refuse to start, drop them, or keep their collections "
        "on the old model."
    ),
]
ShareOption = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the time for which images are embedded.")]
KeepOption = Annotated[float, typer.Option(min=0.0, help="Hours for which a rollback is possible after the switch.")]
EndWindowOption = Annotated[
    bool,
    typer.Option("--end-window", help="Start even if a rollback to the former model is then no longer possible."),
]
OwnEngineOption = Annotated[
    str | None,
    typer.Option(help="Engine: auto, fastest, or runtime[:precision]. Default: that of the service. [DINOV2_ENGINE]"),
]
ProgressOption = Annotated[
    Path | None, typer.Option(help="File to which the progress is written as JSON.", hidden=True)
]
DAY_HOURS = 24.0


@dataclass(frozen=True)
class Migrating:
    """The options that `promote` and `reindex` share."""

    data_dir: ArtifactsDirOption = DATA
    lost: LostOption = "refuse"
    end_window: EndWindowOption = False
    share: ShareOption = 1.0
    read_sources: Annotated[
        bool, typer.Option(help="Also read images from the sources of items, if they are not stored.")
    ] = False
    engine: OwnEngineOption = None
    threads: ThreadsOption = None
    progress: ProgressOption = None
    as_json: JsonOption = False

    def run(self, model: str, *, makes: bool, **options: Any) -> None:
        """Migrate to a model and print the report. `options` are further ones of `MigrationOptions`."""
        from service.features.patch_store import patch_store_of
        from service.migration.run import migrate
        from service.migration.work import MigrationOptions

        async def work(store: "VectorStore", settings: "Settings") -> "MigrationReport":
            with closing(patch_store_of(settings)) as patches:
                places = replace(_places(store, settings, read_sources=self.read_sources), patches=patches)
                path, opened = _open(model, settings, self.engine, self.threads)
                shared = MigrationOptions(lost=self.lost, share=self.share, end_window=self.end_window)
                return await migrate(places, path, opened, replace(shared, **options), _Progress(self.progress))

        _print_report(run_with(None, self.data_dir, work, makes=makes), self.as_json)


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Migrating` instead of its parameter `shared`."""
    own = [each for each in signature(command).parameters.values() if each.name != "shared"]
    shared = list(signature(Migrating).parameters.values())
    names = {each.name for each in shared}

    @wraps(command)
    def called(**values: Any) -> None:
        migrating = Migrating(**{name: value for name, value in values.items() if name in names})
        command(**{name: value for name, value in values.items() if name not in names}, shared=migrating)

    every = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*own, *shared)]
    called.__signature__ = Signature(every)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in every}
    return called


@app.callback(invoke_without_command=True)
def models(context: typer.Context, data_dir: ArtifactsDirOption = DATA, as_json: JsonOption = False) -> None:
    """List models, and make one live while the service runs."""
    if context.invoked_subcommand is None:
        list_(data_dir, as_json)


@app.command("list")
def list_(data_dir: ArtifactsDirOption = DATA, as_json: JsonOption = False) -> None:
    """List the local models with their state, and the published models that can be downloaded."""
    from model.zoo import ENTRIES
    from service.errors import StorageFailed
    from service.generations import Generations
    from service.model_list import known_models

    try:
        generations = Generations(data_dir) if Generations.exists(data_dir) else None
        models = known_models(data_dir, generations, warn)
    except StorageFailed as error:
        raise fail(error) from error
    local: list[dict[str, Any]] = [
        {
            "path": str(known.path),
            "name": known.manifest.name,
            "fingerprint": known.manifest.fingerprint,
            "state": known.state,
            "generation": known.generation.number if known.generation else None,
        }
        for known in models
    ]
    published = [{"name": entry.name, "licence": entry.licence, "url": entry.url} for entry in ENTRIES.values()]
    if as_json:
        typer.echo(json.dumps({"artifacts": local, "published": published}, indent=2))
        return
    typer.echo("Artifacts (dinov2 serve --model PATH; dinov2 models promote NAME):")
    for row in local:
        number = "" if row["generation"] is None else f"{row['generation']}"
        typer.echo(f"  {row['name']:<28} {row['fingerprint'][:8]}  {row['state']:<9} {number:>3}  {row['path']}")
    typer.echo("Published (dinov2 serve --model NAME downloads and exports it once):")
    for row in published:
        typer.echo(f"  {row['name']:<28} {row['licence']}  {row['url']}")


@app.command()
@with_shared
def promote(name: NameArgument, shared: Migrating, keep_hours: KeepOption = DAY_HOURS) -> None:
    """Make a model live: embed every collection again, then switch all of them and the model at once.

    Running services go on answering with the old model until the switch. They load the new model before. If the command
    is interrupted, the next call continues. `dinov2 models rollback` goes back while the window is open."""
    shared.run(name, makes=True, keep_s=keep_hours * 3600, reason="dinov2 models promote")


@app.command()
def rollback(
    data_dir: ArtifactsDirOption = DATA,
    force: Annotated[
        bool, typer.Option(help="Go back even if items were written without an image since the switch.")
    ] = False,
    keep_hours: KeepOption = DAY_HOURS,
) -> None:
    """Make the former model live again, with its collections as they are now."""
    from service.migration.rollback import RolledBack, roll_back

    async def work(store: "VectorStore", settings: "Settings") -> RolledBack:
        return await roll_back(_places(store, settings), keep_s=keep_hours * 3600, force=force)

    result = run_with(None, data_dir, work, makes=True)
    typer.echo(f"generation {result.generation.number} is live again: {result.generation.name}")
    for collection in result.created_since:
        typer.echo(f"{collection} was created since the switch and keeps the vectors of the other model", err=True)


@app.command()
def abandon(data_dir: ArtifactsDirOption = DATA) -> None:
    """Give up a switch that was interrupted: delete what was prepared for it."""
    from service.migration.giving_up import abandon_all

    async def work(store: "VectorStore", settings: "Settings") -> None:
        await abandon_all(_places(store, settings))

    run_with(None, data_dir, work, makes=True)


@app.command()
def remove(
    name: NameArgument,
    data_dir: ArtifactsDirOption = DATA,
    force: Annotated[bool, typer.Option(help="Remove it even if collections have vectors of it.")] = False,
) -> None:
    """Delete a model that is not loaded from the data folder."""
    from service.generations import Generations
    from service.model_list import known_models, model_named, remove_model

    async def work(store: "VectorStore", settings: "Settings") -> str:
        generations = Generations(settings.data_dir) if Generations.exists(settings.data_dir) else None
        known = model_named(known_models(settings.data_dir, generations, warn), name)
        await remove_model(known, settings.data_dir, generations, store, force=force)
        return known.name

    typer.echo(f"removed {run_with(None, data_dir, work, makes=True)}")


@with_shared
def reindex(
    collections: Annotated[list[str], typer.Argument(help="Names of the collections.")],
    shared: Migrating,
    model: Annotated[
        str, typer.Option(help="The model whose vectors the collections get. Default: the live model.")
    ] = "auto",
) -> None:
    """Embed collections again with another model, while they are searched and written to. The live model stays."""
    shared.run(model, makes=False, collections=tuple(collections), promote=False, reason="dinov2 reindex")


def _places(store: "VectorStore", settings: "Settings", *, read_sources: bool = False) -> "Places":
    from service.generations import Generations
    from service.ingest.sources import read_photo
    from service.migration.work import Places
    from service.originals import Originals

    def read(source: str) -> bytes:
        return read_photo(source, max_bytes=settings.max_image_bytes)

    return Places(
        store,
        Generations(settings.data_dir),
        Originals(settings.originals_place),
        settings.data_dir,
        read if read_sources else None,
    )


def _open(name: str, settings: "Settings", engine: str | None, threads: int | None) -> "tuple[Path, Opened]":
    """Load the model with this name. A published model is downloaded and exported if needed. Without `engine`, the live
    model and the number of a generation mean vectors of the same precision as before."""
    from model.artifact import read_manifest
    from service.first_model import open_generation, open_model
    from service.generations import Generations
    from service.model_list import named_artifact

    path, generation = named_artifact(name, settings.data_dir, _tell, warn)
    changed = settings.model_copy(update={"threads": threads or settings.threads})
    live = Generations(settings.data_dir).live()
    if generation is None and live is not None and read_manifest(path).fingerprint == live.fingerprint:
        generation = live
    if engine is None and generation is not None:
        return path, open_generation(changed, path, generation)
    return path, open_model(changed, path, engine or settings.engine)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


class _Progress:
    """Shows the progress of a migration on a terminal, and writes it to a file at most once a second."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._stage, self._written_at = "", 0.0

    def __call__(self, report: "MigrationReport") -> None:
        if sys.stderr.isatty():
            line = f"{report.stage}: {report.embedded} embedded, {report.pending} pending"
            typer.echo(f"\r{line:<100}", err=True, nl=False)
        now = time.monotonic()
        if self._file is not None and (report.stage != self._stage or now - self._written_at >= 1):
            self._stage, self._written_at = report.stage, now
            write_text(self._file, json.dumps(asdict(report)))


def _print_report(report: "MigrationReport", as_json: bool) -> None:
    if sys.stderr.isatty():
        typer.echo("", err=True)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    for collection, ids in report.lost.items():
        what = "stays on the old model" if collection in report.kept else f"lost {len(ids)} items without an image"
        typer.echo(f"{collection} {what}", err=True)
    names = ", ".join(report.switched) or "no collection"
    typer.echo(f"generation {report.generation}: {report.embedded} items embedded; switched {names}")
