"""Choose and load the model with which a process starts, and note it in the record of generations.

The live generation of the record is served, also after a restart with the same settings. There are two exceptions. If
the record has no live generation yet, the model that the settings name becomes live. And if `model` names another model
than at the start before, the operator has decided for it, so it becomes live.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from model.artifact import ArtifactError, load_artifact, read_manifest
from model.engines.choice import PHOTOS_AT_LOAD, choose_engine
from service.artifact_choice import artifact_of, choose_artifact, read_photos
from service.errors import Conflict
from service.generations import Generation, Generations
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
        live = generations.live()
        is_decision = settings.model not in ("auto", generations.requested())
        if live is None or is_decision:
            path = choose_artifact(settings.model, settings.data_dir, report)
        else:
            path = _path_of(live, settings, report)
        report(f"loading {path.name}")
        opened = open_model(settings, path, settings.engine)
        try:
            generation = _recorded(generations, live, opened, path, f"model={settings.model} at a start")
        except Conflict:  # another process has switched while this one was loading
            opened.engine.close()
            continue
        generations.request(settings.model)  # not earlier: if this start had failed, the next must decide again
        return FirstModel(opened, Record(generations, generation, partial(load_generation, settings)))


def _recorded(generations: Generations, live: Generation | None, opened: Opened, path: Path, reason: str) -> Generation:
    """Return the generation of a loaded model after making it live. `live` was live before the model was loaded.

    Raises:
        Conflict: another generation has become live since.
    """
    now = generations.live()
    if (now and now.number) != (live and live.number):
        raise Conflict("another generation has become live")
    artifact, engine = opened.artifact, opened.engine
    generation = generations.add(
        artifact.fingerprint, artifact.name, path, engine.name, engine.precision, reason=reason
    )
    if live is not None and generation.number == live.number:
        if generation.state != "live":
            raise Conflict("another generation has become live")
        return generation
    promoted = generations.promote(generation.number, expected=live.number if live else None, keep_s=0.0)
    if generation.state != "live":
        _log_change(live, promoted)
    return promoted


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
    return Opened(artifact, choice.engine, choice.tried)


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


def _log_change(live: Generation | None, new: Generation) -> None:
    if live is None:
        log.info("generation %d is live: %s (%s)", new.number, new.name, new.precision)
    else:
        log.warning(
            "generation %d (%s, %s) replaces %d (%s, %s); collections of the old model cannot be searched by image "
            "until they are re-embedded: dinov2 models promote %s",
            *(new.number, new.name, new.precision, live.number, live.name, live.precision, new.name),
        )
