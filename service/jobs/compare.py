"""Compares two artifacts on a frozen set and returns the verdict of the gate.

list of images ─▶ features of the champion   ─▶ gate ─▶ verdict
              └─▶ features of the challenger ─┘
"""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from model.artifact import Artifact, load_artifact
from model.decode import DecodeLimits
from model.engines.choice import choose_engine, known_precision
from model.pooling import DEFAULT_POOLING, Pooling
from service.jobs.frozen_set import MOST_IMAGES, FrozenSet, open_frozen_set
from service.jobs.gate import Evidence, judge
from service.jobs.gate_features import FeatureCache, SetFeatures, embed_set
from service.jobs.gate_scores import Pair
from service.jobs.live_sample import LiveSample, LiveVectors, embed_live, pairs_of
from service.jobs.verdict import GateRules, Verdict

GATE_DIR: Final = "gate"
"""The subfolder of the data folder for lists of frozen sets and stored features."""


def list_file(data_dir: Path, folder: Path, suffix: str = "") -> Path:
    """Return the default path of the list of a frozen set that is chosen from `folder`. `suffix` is appended to the
    name of the file."""
    resolved = folder.resolve()
    name = hashlib.sha256(str(resolved).encode(errors="surrogateescape")).hexdigest()[:8]
    return data_dir / GATE_DIR / f"{resolved.name or 'images'}-{name}{suffix}.json"


@dataclass(frozen=True)
class CompareOptions:
    """The options of a comparison.

    Attributes:
        engine: name of the engine for both models, see `model.engines.choice.choose_engine`.
        threads: number of CPU threads per forward pass. If None, all CPUs are used.
        pooling: the features that form a vector.
        labels: whether the folders are classes.
        most: maximum number of images in each part of a new frozen set.
        set_file: the list of the frozen set. If None, it is in the data folder.
        limits: limits for decoding.
        rules: the rules of the gate.
    """

    engine: str = "auto"
    threads: int | None = None
    pooling: Pooling = DEFAULT_POOLING
    labels: bool = True
    most: int = MOST_IMAGES
    set_file: Path | None = None
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    rules: GateRules = field(default_factory=GateRules)


@dataclass(frozen=True)
class Progress:
    """How a comparison reports what it does. `say` is called with a line about the current step or a problem, and
    `advance` with the number of images whose features were computed and with the number of images of the set."""

    say: Callable[[str], object] = lambda line: None
    advance: Callable[[int, int], object] = lambda count, total: None


def compare(
    champion: Path,
    challenger: Path,
    folder: Path,
    data_dir: Path,
    options: CompareOptions | None = None,
    progress: Progress | None = None,
    live: LiveSample | None = None,
) -> Verdict:
    """Compare two artifacts on the images in a folder, and return the verdict of the gate.

    Both models run one after the other, so only one is in memory at a time. Features that are stored in the data folder
    are not computed again.

    Args:
        champion, challenger: artifact folders.
        folder: the images, see `service.jobs.frozen_set.open_frozen_set`.
        data_dir: the data folder.
        options, progress: see `CompareOptions` and `Progress`.
        live: drawn items of collections, for `live_neighbours_kept`.

    Raises:
        ValueError: an image of the frozen set is missing or changed, an artifact is damaged, or no engine can run it.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: the requested runtime is not installed.
    """
    options, progress = options or CompareOptions(), progress or Progress()
    file = options.set_file or list_file(data_dir, folder)
    progress.say(f"checking the images of the frozen set {file}")
    frozen = open_frozen_set(
        file, folder, labels=options.labels, most=options.most, limits=options.limits, tell=progress.say
    )
    embedded, about = [], []
    for path in (champion, challenger):
        artifact = load_artifact(path, derived_dir=data_dir / "derived")
        embedded.append(_embedded(artifact, _Images(frozen, folder, live), data_dir, options, progress))
        about.append({"name": artifact.name, "fingerprint": artifact.fingerprint, "precision": embedded[-1].precision})
    evidence = _evidence(frozen, *(each.features for each in embedded))
    verdict = judge(replace(evidence, live=pairs_of(*(each.live for each in embedded))), options.rules)
    described: dict[str, Any] = {
        "champion": about[0],
        "challenger": about[1],
        "pooling": options.pooling,
        "set": {"file": str(file), "images": len(frozen.images), "sha256": frozen.digest},
    }
    return replace(verdict, about=described)


@dataclass(frozen=True)
class _Images:
    """What both models embed: the frozen set of a folder, and drawn items of collections."""

    frozen: FrozenSet
    folder: Path
    live: LiveSample | None


@dataclass(frozen=True)
class _Embedded:
    """The features of one model, and the precision in which they were computed."""

    features: SetFeatures
    precision: str
    live: LiveVectors


def _embedded(
    artifact: Artifact, images: _Images, data_dir: Path, options: CompareOptions, progress: Progress
) -> _Embedded:
    """Embed the images with one model. The features of a frozen set are stored, those of collections are not.

    The engine is loaded only if there is something to compute, or if its precision is unknown before it is loaded.
    """
    frozen, live = images.frozen, images.live
    cache = FeatureCache(data_dir / GATE_DIR, artifact.fingerprint, options.pooling, frozen)
    precision = known_precision(options.engine)
    stored = None if precision is None else cache.read(precision)
    if precision is not None and stored is not None and (live is None or not live.collections):
        return _Embedded(stored, precision, {})
    progress.say(f"loading {artifact.name}")
    engine = choose_engine(artifact, options.engine, threads=options.threads).engine
    with closing(engine):
        features = cache.read(engine.precision)
        if features is None:
            progress.say(f"computing the features of {len(frozen.images)} images with {artifact.name}")
            features = embed_set(
                frozen,
                images.folder,
                artifact,
                engine,
                pooling=options.pooling,
                limits=options.limits,
                advance=lambda count: progress.advance(count, len(frozen.images)),
            )
            cache.write(engine.precision, features)
        if live is not None and live.collections:
            progress.say(f"embedding items of {len(live.collections)} collections with {artifact.name}")
        vectors = {} if live is None else embed_live(live, artifact, engine, options.limits)
        return _Embedded(features, engine.precision, vectors)


def _evidence(frozen: FrozenSet, champion: SetFeatures, challenger: SetFeatures) -> Evidence:
    """Return the features as the evidence of the gate, in two parts if the set has queries."""
    index = [at for at, image in enumerate(frozen.images) if image.part == "index"]
    queries = [at for at, image in enumerate(frozen.images) if image.part == "query"]

    def pair(rows: list[int]) -> Pair:
        return Pair(champion.images[rows], challenger.images[rows])

    if not frozen.has_labels:
        return Evidence(pair(index), views=Pair(champion.views[index], challenger.views[index]))
    labels = [str(image.label) for image in frozen.images]
    return Evidence(
        pair(index),
        [labels[at] for at in index],
        pair(queries) if queries else None,
        [labels[at] for at in queries],
    )
