"""Signs of collapse in the lines of metrics.jsonl, and the rule that combines them.

A run has collapsed if its network no longer tells images apart. No single figure shows a collapse reliably. The DINO
loss is at ln K (K is the number of prototypes) as long as fresh heads have not learned, a low temperature sharpens the
teacher's targets in a healthy run, and RankMe rises and falls. A collapse therefore is one of these combinations of
signs, in several consecutive lines:

- equal features: the spread of the class tokens has fallen to a quarter of its highest value, or RankMe is low and a
  second sign appears;
- lost features: the measure of the run (k-NN or a measure without classes) has fallen to two thirds of its best value,
  and the loss or the teacher's entropy is at one of its ends;
- the trivial solution: the teacher assigns all images to one prototype, and the student predicts it without error;
- no information: the teacher's targets are uniform, the loss is at ln K, and neither RankMe nor the spread has risen
  since the start of the run. Because such a run may still begin to learn, it needs more lines than the other
  combinations. If RankMe or the spread has risen, another loss (KoLeo or iBOT) teaches the network.

A line counts only if the backbone was trained in its step, because frozen features cannot collapse. The limits come
from recorded runs (docs/decisions/0034-signs-of-collapse.md).

Decisions depend only on the figures of the lines and on a state of plain JSON types, so a resumed run makes the same
decisions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Figures = Mapping[str, Any]
TRACKED = ("rankme_share", "token_spread", "measure")
"""The figures that are compared with their highest value in the run."""


@dataclass(frozen=True)
class CollapseLimits:
    """The limits of the signs of collapse.

    The limits of the loss and of the teacher's entropy are shares of ln K for K prototypes. `rankme_fall`,
    `spread_fall` and `measure_fall` are shares of the highest value in the run.
    """

    n_prototypes: int
    n_measured: int = 0  # number of images from which the measure is computed; 0: the measure is not a sign
    patience: int = 5  # consecutive lines that show the same combination
    no_information_patience: int = 3  # the combination "no information" needs this many times `patience` lines
    loss_at_ln_k: float = 0.99
    loss_solved: float = 0.05
    entropy_at_ln_k: float = 0.99
    entropy_at_zero: float = 0.01
    min_rankme_share: float = 0.05
    rankme_fall: float = 0.5
    spread_fall: float = 0.25
    measure_fall: float = 0.65
    rise: float = 1.25  # RankMe or the spread has risen if it is this many times the first value


@dataclass
class CollapseState:
    """What the rule remembers between lines, as JSON types.

    `start` and `highest` map the names in `TRACKED` to the first and the highest value in the run. `bad_lines` maps the
    name of a combination to the number of consecutive lines that show it.
    """

    start: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    bad_lines: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Collapse:
    """A collapse: the name of its combination, what happened, the signs in the latest line, and advice that fits them.

    `n_lines` is the number of consecutive lines that show the combination.
    """

    name: str
    words: str
    signs: dict[str, str]
    advice: str
    n_lines: int


def signs(figures: Figures, limits: CollapseLimits, state: CollapseState) -> dict[str, str]:
    """Return the signs of collapse in one line, as a dict from the name of a sign to its description.

    Args:
        figures: the line. It may have `dino_over_ln_k`, `teacher_entropy`, `rankme_share`, `token_spread`, `measure`
            (the latest value of the run's measure, 0 to 1, higher is better) and `lr_backbone` (0: the backbone is
            frozen). A figure that is missing or None is not a sign. A line with a frozen backbone has no signs.
        limits: the limits of the signs.
        state: the first and the highest values of the run up to this line.
    """
    if figures.get("lr_backbone") == 0:
        return {}
    ln_k = math.log(limits.n_prototypes)
    found: dict[str, str] = {}
    loss, entropy = figures.get("dino_over_ln_k"), figures.get("teacher_entropy")
    if loss is not None and loss >= limits.loss_at_ln_k:
        found["loss"] = f"the DINO loss is at {loss:.3f} of ln K"
    if loss is not None and loss <= limits.loss_solved:
        found["solved"] = f"the DINO loss is at {loss:.3f} of ln K: the same prediction is right for all images"
    if entropy is not None and entropy >= limits.entropy_at_ln_k * ln_k:
        found["uniform"] = (
            f"the teacher's entropy is {entropy:.2f} of at most ln K = {ln_k:.2f}: its targets say nothing"
        )
    if entropy is not None and entropy <= limits.entropy_at_zero * ln_k:
        found["sharp"] = f"the teacher's entropy is {entropy:.3f}: each image is assigned to a single prototype"
    return found | _signs_of_features(figures, limits, state)


def _signs_of_features(figures: Figures, limits: CollapseLimits, state: CollapseState) -> dict[str, str]:
    """Return the signs that compare a figure of the features with its highest value in the run.

    A network with a small LayerScale starts with equal features, and RankMe is then below `min_rankme_share`. This is a
    sign only as long as neither RankMe nor the spread has risen.
    """
    found: dict[str, str] = {}
    rank, spread, measure = (figures.get(name) for name in TRACKED)
    if rank is not None:
        limit = limits.rankme_fall * state.highest.get("rankme_share", 0)
        if not _risen(figures, limits, state.start):
            limit = max(limit, limits.min_rankme_share)
        if rank < limit:
            found["rank"] = (
                f"the class tokens use a share of {rank:.3f} of the possible dimensions "
                f"(RankMe; the limit is {limit:.3f})"
            )
    if spread is not None and spread < (limit := limits.spread_fall * state.highest.get("token_spread", 0)):
        found["spread"] = (
            f"the class tokens of different images have a mean cosine of {1 - spread:.4f} "
            f"(spread {spread:.4f}; the limit is {limit:.4f})"
        )
    if measure is not None and limits.n_measured > 0:
        best = state.highest.get("measure", 0)
        noise = math.sqrt(max(0, best * (1 - best)) / limits.n_measured)
        if measure < limits.measure_fall * best and best - measure > 2 * noise:
            found["measure"] = f"the measure of the run fell from {best:.1%} to {measure:.1%}"
    return found


def check_collapse(figures: Figures, limits: CollapseLimits, state: CollapseState) -> Collapse | None:
    """Update `state` with a line of metrics.jsonl, and return the collapse that the lines show, or None.

    The arguments are those of `signs`.
    """
    for name in TRACKED:
        value = figures.get(name)
        if value is not None and math.isfinite(value):
            state.start.setdefault(name, value)
            state.highest[name] = max(value, state.highest.get(name, value))
    found = signs(figures, limits, state)
    shown = combinations(found, risen=_risen(figures, limits, state.start))
    state.bad_lines = {name: state.bad_lines.get(name, 0) + 1 for name in shown}
    for name, n_lines in state.bad_lines.items():
        factor = limits.no_information_patience if name == "no information" else 1
        if n_lines >= factor * limits.patience:
            return Collapse(name, WORDS[name], found, _advice(name, found), n_lines)
    return None


def _risen(figures: Figures, limits: CollapseLimits, start: Mapping[str, float]) -> bool:
    """Return whether RankMe or the spread of the class tokens has risen since the first line of the run."""
    return any(
        figures.get(name) is not None and figures[name] > limits.rise * start.get(name, math.inf)
        for name in ("rankme_share", "token_spread")
    )


def combinations(found: Mapping[str, str], risen: bool = False) -> list[str]:
    """Return the names of the combinations of signs that one line shows.

    `found` contains the signs of the line. `risen` is True if RankMe or the spread has risen since the first line.
    """
    teacher = {"loss", "solved", "uniform", "sharp"} & found.keys()
    shown = {
        "equal features": "spread" in found or ("rank" in found and len(found) >= 2),
        "lost features": "measure" in found and bool(teacher),
        "trivial solution": {"solved", "sharp"} <= found.keys(),
        "no information": {"loss", "uniform"} <= found.keys() and not risen,
    }
    return [name for name, is_shown in shown.items() if is_shown]


WORDS = {
    "equal features": "the network gives different images almost the same features",
    "lost features": "the features have lost what they knew, and the losses do not show a way back",
    "trivial solution": "the teacher assigns all images to one prototype, so the student has nothing to learn",
    "no information": "the teacher's targets are the same for all images, so the student learns nothing",
}


def _advice(name: str, found: Mapping[str, str]) -> str:
    """Return advice that fits a combination and its signs, as one sentence."""
    if "uniform" in found and name != "lost features":
        return "Lower teacher_temp, so that the targets say more about an image."
    if name == "trivial solution" or "sharp" in found:
        return "Use centering=sinkhorn or lower center_momentum, raise teacher_temp, or raise koleo_weight."
    return "Lower lr or weight_decay, raise koleo_weight or batch_size, or use a longer warmup."
