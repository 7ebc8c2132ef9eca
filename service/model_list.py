"""List the models of a data folder: those in the record of generations, and artifacts that were never live."""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from model.artifact import BUNDLED_DIR, ArtifactError, Manifest, read_manifest
from service.artifact_choice import Report, artifact_of, choose_artifact, readable_artifacts
from service.errors import Conflict, ModelNotFound
from service.generations import Generation, Generations
from service.tags import tag_parts

if TYPE_CHECKING:
    from service.search.store import VectorStore

log = logging.getLogger(__name__)

ModelState = Literal["live", "candidate", "former", "available", "retired"]
_ORDER: Final[tuple[ModelState, ...]] = ("live", "candidate", "former", "available", "retired")


@dataclass(frozen=True)
class KnownModel:
    """A model of the data folder. `generation` is None if it was never live or prepared to be."""

    path: Path
    manifest: Manifest
    generation: Generation | None

    @property
    def name(self) -> str:
        return f"{self.manifest.name}-{self.manifest.fingerprint[:8]}"

    @property
    def state(self) -> ModelState:
        return "available" if self.generation is None else self.generation.state


def known_models(
    data_dir: Path, generations: Generations | None, tell: Callable[[str], object] = log.warning
) -> list[KnownModel]:
    """Return the models of a data folder and the bundled model: the live one first, then the others by their state, the
    newest first. A generation whose artifact is gone is left out, and `tell` is called with a message."""
    recorded: list[KnownModel] = []
    for generation in reversed(generations.all() if generations else []):
        try:
            path = artifact_of(generation, data_dir)
            recorded.append(KnownModel(path, read_manifest(path), generation))
        except ArtifactError as error:
            tell(str(error))
    fingerprints = {known.manifest.fingerprint for known in recorded}
    others = {
        manifest.fingerprint: KnownModel(path, manifest, None)
        for path, manifest in reversed(list(readable_artifacts(data_dir, tell)))
        if manifest.fingerprint not in fingerprints
    }
    return sorted([*recorded, *reversed(others.values())], key=lambda known: _ORDER.index(known.state))


def model_named(models: Sequence[KnownModel], name: str) -> KnownModel:
    """Return the model with this name, fingerprint (or the beginning of one with at least 8 digits), or number of a
    generation.

    Raises:
        ModelNotFound: there is no such model.
    """
    for known in models:
        names = (known.name, known.path.name, known.manifest.fingerprint)
        if name in names or (known.generation is not None and name == str(known.generation.number)):
            return known
    for known in models:
        if name == known.manifest.name or (len(name) >= 8 and known.manifest.fingerprint.startswith(name)):
            return known
    raise ModelNotFound(f"there is no model {name[:80]!r}; there are {', '.join(known.name for known in models)}")


def named_artifact(
    name: str, data_dir: Path, report: Report, tell: Callable[[str], object] = log.warning
) -> tuple[Path, Generation | None]:
    """Return the artifact folder that `name` means, and the generation if `name` is its number. `name` is one of
    `model_named`, or one of `choose_artifact`, which may download and export a published model.

    Raises:
        ValueError, OSError: see `choose_artifact`.
        StorageFailed: the record of generations cannot be read.
    """
    if name != "auto" and "/" not in name:
        generations = Generations(data_dir) if Generations.exists(data_dir) else None
        try:
            known = model_named(known_models(data_dir, generations, tell), name)
        except ModelNotFound:
            return choose_artifact(name, data_dir, report), None
        is_number = known.generation is not None and name == str(known.generation.number)
        return known.path, known.generation if is_number else None
    return choose_artifact(name, data_dir, report), None


async def remove_model(
    known: KnownModel, data_dir: Path, generations: Generations | None, store: "VectorStore", *, force: bool = False
) -> None:
    """Delete the artifact of a model from the data folder, and forget its generation. An artifact outside of the data
    folder is not deleted, only forgotten. If another generation has the same artifact, it is not deleted either.

    Raises:
        Conflict: the model is loaded or bundled, or collections have vectors of it and `force` is false.
        OSError: the folder cannot be deleted.
    """
    if known.state in ("live", "candidate", "former"):
        raise Conflict(f"{known.name} is {known.state}: only a retired or available model can be removed")
    if known.path.parent == BUNDLED_DIR:
        raise Conflict(f"{known.name} is part of the installation and cannot be removed")
    users = [
        info.name for info in await store.collections() if tag_parts(info.tag).fingerprint == known.manifest.fingerprint
    ]
    if users and not force:
        raise Conflict(
            f"{', '.join(users)} have vectors of {known.name}: without it, they cannot be searched by image; "
            "force=true removes it anyway"
        )
    others = (
        []
        if generations is None or known.generation is None
        else [
            each
            for each in generations.all()
            if each.fingerprint == known.manifest.fingerprint and each.number != known.generation.number
        ]
    )
    if known.path.absolute().parent == (data_dir / "artifacts").absolute() and not others:
        if known.path.is_symlink():
            known.path.unlink()
        else:
            shutil.rmtree(known.path)
    else:
        log.info("%s is forgotten; its files in %s stay", known.name, known.path)
    if generations is not None and known.generation is not None:
        generations.forget(known.generation.number)
