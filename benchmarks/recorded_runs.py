"""The runs that benchmarks/false_alarms.py recorded: when their features were lost, and when a rule stops them."""

import math
import sys
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.watch.collapse import CollapseLimits, CollapseState, check_collapse

RESULT = Path(__file__).parent / "results" / "2026-11-30-false-alarms.json"
QUERY_SCALES = {"easy": (0.5, 0.9), "medium": (0.3, 0.6)}
RANK_LOST, SPREAD_LOST, LOSS_LOST, RETRIEVAL_LOST = 0.5, 0.1, 0.05, 0.5
LABEL_FREE = (
    "retrieval_easy",
    "retrieval_medium",
    "retrieval_1_medium",
    "retrieval_5_medium",
    "ema_rankme_share",
    "ema_spread",
    "held_out_loss",
    "held_out_loss_student",
)


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a recorded run, as the loop passes them to the rule and as they were measured."""
    columns = dict(record["lines"])
    for kind in QUERY_SCALES:
        pairs = zip(columns[f"retrieval_1_{kind}"], columns[f"retrieval_5_{kind}"], strict=True)
        columns[f"retrieval_{kind}"] = [None if None in pair else sum(pair) / 2 for pair in pairs]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def lost(line: dict[str, Any], untrained: dict[str, Any]) -> set[str]:
    """Return the ways in which the measured features of a line are lost.

    The decision uses only the features of the student's moving average on held-out images and the loss of its heads
    there, compared with those at the start of the run. It does not use the figures of training steps.
    """
    if line["knn"] is None:
        return {"not finite"}
    limits = {
        "rank": (line["ema_rankme_share"], RANK_LOST * untrained["ema_rankme_share"]),
        "spread": (line["ema_spread"], SPREAD_LOST * untrained["ema_spread"]),
        "one prototype": (line["held_out_loss"], LOSS_LOST),  # all images get the same one
        "retrieval": (line["retrieval_easy"], RETRIEVAL_LOST * untrained["retrieval_easy"]),
    }
    return {name for name, (value, limit) in limits.items() if value < limit}


def onset(record: dict[str, Any]) -> tuple[int, str] | None:
    """Return the number of the first line (from 0) from which the features stay lost in the same way, and the way.

    Return None if they are not lost at the end: a healthy run. A loss in the last line alone does not count.
    """
    lines = rows(record)
    ways = [lost(line, {**lines[0], **record["untrained"]}) for line in lines]
    found = []
    for way in ways[-1]:
        number = max((n for n, found_there in enumerate(ways) if way not in found_there), default=-1) + 1
        if number < len(lines) - 1:
            found.append((number, way))
    return min(found, default=None)


def replay(record: dict[str, Any], measure: str | None = None) -> tuple[int, str] | None:
    """Apply the rule to a recorded run. Return the number of the line (from 0) and the name of the collapse, or None.

    `measure` is the column that serves as the measure of the run; None: no measure.
    """
    limits = CollapseLimits(record["n_prototypes"], n_measured=record["n_held_out"] if measure else 0)
    state = CollapseState()
    for number, line in enumerate(rows(record)):
        figures = line | ({"measure": line[measure]} if measure else {})
        if (found := check_collapse(figures, limits, state)) is not None:
            return number, found.name
    return None


def old_rule(record: dict[str, Any], patience: int = 5) -> int | None:
    """Return the number of the line at which the rule before 0034 stopped the run: one sign in `patience` lines."""
    ln_k, counts = math.log(record["n_prototypes"]), dict[str, int]()
    lines = rows(record)
    for number, line in enumerate(lines):
        loss, entropy, rank = line["dino_over_ln_k"], line["teacher_entropy"], line["rankme_share"]
        shown = {
            "loss": loss is not None and loss >= 0.99,
            "flat": entropy is not None and entropy >= 0.99 * ln_k,
            "sharp": entropy is not None and entropy <= 0.01 * ln_k,
            "rank": rank is not None and rank < 0.05,
        }
        counts = {sign: counts.get(sign, 0) + 1 for sign, is_shown in shown.items() if is_shown}
        if line["step"] >= record["steps"] / 3 and max(counts.values(), default=0) >= patience:
            return number
    return None


def correlations(records: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return how the measures without classes follow k-NN, as Spearman's rank correlation.

    `runs` compares the last lines of the runs on the same images. `lines` compares the lines of all these runs.
    """
    found: dict[str, dict[str, float]] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        groups.setdefault(record["images"], []).append(record)
    for group, members in groups.items():
        for column in LABEL_FREE:
            for kind, lines in (
                ("runs", [rows(record)[-1] for record in members]),
                ("lines", [line for record in members for line in rows(record)[::4]]),
            ):
                pairs = [(x[column], x["knn"]) for x in lines if x["knn"] is not None and x[column] is not None]
                if len(pairs) >= 5:
                    value = float(spearmanr(*zip(*pairs, strict=True)).statistic)
                    found.setdefault(column, {})[f"{group}, {kind}, n = {len(pairs)}"] = round(value, 2)
    return found


def summary(records: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one line per run: when its features were lost, and when the new and the old rule stop it."""
    return [
        {
            "run": name,
            "onset": onset(record),
            "rule": replay(record),
            "rule_with_knn": replay(record, "knn"),
            "rule_with_retrieval": replay(record, "retrieval_medium"),
            "old_rule": old_rule(record),
        }
        for name, record in records.items()
    ]
