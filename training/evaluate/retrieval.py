"""Retrieval: rank a database for each query by cosine similarity, and score the rankings.

The data sets Revisited Oxford and Paris (arXiv 1803.11285; filipradenovic/revisitop) label, for each query, some
database images as easy, hard or junk. A junk image is the query image itself, or shows too little of the object. A
setup defines which labels count as relevant. Images with the other labels are removed from the ranking before it is
scored:

    setup    relevant       removed
    easy     easy           hard, junk
    medium   easy, hard     junk
    hard     hard           easy, junk

For these data sets, average precision is the area under the curve of precision over recall by the trapezoid rule, as in
the evaluation program published with the Oxford Buildings data set. For each relevant image, the precision just before
it and the precision at it are averaged. The mean of these values over all relevant images is the average precision.
Queries without a relevant image do not count.

If the images are in class folders, every image is a query. The other images in its folder are relevant, and the query
image is removed from the ranking. Average precision is then the mean of the precision at each relevant image, as usual
in metric learning.

recall@k is the share of queries with at least one relevant image among the first k. If k is larger than the number of
images that are not relevant, the first k contain a relevant image in any order. recall@k is therefore left out for
values of k at which this holds for every query. If no query has an image that is not relevant, no figure depends on the
model, which is an error.

The ground truth is a JSON file, with paths relative to the images' folder:

    {"database": ["a.jpg", ...],
     "queries": [{"image": "q.jpg", "box": [x, y, width, height], "easy": [...], "hard": [...], "junk": [...]}, ...]}

`box` is optional. If a query has one, as Oxford's queries do, only the part of the query image inside the box is used.

Legend: q queries, n database images, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from model.messages import in_words
from training.evaluate.features import Box
from training.evaluate.meaning import NoMeaning, check_finite, usable_ks

KS = (1, 5, 10)
Rule = Literal["trapezoid", "mean"]
Setup = Literal["easy", "medium", "hard"]
SETUPS: Mapping[Setup, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
"""For each setup, the labels of the relevant images and the labels of the removed images."""


class Query(BaseModel):
    """One query of a ground truth file.

    `image` is the query image. If `box` (x, y, width, height) is given, only this part of the image is used. `easy`,
    `hard` and `junk` name the database images with these labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image: str
    box: Box | None = None
    easy: list[str] = Field(default_factory=list)
    hard: list[str] = Field(default_factory=list)
    junk: list[str] = Field(default_factory=list)


class GroundTruth(BaseModel):
    """The queries of a retrieval task, and the names of the database images that are ranked for each query."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: list[Query] = Field(min_length=1)
    database: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Scores:
    """The mean average precision, the recall@k for each k, and the number of queries that were scored.

    Queries without a relevant image are not scored. `recall` lacks the values of k at which it would be 100 % for every
    model, and `notes` names them.
    """

    mean_ap: float
    recall: dict[int, float]
    queries: int
    notes: list[str] = field(default_factory=list)


def read_ground_truth(path: Path) -> GroundTruth:
    """Read and validate a ground truth file for retrieval.

    Raises:
        ValueError: the file cannot be read, is not in the expected format, lists an image twice, or labels an image
            that is not in the database.
    """
    try:
        truth = GroundTruth.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: not a ground truth for retrieval: {in_words(error)}") from error
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
    """Return the positions (from 0) of the relevant images in a ranking from which the ignored images are removed.

    Args:
        relevant: bool [n] in the order of the ranking, best first. True for relevant images.
        ignored: bool [n] in the same order. True for ignored images, none of which is relevant.
    """
    places = torch.cumsum(~ignored, dim=0) - 1
    return places[relevant]


def average_precision(positions: Tensor, n_relevant: int, rule: Rule = "trapezoid") -> float:
    """Compute the average precision of one ranking.

    Args:
        positions: positions (from 0) of the relevant images in the ranking, ascending.
        n_relevant: number of relevant images. Relevant images that are not in the ranking count with precision 0.
        rule: "trapezoid" averages, for each relevant image, the precision just before it and the precision at it.
            "mean" uses only the precision at the relevant image.
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
    """Rank the database for each query by cosine similarity, and score the rankings.

    Args:
        queries: features of the q queries, [q, D]; they need not be normalised.
        database: features of the n database images, [n, D]; they need not be normalised.
        relevant: for each query, the positions of its relevant images in the database.
        ignored: for each query, the positions of the images that are removed from its ranking.
        ks: values of k for recall@k.
        rule: see `average_precision`.
        block_bytes: maximum memory for similarities, in bytes. Queries are ranked in blocks that are small enough for
            this limit.

    Raises:
        NoMeaning: no query has a relevant image, or the figures would be the same for every model.
        ValueError: a feature is not finite.
    """
    check_finite(queries=queries, database=database)
    n = len(database)
    scored = [index for index, positions in enumerate(relevant) if len(positions)]
    if not scored:
        raise NoMeaning("no query has a relevant image in the database")
    most = max(n - len(relevant[index]) - len(ignored[index]) for index in scored)  # images that are not relevant
    if not most:
        raise NoMeaning(f"each of the {len(scored)} queries ranks only relevant images: every model would score 100 %")
    reason = f"a query ranks at most {most} images that are not relevant, so every model would score 100 %"
    ks, notes = usable_ks(ks, most, figure="recall@k", reason=reason)
    database = F.normalize(database.float(), dim=1)
    rows = max(1, block_bytes // (12 * n))  # a float32 and an int64 for each database image
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
    return Scores(sum(aps) / len(aps), {k: count / len(aps) for k, count in hits.items()}, len(aps), notes)


def score_setup(
    truth: GroundTruth,
    setup: Setup,
    queries: Tensor,
    database: Tensor,
    *,
    ks: Sequence[int] = KS,
) -> Scores:
    """Score one setup.

    The relevant images are those labelled easy in the setup "easy", those labelled hard in "hard", and both in
    "medium". `queries` [q, D] and `database` [n, D] are features in the order of `truth`.

    Raises:
        NoMeaning: see `score`.
    """
    places = {name: place for place, name in enumerate(truth.database)}
    good, out = SETUPS[setup]

    def labelled(query: Query, kinds: tuple[str, ...]) -> Tensor:
        return torch.tensor([places[name] for kind in kinds for name in getattr(query, kind)], dtype=torch.long)

    relevant = [labelled(query, good) for query in truth.queries]
    return score(queries, database, relevant, [labelled(query, out) for query in truth.queries], ks=ks)


def score_classes(features: Tensor, labels: Tensor, *, ks: Sequence[int] = KS) -> Scores:
    """Use each image as a query, rank all other images by similarity to it, and score the rankings.

    The other images in the query's class are relevant. `features` are [n, D] and `labels` are class numbers [n].
    Average precision follows the rule "mean" (see `average_precision`).

    Raises:
        NoMeaning: no class has two images, or there is only one class.
    """
    members = {int(label): (labels == label).nonzero().flatten() for label in set(labels.tolist())}
    itself = torch.arange(len(labels), device=labels.device)
    relevant = [(same := members[int(label)])[same != i] for i, label in enumerate(labels)]
    return score(features, features, relevant, list(itself[:, None]), ks=ks, rule="mean")
