"""The rules and the verdict of the gate, which decides whether a new model (the challenger) may replace the live one
(the champion).

Everything here can be written as JSON. Accuracies, differences and shares are fractions of 1, not percent.
docs/decisions/0038-gate.md explains the defaults of the rules.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

_SHARES = (
    "margin",
    "class_fall",
    "min_rankme_share",
    "rankme_fall",
    "min_spread",
    "spread_fall",
    "near_identical",
    "max_near_identical",
    "near_identical_rise",
    "dead_std",
    "max_dead",
    "dead_rise",
)


@dataclass(frozen=True)
class GateRules:
    """The limits that a challenger must keep.

    The accuracy is that of k-NN, or without classes the share of images that are found by crops of themselves. It is a
    mean over all queries.

    Attributes:
        margin: how far below 0 the confidence interval of the difference, challenger minus champion, may reach.
        min_difference: the minimum of the difference itself. With a value of -1, only the interval decides.
        confidence: the confidence level of the interval.
        min_queries: the minimum number of queries. With 300 queries without any changed answer, the difference is
            below 1 point with 95 % confidence, because the upper limit for no event in n trials is 3 / n.
        ks: the numbers of neighbours. The k-NN accuracy is the mean over them.
        class_fall: how far the accuracy of a class may fall, apart from noise.
        class_min_queries: classes with fewer queries are not tested.
        class_error: the probability that a challenger is refused because of a class although no class has fallen by
            more than `class_fall`. It is divided by the number of tested classes (Bonferroni).
        min_rankme_share: the minimum of RankMe, the effective rank of the features, as a share of its maximum.
        rankme_fall: the minimum of RankMe's share, as a share of the champion's.
        min_spread: the minimum spread of the features, which is 1 minus the mean cosine of two images.
        spread_fall: the minimum spread, as a share of the champion's.
        near_identical: an image is near-identical to another if their cosine is at least this.
        max_near_identical: the maximum share of images that are near-identical to another image.
        near_identical_rise: how far this share may be above the champion's.
        dead_std: a dimension is dead if its standard deviation over the images is below this share of the root mean
            square over all dimensions.
        max_dead: the maximum share of dead dimensions.
        dead_rise: how far this share may be above the champion's.
        neighbours: the number of nearest images whose overlap is reported.

    Raises:
        ValueError: a value is out of range. The message names the rule, the value and what is allowed.
    """

    margin: float = 0.01
    min_difference: float = 0.0
    confidence: float = 0.95
    min_queries: int = 300
    ks: tuple[int, ...] = (1, 5, 10, 20)
    class_fall: float = 0.05
    class_min_queries: int = 20
    class_error: float = 0.05
    min_rankme_share: float = 0.05
    rankme_fall: float = 0.5
    min_spread: float = 0.001
    spread_fall: float = 0.25
    near_identical: float = 0.9999
    max_near_identical: float = 0.5
    near_identical_rise: float = 0.1
    dead_std: float = 0.001
    max_dead: float = 0.5
    dead_rise: float = 0.25
    neighbours: int = 10

    def __post_init__(self) -> None:
        def check(name: str, allowed: bool, what: str) -> None:
            if not allowed:
                raise ValueError(f"gate rule {name}={getattr(self, name)!r}: must be {what}")

        for name in _SHARES:
            check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        check("min_difference", -1 <= self.min_difference <= 1, "from -1 to 1")
        for name in ("confidence", "class_error"):
            check(name, 1e-6 <= getattr(self, name) <= 1 - 1e-6, "between 0 and 1, both excluded")
        for name in ("min_queries", "class_min_queries", "neighbours"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("ks", len(self.ks) > 0 and all(k >= 1 for k in self.ks), "one or more numbers of at least 1")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return the rules with these values, as they are in JSON. Rules that are not given have their defaults.

        Raises:
            ValueError: a rule is unknown, or a value has another type or is out of range.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown gate rule {unknown[0]!r}; the rules are {', '.join(fields)}")
        return cls(**{name: _read(name, value, fields[name]) for name, value in values.items()})


def _read(name: str, value: Any, default: Any) -> Any:
    """Return the value of a rule with the type of its default.

    Raises:
        ValueError: the value has another type.
    """
    kind = "a list of integers" if isinstance(default, tuple) else "an integer" if isinstance(default, int) else ""
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and all(type(k) is int for k in value):
            return tuple(value)
    elif type(value) is int or (type(value) is float and not kind):
        return type(default)(value)
    raise ValueError(f"gate rule {name}={value!r}: must be {kind or 'a number'}")


@dataclass(frozen=True)
class AccuracyFigures:
    """The accuracies of both models on the same `n_queries` queries.

    `low` and `high` are the ends of the interval of `difference`, which is challenger minus champion. `changed` is the
    share of queries whose result differs. `queries_needed` is the number of queries with which a challenger that is as
    good as the champion would keep the margin in 80 of 100 cases.
    """

    measure: str
    n_queries: int
    champion: float
    challenger: float
    difference: float
    low: float
    high: float
    changed: float
    queries_needed: int


@dataclass(frozen=True)
class ClassFigures:
    """The accuracies of both models on the queries of one class.

    `upper` is the upper limit of the difference, corrected for the number of tested classes. The class has fallen if it
    is below -`class_fall`.
    """

    label: str
    n_queries: int
    champion: float
    challenger: float
    difference: float
    upper: float
    fallen: bool


@dataclass(frozen=True)
class Signs:
    """Signs of collapse in the features of one model; see `GateRules`. All except the counts are None if a feature is
    not finite."""

    n_images: int
    not_finite: int  # images with a feature that is not finite
    rankme_share: float | None = None
    spread: float | None = None
    near_identical: float | None = None
    dead_dimensions: float | None = None


@dataclass(frozen=True)
class LiveFigures:
    """The share of the nearest neighbours that both models agree on, for `n_items` drawn items of a collection, among
    these items."""

    collection: str
    n_items: int
    kept: float


@dataclass(frozen=True)
class Figures:
    """All figures of a verdict.

    `accuracy` is None if it cannot be computed, because a feature of the challenger is not finite. `worst_classes`
    contains the classes with the largest falls. `neighbours_kept` is the share of the nearest images of an image that
    both models agree on, in the frozen set, and `live_neighbours_kept` the same for collections. They are information
    only.
    """

    accuracy: AccuracyFigures | None
    worst_classes: tuple[ClassFigures, ...]
    classes_tested: int
    classes_too_small: int
    champion: Signs
    challenger: Signs
    neighbours_kept: float | None
    live_neighbours_kept: tuple[LiveFigures, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger may replace the champion, and why.

    `reasons` contains one sentence for each rule that the challenger breaks, or the reason why it passed. `too_small`
    is True if the only obstacle is that the set has too few queries to decide. `about` describes the models and the
    images.
    """

    passed: bool
    reasons: tuple[str, ...]
    too_small: bool
    figures: Figures
    rules: GateRules
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as a dict of JSON types."""
        return dataclasses.asdict(self)
