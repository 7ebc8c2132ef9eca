"""Retrieval: rank a database by cosine and score the ranking, with the junk rule of revisited Oxford and Paris.

Revisited Oxford and Paris (arXiv 1803.11285; filipradenovic/revisitop) label database images for each query as easy,
hard or junk (the query itself, or too little of its object visible to tell). Each setup counts some of them as relevant
and removes others from the ranking before it is scored:

    setup    relevant       removed
    easy     easy           hard, junk
    medium   easy, hard     junk
    hard     hard           easy, junk

Average precision is the area under precision by recall by the trapezoid rule, as in the Oxford buildings' own program:
the mean, over the relevant images, of the precision before and at each of them. Queries without a relevant image do not
count. For images in class folders every image is a query, those of its folder are relevant, and the query itself is
removed. There average precision is the plain mean of the precision at each relevant image, as usual in metric learning.
recall@k is the share of queries with at least one relevant image among the first k.

The ground truth is JSON, with paths relative to the images' folder:

    {"database": ["a.jpg", ...],
     "queries": [{"image": "q.jpg", "box": [x, y, width, height], "easy": [...], "hard": [...], "junk": [...]}, ...]}

`box` is optional. Oxford's queries have one, and without the crop the figures differ.

Legend: q queries, n database images, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from training.evaluate.features import Box

KS = (1, 5, 10)
Rule = Literal["trapezoid", "mean"]
Setup = Literal["easy", "medium", "hard"]
SETUPS: Mapping[Setup, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
"""The labels that are relevant and those that are removed, by setup."""


class Query(BaseModel):
    """One query: its image, the part of it to search with, and labels of database images by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    box: Box | None = None
    easy: list[str] = Field(default_factory=list)
    hard: list[str] = Field(default_factory=list)
    junk: list[str] = Field(default_factory=list)


class GroundTruth(BaseModel):
    """Queries and the database that they search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: list[Query] = Field(min_length=1)
    database: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Scores:
    """Means over the queries that have a relevant image; `queries` is their number."""

    mean_ap: float
    recall: dict[int, float]
    queries: int


def read_ground_truth(path: Path) -> GroundTruth:
    """Read and validate a ground truth file.

    Raises:
        ValueError: it cannot be read, has another format, names an image twice, or labels one that is not in the
            database.
    """
    try:
        truth = GroundTruth.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: not a ground truth for retrieval: {error}") from error
    names = set(truth.database)
    if len(names) != len(truth.database):
        raise ValueError(f"{path}: the database names an image twice")
    for number, query in enumerate(truth.queries):
        labels = [*query.easy, *query.hard, *query.junk]
        if len(set(labels)) != len(labels):
            raise ValueError(f"{path}: query {number} ({query.image}) labels an image twice")
        unknown = sorted(set(labels) - names)
        if unknown:
            raise ValueError(
                f"{path}: query {number} ({query.image}) labels {len(unknown)} images that are not in the database, "
                f"e.g. {unknown[0]}"
            )
    return truth


def positions_without(relevant: Tensor, ignored: Tensor) -> Tensor:
    """Return the positions (from 0) of the relevant images in a ranking without the ignored ones.

    Args:
        relevant, ignored: bool [n], best first, never both.
    """
    places = torch.cumsum(~ignored, dim=0) - 1
    return places[relevant]


def average_precision(positions: Tensor, n_relevant: int, rule: Rule = "trapezoid") -> float:
    """Compute average precision from the rising positions (from 0) of relevant images.

    Args:
        positions: of the relevant images in the ranking.
        n_relevant: number of relevant images; those missing in the ranking count as never found.
        rule: "trapezoid" averages the precision before and at each relevant image, "mean" uses that at it.
    """
    assert n_relevant > 0
    index = positions.double()
    n_before = torch.arange(len(positions), device=positions.device, dtype=torch.float64)
    at = (n_before + 1) / (index + 1)
    if rule == "mean":
        return float(at.sum() / n_relevant)
    before = torch.where(index == 0, 1.0, n_before / index.clamp(min=1))
    return float(((before + at) / 2).sum() / n_relevant)


def score(
    queries: Tensor,
    database: Tensor,
    relevant: Sequence[Tensor],
    ignored: Sequence[Tensor],
    *,
    ks: Sequence[int] = KS,
    rule: Rule = "trapezoid",
    block_bytes: int = 2**28,
) -> Scores:
    """Rank the database for each query by cosine, and score the rankings.

    Args:
        queries, database: features [q, D], [n, D], any scale.
        relevant, ignored: for each query, positions in the database; ignored images are removed from its ranking.
        ks: numbers of first images for recall@k.
        rule: as in `average_precision`.
        block_bytes: memory for similarities; queries are ranked in blocks.

    Raises:
        ValueError: no query has a relevant image.
    """
    n = len(database)
    database = F.normalize(database.float(), dim=1)
    rows = max(1, block_bytes // (12 * n))  # a float32 and an int64 each
    aps: list[float] = []
    hits = dict.fromkeys(ks, 0)
    for top in range(0, len(queries), rows):
        similarity = F.normalize(queries[top : top + rows].float(), dim=1) @ database.T
        for index, row in enumerate(similarity, start=top):
            if not len(relevant[index]):
                continue
            marks = torch.zeros(2, n, dtype=torch.bool, device=row.device)
            marks[0, relevant[index]], marks[1, ignored[index]] = True, True
            order = row.argsort(descending=True, stable=True)
            positions = positions_without(marks[0, order], marks[1, order])
            aps.append(average_precision(positions, len(relevant[index]), rule))
            for k in ks:
                hits[k] += bool((positions < k).any())
    if not aps:
        raise ValueError("no query has a relevant image in the database")
    return Scores(sum(aps) / len(aps), {k: count / len(aps) for k, count in hits.items()}, len(aps))


def score_setup(
    truth: GroundTruth,
    setup: Setup,
    queries: Tensor,
    database: Tensor,
    *,
    ks: Sequence[int] = KS,
) -> Scores | None:
    """Score one setup; None if no query has a relevant image in it. Features are in the order of `truth`."""
    places = {name: place for place, name in enumerate(truth.database)}
    good, out = SETUPS[setup]

    def labelled(query: Query, kinds: tuple[str, ...]) -> Tensor:
        return torch.tensor([places[name] for kind in kinds for name in getattr(query, kind)], dtype=torch.long)

    relevant = [labelled(query, good) for query in truth.queries]
    if not any(len(places_of) for places_of in relevant):
        return None
    return score(queries, database, relevant, [labelled(query, out) for query in truth.queries], ks=ks)


def score_classes(features: Tensor, labels: Tensor, *, ks: Sequence[int] = KS) -> Scores:
    """Score the search for every image [n, D] among all others; those of its class [n] are relevant.

    It uses plain average precision.

    Raises:
        ValueError: no class has two images.
    """
    members = {int(label): (labels == label).nonzero().flatten() for label in set(labels.tolist())}
    itself = torch.arange(len(labels), device=labels.device)
    relevant = [(same := members[int(label)])[same != i] for i, label in enumerate(labels)]
    return score(features, features, relevant, list(itself[:, None]), ks=ks, rule="mean")
