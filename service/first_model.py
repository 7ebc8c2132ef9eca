"""Choose and load the model with which a process starts, and note it in the record of generations.

The live generation of the record is served, also after a restart. There are two exceptions. If the record has no live
generation yet, the model that the settings name becomes live. And if `model` or `engine` has a value that has never
been applied to this data folder, the operator has decided for it, so it becomes live. A value decides only once: a
promotion, a rollback or another value may have replaced it since, and processes with different settings would otherwise
take turns. A process whose value was replaced starts with the live generation and warns. `auto` never decides.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from model.artifact import ArtifactError, load_artifact, read_manifest
from model.engines.choice import PHOTOS_AT_LOAD, choose_engine, known_precision
from model.engines.protocol import Engine
from service.artifact_choice import artifact_of, choose_artifact, read_photos
from service.errors import Conflict
from service.features.batch_limit import with_split_batches, with_useful_threads
from service.generations import Generation, Generations, utc
from service.live_models import Opened, Record
from service.settings import Settings

log = logging.getLogger(__name__)


class FirstModel(NamedTuple):
    """The loaded model, and the record of generations."""

    opened: Opened
    record: Record


def load_first(settings: Settings, report: Callable[[str], object]) -> FirstModel:
    """Load the model with which a process starts. `report` is called with the current step.

    Raises:
        ValueError, OSError: the model cannot be found, verified or loaded. The message names the file and the reason.
        ModuleNotFoundError: the requested runtime is not installed.
        StorageFailed: the record of generations cannot be read or written.
    """
    generations = Generations(settings.data_dir)
    while True:
        live, decisions = generations.live(), _decisions(settings, generations)
        if live is None or "model" in decisions:
            path = choose_artifact(settings.model, settings.data_dir, report)
        else:
            path = _path_of(live, settings, report)
        if live is not None and "model" in decisions and _was_replaced(path, live, generations):
            del decisions["model"]
            log.warning(
                "model=%s is another name of a model that a setting has made live before, so it decides nothing, and "
                "generation %d (%s) stays live. To change the live model, call dinov2 models promote %s",
                *(settings.model, live.number, live.name, path.name),
            )
            path = _path_of(live, settings, report)
        report(f"loading {path.name}")
        if live is None or "engine" in decisions or read_manifest(path).fingerprint != live.fingerprint:
            opened = open_model(settings, path, settings.engine)
        else:
            opened = open_generation(settings, path, live)
        try:
            generation = _recorded(generations, live, opened, path, decisions)
        except Conflict:  # another process has switched or applied the same setting while this one was loading
            opened.engine.close()
            continue
        _warn_if_replaced(settings, generations, generation, decisions)
        return FirstModel(opened, Record(generations, generation, partial(load_generation, settings)))


def _decisions(settings: Settings, generations: Generations) -> dict[str, str]:
    """Return the settings whose value has never been applied to the data folder."""
    values = {"model": settings.model, "engine": settings.engine}
    return {
        name: value for name, value in values.items() if value != "auto" and generations.applied(name, value) is None
    }


def _was_replaced(path: Path, live: Generation, generations: Generations) -> bool:
    """Return whether a setting has made the model of the artifact at `path` live, and another one is live now."""
    fingerprint = read_manifest(path).fingerprint
    return fingerprint != live.fingerprint and fingerprint in generations.applied_models()


def open_generation(settings: Settings, path: Path, generation: Generation) -> Opened:
    """Load the artifact of a generation with the engine of the settings if that computes the precision of the
    generation, and otherwise with the engine of the generation.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the artifact is damaged, or no engine here has the precision.
    """
    found = known_precision(settings.engine)
    if found in (None, generation.precision):
        opened = open_model(settings, path, settings.engine)
        found = opened.engine.precision
        if found == generation.precision:
            return opened
        opened.engine.close()
    name = f"{generation.engine}:{generation.precision}"
    what = f"engine={settings.engine} computes {found} here, but generation {generation.number} has {name}"
    try:
        opened = open_model(settings, path, name)
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(
            f"{what}, which this process cannot load: {error}. Start it where {name} runs. Or name an engine that has "
            "never been applied to this data folder: its precision becomes live"
        ) from error
    log.warning(
        "%s: this process uses %s. To change the precision and embed the collections again, call dinov2 models promote "
        "%s --engine %s",
        *(what, name, generation.name, settings.engine),
    )
    return opened


def _recorded(
    generations: Generations, live: Generation | None, opened: Opened, path: Path, decisions: Mapping[str, str]
) -> Generation:
    """Return the generation of a loaded model after making it live. `live` was live before the model was loaded.
    `decisions` are the settings that decide for it.

    Raises:
        Conflict: another generation has become live since, or another process has applied one of `decisions`.
    """
    now = generations.live()
    if (now and now.number) != (live and live.number):
        raise Conflict("another generation has become live")
    artifact, engine = opened.artifact, opened.engine
    reason = f"{', '.join(f'{name}={value}' for name, value in decisions.items()) or 'model=auto'} at a start"
    generation = generations.add(
        artifact.fingerprint, artifact.name, path, engine.name, engine.precision, reason=reason
    )
    if live is not None and generation.number == live.number and not decisions:
        if generation.state != "live":
            raise Conflict("another generation has become live")
        return generation
    former = generations.window()
    promoted = generations.promote(
        generation.number, expected=live.number if live else None, keep_s=0.0, settings=decisions
    )
    if generation.state != "live":
        _log_change(live, promoted, former)
    return promoted


def _warn_if_replaced(
    settings: Settings, generations: Generations, live: Generation, decisions: Mapping[str, str]
) -> None:
    """Warn if `model` names a model that was live, and another one has become live since."""
    applied = None if "model" in decisions else generations.applied("model", settings.model)
    if applied is None:
        return
    before = next((each for each in generations.all() if each.number == applied.generation), None)
    if before is None or before.fingerprint != live.fingerprint:
        log.warning(
            "model=%s made generation %d live at %s, and generation %d (%s) has become live since, so this process "
            "serves that one. To change the live model, call dinov2 models promote %s. To stop this warning, set "
            "model=auto",
            *(settings.model, applied.generation, utc(applied.time), live.number, live.name, settings.model),
        )


def load_generation(settings: Settings, generation: Generation) -> Opened:
    """Load a generation with the precision that its vectors have.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the artifact is gone or damaged, or no engine can run it.
    """
    engine = f"{generation.engine}:{generation.precision}"
    return open_model(settings, artifact_of(generation, settings.data_dir), engine)


def open_model(settings: Settings, path: Path, engine: str) -> Opened:
    """Load the artifact at `path` and an engine for it.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the artifact is damaged, or no engine can run it.
    """
    artifact = load_artifact(path, derived_dir=settings.data_dir / "derived")
    photos = read_photos(settings.engine_photos, PHOTOS_AT_LOAD) if settings.engine_photos else None
    choice = choose_engine(artifact, engine, threads=settings.threads, photos=photos)
    chosen = choice.engine
    name, threads = f"{chosen.name}:{chosen.precision}", settings.threads

    def reopen(number: int) -> Engine:
        return choose_engine(artifact, name, threads=number, photos=photos).engine

    if threads is None:
        chosen, threads = with_useful_threads(chosen, artifact, reopen)
    return Opened(artifact, with_split_batches(chosen, artifact, threads, reopen), choice.tried)


def _path_of(live: Generation, settings: Settings, report: Callable[[str], object]) -> Path:
    """Return the artifact of the live generation. If it is gone, but the settings name the same model, use that."""
    try:
        return artifact_of(live, settings.data_dir)
    except ArtifactError as error:
        if settings.model == "auto":
            raise
        path = choose_artifact(settings.model, settings.data_dir, report)
        if read_manifest(path).fingerprint != live.fingerprint:
            raise ArtifactError(f"{error}; model={settings.model} is another model, {path.name}") from error
        return path


def _log_change(live: Generation | None, new: Generation, former: Generation | None) -> None:
    if live is None:
        log.info("generation %d is live: %s (%s)", new.number, new.name, new.precision)
        return
    log.warning(
        "generation %d (%s, %s) replaces %d (%s, %s); collections keep the vectors of the old model until they are "
        "re-embedded: dinov2 models promote %s",
        *(new.number, new.name, new.precision, live.number, live.name, live.precision, new.name),
    )
    if former is not None and former.number != new.number:
        log.warning("this ends the window of generation %d: a rollback to it is no longer possible", former.number)
