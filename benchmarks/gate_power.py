"""Simulate how often the gate refuses a model that is as good as the champion, and accepts one that is worse.

    python benchmarks/gate_power.py

Each pair of models is a set of query scores, as `service/jobs/gate_scores.py` computes them: for each query and each of
four values of k, whether the answer is right. An answer is right if the sum of three normal random numbers is above a
threshold: one of the query, which both models share, one of the query and the model, and one of the query, the model
and k. The variance of the second determines how many answers differ between the models. The threshold of the challenger
is such that its expected accuracy is lower by exactly the stated number of points.

The result is benchmarks/results/2026-11-30-gate-power.json. It takes less than a minute on one core.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

sys.path.insert(0, str(Path(__file__).parents[1]))

from service.jobs.gate import accuracy_reasons, compare_accuracy, compare_classes
from service.jobs.gate_scores import Scores
from service.jobs.verdict import GateRules

RESULT = Path(__file__).parent / "results" / "2026-11-30-gate-power.json"
PAIRS, CLASS_PAIRS = 1000, 200
ACCURACY = 0.8
K_VARIANCE = 0.05
N_CLASSES = {300: 10, 3000: 50}
NOISE = {"similar models": 0.02, "different models": 0.15}  # variance of query and model
LOSSES = (-2.0, 0.0, 1.0, 2.0, 5.0)  # points; negative: the challenger is better
RULES = GateRules()
INTERVAL_ONLY = replace(RULES, min_difference=-1.0)
CLASS_SIZES, CLASS_LOSSES, TESTED_CLASSES = (20, 50, 100), (0.0, 10.0, 20.0, 40.0), 30


def scores(rng: np.random.Generator, n: int, noise: float, losses: np.ndarray | float, n_classes: int) -> Scores:
    """Return the scores of one pair of models on n queries. `losses` is in points, for each query or for all."""
    query = rng.standard_normal((n, 1), np.float32)

    def right(accuracy: np.ndarray) -> np.ndarray:
        own = noise**0.5 * rng.standard_normal((n, 1), np.float32)
        total = query + own + K_VARIANCE**0.5 * rng.standard_normal((n, len(RULES.ks)), np.float32)
        thresholds = (1 + noise + K_VARIANCE) ** 0.5 * ndtri(1 - accuracy)
        return (total > thresholds[:, None]).sum(axis=1).astype(np.int64)

    losses = np.broadcast_to(np.asarray(losses), n)
    unique, positions = np.unique(ACCURACY - losses / 100, return_inverse=True)
    assert unique.min() > 0
    classes = np.arange(n) % n_classes
    champion, challenger = right(np.full(1, ACCURACY).repeat(n)), right(unique[positions])
    return Scores(champion, challenger, len(RULES.ks), "simulated", classes)


def simulate(n: int, noise: float, loss: float, seed: int) -> dict[str, Any]:
    """Judge `PAIRS` pairs of models on n queries, and return the shares of the outcomes."""
    rng = np.random.default_rng(seed)
    outcomes = []
    for _ in range(PAIRS):
        pair = scores(rng, n, noise, loss, N_CLASSES[n])
        accuracy, classes = compare_accuracy(pair, RULES), compare_classes(pair, RULES)
        fallen = any(row.fallen for row in classes.worst)
        small, worse = accuracy_reasons(accuracy, RULES)
        small_alone, worse_alone = accuracy_reasons(accuracy, INTERVAL_ONLY)
        outcomes.append(
            {
                "passed": not (small or worse or fallen),
                "passed by the interval alone": not (small_alone or worse_alone or fallen),
                "too small to decide": bool(small),
                "worse or not better": bool(worse),
                "a class has fallen": fallen,
                "interval contains the truth": accuracy.low <= -loss / 100 + 1e-9
                and -loss / 100 <= accuracy.high + 1e-9,
                "changed": accuracy.changed,
                "half of the interval, points": 50 * (accuracy.high - accuracy.low),
                "queries needed": accuracy.queries_needed,
            }
        )
    means = {name: round(float(np.mean([row[name] for row in outcomes])), 3) for name in outcomes[0]}
    return {"queries": n, "classes": N_CLASSES[n], "loss_points": loss, **means}


def simulate_class(size: int, noise: float, loss: float, seed: int) -> dict[str, Any]:
    """Return how often a class with `size` queries is found to have fallen, if it alone loses `loss` points.

    All `TESTED_CLASSES` classes have this size. `other` is how often any other class is found.
    """
    rng = np.random.default_rng(seed)
    losses = np.where(np.arange(size * TESTED_CLASSES) % TESTED_CLASSES == 0, loss, 0.0)
    found, other = 0, 0
    for _ in range(CLASS_PAIRS):
        pair = scores(rng, len(losses), noise, losses, TESTED_CLASSES)
        fallen = {row.label for row in compare_classes(pair, RULES).worst if row.fallen}
        found += "0" in fallen
        other += bool(fallen - {"0"})
    return {"class_queries": size, "loss_points": loss, "found": found / CLASS_PAIRS, "other": other / CLASS_PAIRS}


def main() -> None:
    started = time.process_time()
    result: dict[str, Any] = {
        "benchmark": "gate-power",
        "date": "2026-11-30",
        "command": "python benchmarks/gate_power.py",
        "pairs": PAIRS,
        "pairs, one class": CLASS_PAIRS,
        "accuracy": ACCURACY,
        "k_variance": K_VARIANCE,
        "noise": NOISE,
        "tested_classes": TESTED_CLASSES,
        "rules": RULES.__dict__,
    }
    for name, noise in NOISE.items():
        rows = [simulate(n, noise, loss, seed) for n in N_CLASSES for seed, loss in enumerate(LOSSES)]
        result[name] = rows
        for row in rows:
            print(name, row)
    noise = NOISE["different models"]
    result["one class"] = [
        simulate_class(size, noise, loss, seed) for size in CLASS_SIZES for seed, loss in enumerate(CLASS_LOSSES)
    ]
    for row in result["one class"]:
        print(row)
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['cpu_seconds']} s of CPU time -> {RESULT}")


if __name__ == "__main__":
    main()
