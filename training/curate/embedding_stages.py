"""The stages that decide by embeddings: `examples`, `sensitive`, `retrieve` and `balance`."""

from typing import Any, Final

import numpy as np

from training.curate.balance import balance
from training.curate.drops import Drop
from training.curate.examples import ExampleScore, ExampleSettings, learn_score
from training.curate.retrieve import retrieve_by_cluster, retrieve_by_sample
from training.curate.stages import Result, Stage, Task
from training.curate.table import Indices

GOOD, BAD, SENSITIVE, HARMLESS, SEEDS = "good", "bad", "sensitive", "harmless", "seeds"


def _examples(task: Task) -> Result:
    section = task.settings.examples
    score = _learned(task, GOOD, BAD, section.recall, section.test_share)
    scores = score.scores(task.images.embedding)
    dropped = np.flatnonzero(scores < score.threshold).tolist()
    drops = [Drop(i, "examples", f"like the bad examples (score {scores[i]:.2f})") for i in dropped]
    return Result(drops, _reached(score))


def _sensitive(task: Task) -> Result:
    section = task.settings.sensitive
    score = _learned(task, SENSITIVE, HARMLESS, section.recall, section.test_share)
    scores = score.scores(task.images.embedding)
    dropped = np.flatnonzero(scores >= score.threshold).tolist()
    drops = [Drop(i, "sensitive", f"like the sensitive examples (score {scores[i]:.2f})") for i in dropped]
    return Result(drops, _reached(score))


def _learned(task: Task, wanted: str, others: str, recall: float, test_share: float) -> ExampleScore:
    """Learn a score from the example images of two roles, and tell what it reaches."""
    settings = ExampleSettings(recall, test_share, task.settings.seed)
    first, second = (task.scanned[role].images.embedding for role in (wanted, others))
    try:
        score = learn_score(first, second, settings)
    except FloatingPointError as error:
        raise ValueError(f"no score can be learned from the examples: {error}") from error
    task.tell(f"{wanted} examples: recall {score.recall} on held-out examples, false alarms {score.false_alarms}")
    return score


def _reached(score: ExampleScore) -> dict[str, Any]:
    return {"threshold": score.threshold, "recall": str(score.recall), "false_alarms": str(score.false_alarms)}


def _retrieve(task: Task) -> Result:
    section, pool = task.settings.retrieve, task.images.embedding
    seeds = task.scanned[SEEDS].images.embedding
    if section.method == "sample":
        kept = retrieve_by_sample(pool, seeds, k=section.k, most=section.most)
    else:
        kept = retrieve_by_cluster(
            pool,
            seeds,
            clusters=min(section.clusters, len(pool)),
            min_seeds=section.min_seeds,
            per_cluster=section.per_cluster,
            most=section.most,
            seed=task.settings.seed,
        )
    return Result(_others(task, kept, "retrieve", "not similar enough to a seed image"), {"seeds": len(seeds)})


def _balance(task: Task) -> Result:
    section = task.settings.balance
    assert section.size is not None
    kept = balance(
        task.images.embedding,
        section.size,
        levels=section.levels,
        iterations=section.iterations,
        seed=task.settings.seed,
    )
    return Result(_others(task, kept, "balance", "one of many images of a frequent motif"), {"size": section.size})


def _others(task: Task, kept: Indices, stage: str, reason: str) -> list[Drop]:
    """Return a drop for each image that is not kept."""
    return [Drop(index, stage, reason) for index in np.setdiff1d(np.arange(len(task.images)), kept).tolist()]


EXAMPLES: Final = Stage("examples", "1", _examples, {GOOD: "examples.good", BAD: "examples.bad"})
SENSITIVE_CONTENT: Final = Stage(
    "sensitive", "1", _sensitive, {SENSITIVE: "sensitive.examples", HARMLESS: "sensitive.harmless"}
)
RETRIEVE: Final = Stage("retrieve", "1", _retrieve, {SEEDS: "retrieve.seeds"})
BALANCE: Final = Stage("balance", "1", _balance)
