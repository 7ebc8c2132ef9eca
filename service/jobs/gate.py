"""The gate of a retraining: decides whether a new model (the challenger) may replace the live one (the champion).

Both models are compared on the same frozen set of images:

1. accuracy: the confidence interval of the difference must not reach below a margin, and the difference itself must not
   be negative. The accuracy is that of k-NN, or without classes the share of images found by crops of themselves.
2. the worst class: no class may fall by more than a limit, apart from noise.
3. signs of collapse, in absolute terms and compared with the champion.
4. the share of nearest images that both models agree on. This is information only.

The functions are pure: features go in, and a verdict comes out. docs/decisions/0038-gate.md tells how often the rules
refuse a model that is as good as the champion, and how often they accept a worse one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from service.jobs.bootstrap import bootstrap_quantiles
from service.jobs.collapse import broken_rules, neighbours_kept, signs_of_collapse
from service.jobs.gate_scores import Pair, Scores, knn_scores, view_scores
from service.jobs.verdict import AccuracyFigures, ClassFigures, Figures, GateRules, LiveFigures, Verdict

DEFAULT_RULES = GateRules()
_SHOWN_CLASSES = 5
_POWER = 0.8


@dataclass(frozen=True)
class Evidence:
    """The features from which the gate decides.

    Attributes:
        images: features [n, D] of the frozen set, or of its index part if there are `queries`.
        labels: the classes of these images, or None.
        queries: features [m, D] of the query part. If None, each image is classified by the others (leave-one-out).
        query_labels: the classes of the queries.
        views: features [n, V, D] of V random crops of each image. They are needed if `labels` is None.
        live: features [q, D] of drawn items of each collection. They decide nothing.

    Raises:
        ValueError: the number of labels or views does not match, or there are fewer than two images or no queries.
    """

    images: Pair
    labels: Sequence[str] | None = None
    queries: Pair | None = None
    query_labels: Sequence[str] = ()
    views: Pair | None = None
    live: Mapping[str, Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, m = len(self.images.champion), 0 if self.queries is None else len(self.queries.champion)
        if n < 2:
            raise ValueError(f"{n} images: a comparison of models needs at least two")
        if self.labels is not None and len(self.labels) != n:
            raise ValueError(f"{len(self.labels)} labels for {n} images")
        if len(self.query_labels) != m or (self.queries is not None and m == 0):
            raise ValueError(f"{len(self.query_labels)} labels for {m} queries")
        if self.labels is None and (self.views is None or len(self.views.champion) != n):
            raise ValueError("images without labels need views: features of random crops of each image")

    def with_finite(self) -> "Evidence | None":
        """Return the evidence, or None if a feature of the challenger is not finite.

        Raises:
            ValueError: a feature of the champion is not finite.
        """
        pairs = [pair for pair in (self.images, self.queries, self.views) if pair is not None]
        if not all(np.isfinite(pair.champion).all() for pair in pairs):
            raise ValueError("a feature of the champion is NaN or infinite, so nothing can be compared with it")
        return self if all(np.isfinite(pair.challenger).all() for pair in pairs) else None


def judge(evidence: Evidence, rules: GateRules = DEFAULT_RULES) -> Verdict:
    """Decide whether the challenger may replace the champion.

    Raises:
        ValueError: a feature of the champion is not finite.
    """
    finite = evidence.with_finite()
    champion, challenger = (
        signs_of_collapse(_all_images(evidence, model), rules) for model in ("champion", "challenger")
    )
    broken = broken_rules(champion, challenger, rules)
    accuracy, classes, kept, too_small = None, ClassResult((), 0, 0), None, ""
    if finite is None:
        broken = broken or ["a feature of a crop is NaN or infinite"]
    else:
        scores = scores_of(evidence, rules)
        accuracy = compare_accuracy(scores, rules)
        classes = compare_classes(scores, rules)
        too_small, worse = accuracy_reasons(accuracy, rules)
        broken = [*worse, *class_reasons(classes, rules), *broken]
        kept = neighbours_kept(evidence.images.champion, evidence.images.challenger, rules.neighbours)
    live = _live_figures(evidence.live, rules)
    figures = Figures(accuracy, classes.worst, classes.tested, classes.too_small, champion, challenger, kept, live)
    reasons = (*([too_small] if too_small else []), *broken)
    if not reasons:
        assert accuracy is not None
        reasons = (f"{_difference(accuracy, rules)}, and no rule is broken",)
    return Verdict(not too_small and not broken, reasons, bool(too_small) and not broken, figures, rules)


def _live_figures(live: Mapping[str, Pair], rules: GateRules) -> tuple[LiveFigures, ...]:
    """Return the share of neighbours kept for each collection with at least three items."""
    kept = {name: neighbours_kept(pair.champion, pair.challenger, rules.neighbours) for name, pair in live.items()}
    return tuple(
        LiveFigures(name, len(live[name].champion), share) for name, share in kept.items() if share is not None
    )


def scores_of(evidence: Evidence, rules: GateRules) -> Scores:
    """Return the scores of the queries: those of k-NN if the images have classes, else those of crops."""
    if evidence.labels is not None:
        return knn_scores(evidence.images, evidence.labels, evidence.queries, evidence.query_labels, rules.ks)
    assert evidence.views is not None
    return view_scores(evidence.images, evidence.views)


def compare_accuracy(scores: Scores, rules: GateRules) -> AccuracyFigures:
    """Compare the mean scores of both models, with a paired bootstrap interval of the difference."""
    differences = scores.challenger - scores.champion
    n, tail = len(differences), (1 - rules.confidence) / 2
    low, high = bootstrap_quantiles(differences, (tail, 1 - tail))
    z = NormalDist().inv_cdf(1 - tail) + NormalDist().inv_cdf(_POWER)
    spread = float(differences.std()) / scores.most
    needed = math.ceil((z * spread / rules.margin) ** 2) if rules.margin else n
    return AccuracyFigures(
        measure=scores.measure,
        n_queries=n,
        champion=float(scores.champion.mean()) / scores.most,
        challenger=float(scores.challenger.mean()) / scores.most,
        difference=float(differences.mean()) / scores.most,
        low=low / scores.most,
        high=high / scores.most,
        changed=float((differences != 0).mean()),
        queries_needed=max(needed, rules.min_queries),
    )


@dataclass(frozen=True)
class ClassResult:
    """The classes that were compared: those that have fallen and those with the largest falls, and the numbers of
    tested classes and of classes with too few queries."""

    worst: tuple[ClassFigures, ...]
    tested: int
    too_small: int


def compare_classes(scores: Scores, rules: GateRules) -> ClassResult:
    """Compare the mean scores of both models for each class with at least `class_min_queries` queries.

    A class has fallen if the upper limit of its difference is below -`class_fall`. The limit is a quantile of the
    class's own bootstrap distribution, at the probability 1 - `class_error` / number of tested classes.
    """
    if scores.classes is None:
        return ClassResult((), 0, 0)
    names, numbers, counts = np.unique(scores.classes, return_inverse=True, return_counts=True)
    differences = scores.challenger - scores.champion
    means = np.bincount(numbers, differences) / counts / scores.most
    tested = np.flatnonzero(counts >= rules.class_min_queries)
    ranked = tested[np.argsort(means[tested], kind="stable")]
    candidates = [at for place, at in enumerate(ranked) if place < _SHOWN_CLASSES or means[at] < -rules.class_fall]
    rows = []
    for at in candidates:
        mine = numbers == at
        (upper,) = bootstrap_quantiles(differences[mine], (1 - rules.class_error / len(tested),))
        rows.append(
            ClassFigures(
                label=str(names[at]),
                n_queries=int(counts[at]),
                champion=float(scores.champion[mine].mean()) / scores.most,
                challenger=float(scores.challenger[mine].mean()) / scores.most,
                difference=float(means[at]),
                upper=upper / scores.most,
                fallen=upper / scores.most < -rules.class_fall,
            )
        )
    worst = [row for place, row in enumerate(rows) if row.fallen or place < _SHOWN_CLASSES]
    return ClassResult(tuple(worst), len(tested), len(names) - len(tested))


def accuracy_reasons(accuracy: AccuracyFigures, rules: GateRules) -> tuple[str, list[str]]:
    """Return the reason why the set is too small to decide, or "", and the reasons why the challenger is worse.

    If the challenger is certainly worse, the interval is not a reason: more queries would not help.
    """
    shown = _difference(accuracy, rules)
    if accuracy.high < 0:
        return "", [f"the challenger is worse: {shown}"]
    if accuracy.n_queries < rules.min_queries:
        few = f"{accuracy.n_queries} queries, and at least {rules.min_queries} are needed (min_queries)"
        return f"the set is too small to decide: {few}; {shown}", []
    if accuracy.low <= -rules.margin:
        return (
            f"the set is too small to decide: {shown}, and the interval reaches below {-100 * rules.margin:+.1f} "
            f"points (margin); about {accuracy.queries_needed} queries are needed",
            [],
        )
    if accuracy.difference < rules.min_difference:
        least = f"{100 * rules.min_difference:+.1f} points (min_difference)"
        return "", [f"the challenger is not better: {shown}; the difference must be at least {least}"]
    return "", []


def class_reasons(classes: ClassResult, rules: GateRules) -> list[str]:
    """Return one sentence for each class that has fallen."""
    return [
        f"class {row.label!r} falls from {100 * row.champion:.1f} to {100 * row.challenger:.1f} % on {row.n_queries} "
        f"queries: even with noise, by at least {-100 * row.upper:.1f} points, "
        f"and at most {100 * rules.class_fall:.1f} are allowed (class_fall)"
        for row in classes.worst
        if row.fallen
    ]


def _difference(accuracy: AccuracyFigures, rules: GateRules) -> str:
    """Return the accuracies, the difference and its interval in words."""
    return (
        f"{accuracy.measure} {100 * accuracy.champion:.1f} -> {100 * accuracy.challenger:.1f} %, "
        f"{100 * accuracy.difference:+.2f} points ({100 * rules.confidence:g} % interval "
        f"{100 * accuracy.low:+.2f} to {100 * accuracy.high:+.2f})"
    )


def _all_images(evidence: Evidence, model: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return the features of all whole images, those of the index part and of the query part."""
    parts = [evidence.images] if evidence.queries is None else [evidence.images, evidence.queries]
    return np.concatenate([getattr(part, model) for part in parts])
