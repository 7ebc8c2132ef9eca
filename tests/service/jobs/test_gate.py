"""Tests of the gate with made-up features, for which the right decision is known."""

import json
from collections.abc import Iterable

import numpy as np
import pytest

from service.jobs.collapse import neighbours_kept, rankme_share, spread
from service.jobs.gate import Evidence, judge
from service.jobs.gate_scores import Pair, view_scores
from service.jobs.retrain import RetrainParams
from service.jobs.verdict import GateRules, Verdict

CLASSES, PER_CLASS = 10, 30  # of the index part
DIMS = 16


def features(shown: np.ndarray, seed: int) -> np.ndarray:
    """Return features [n, 16] that k-NN assigns to the classes `shown` [n]."""
    noise = np.random.default_rng(seed).normal(size=(len(shown), DIMS))
    return (np.eye(DIMS)[shown] + 0.05 * noise).astype(np.float32)


INDEX_LABELS = np.arange(CLASSES * PER_CLASS) % CLASSES
INDEX = features(INDEX_LABELS, seed=0)


def names(labels: np.ndarray) -> list[str]:
    return [f"class {label}" for label in labels]


def queries(n: int, wrong: Iterable[int]) -> np.ndarray:
    """Return features of n queries, of which k-NN assigns those at the positions `wrong` to another class."""
    shown = np.arange(n) % CLASSES
    at = np.array(list(wrong), int)
    shown[at] = (shown[at] + 1) % CLASSES
    return features(shown, seed=1)


def verdict_of(champion: np.ndarray, challenger: np.ndarray, rules: GateRules | None = None) -> Verdict:
    """Compare two models that have the same features of the index part and these features of the queries."""
    labels = names(np.arange(len(champion)) % CLASSES)
    evidence = Evidence(Pair(INDEX, INDEX), names(INDEX_LABELS), Pair(champion, challenger), labels)
    return judge(evidence, rules or GateRules())


def test_equal_models_pass() -> None:
    verdict = verdict_of(queries(1000, range(100)), queries(1000, range(100)))
    found = verdict.figures.accuracy
    assert verdict.passed
    assert found is not None
    assert (found.n_queries, found.champion, found.challenger, found.changed) == (1000, 0.9, 0.9, 0)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert "90.0 -> 90.0 %, +0.00 points" in verdict.reasons[0]
    assert verdict.figures.neighbours_kept == 1


def test_a_better_model_passes() -> None:
    verdict = verdict_of(queries(1000, range(100)), queries(1000, range(40)))
    found = verdict.figures.accuracy
    assert verdict.passed
    assert found is not None
    assert found.difference == pytest.approx(0.06)
    half = 1.96 * np.sqrt(0.06 * 0.94 / 1000)
    assert (found.low, found.high) == pytest.approx((0.06 - half, 0.06 + half), abs=0.001)
    assert found.changed == pytest.approx(0.06)


def test_a_slightly_worse_model_is_within_noise_but_not_better() -> None:
    champion, challenger = queries(4000, range(100)), queries(4000, range(50, 155))
    verdict = verdict_of(champion, challenger)
    assert not verdict.passed
    assert not verdict.too_small
    assert len(verdict.reasons) == 1
    assert "the challenger is not better" in verdict.reasons[0]
    assert "-0.12 points" in verdict.reasons[0]
    assert "at least +0.0 points (min_difference)" in verdict.reasons[0]
    assert verdict_of(champion, challenger, GateRules(min_difference=-1)).passed
    assert not verdict_of(champion, challenger, GateRules(min_difference=-1, margin=0.004)).passed


def test_a_clearly_worse_model_is_refused() -> None:
    verdict = verdict_of(queries(1000, range(100)), queries(1000, range(150)))
    assert not verdict.passed
    assert not verdict.too_small
    assert verdict.reasons[0].startswith("the challenger is worse: ")
    assert "90.0 -> 85.0 %, -5.00 points" in verdict.reasons[0]


def test_few_queries_cannot_decide() -> None:
    verdict = verdict_of(queries(299, range(30)), queries(299, range(25)))
    assert not verdict.passed
    assert verdict.too_small
    assert "the set is too small to decide: 299 queries, and at least 300 are needed" in verdict.reasons[0]
    assert verdict_of(queries(300, range(30)), queries(300, range(25))).passed


def test_a_wide_interval_cannot_decide_and_says_how_many_queries_are_needed() -> None:
    verdict = verdict_of(queries(500, range(50)), queries(500, range(25, 74)))
    found = verdict.figures.accuracy
    assert not verdict.passed
    assert verdict.too_small
    assert found is not None
    assert found.low < -0.01 < 0 < found.difference
    sigma = np.sqrt(49 / 500)
    assert found.queries_needed == pytest.approx(((1.96 + 0.8416) * sigma / 0.01) ** 2, rel=0.01)
    assert f"about {found.queries_needed} queries are needed" in verdict.reasons[0]


def test_too_few_queries_are_no_excuse_for_a_clearly_worse_model() -> None:
    verdict = verdict_of(queries(200, []), queries(200, range(60)))
    assert not verdict.too_small
    assert verdict.reasons[0].startswith("the challenger is worse")


def test_one_destroyed_class_is_refused_although_the_accuracy_rises() -> None:
    n = 1000
    ruined = range(3, n, CLASSES)  # all queries of class 3
    improved = [at for at in range(n) if at % CLASSES == 5] + [at for at in range(n) if at % CLASSES == 6]
    verdict = verdict_of(queries(n, improved), queries(n, ruined))
    assert verdict.figures.accuracy is not None
    assert verdict.figures.accuracy.difference == pytest.approx(0.1)
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("class 'class 3' falls from 100.0 to 0.0 % on 100 queries")
    worst = verdict.figures.worst_classes[0]
    assert (worst.label, worst.difference, worst.upper, worst.fallen) == ("class 3", -1, -1, True)
    assert [row.fallen for row in verdict.figures.worst_classes[1:]] == [False] * 4


def test_a_class_may_fall_within_its_noise() -> None:
    lost = [3 + CLASSES * i for i in range(8)]  # 8 of 100 queries of class 3
    gained = [5 + CLASSES * i for i in range(50)]
    assert verdict_of(queries(1000, gained), queries(1000, lost)).passed
    lost = [3 + CLASSES * i for i in range(18)]
    refused = verdict_of(queries(1000, gained), queries(1000, lost))
    assert [reason[:15] for reason in refused.reasons] == ["class 'class 3'"]
    # The limit for one of ten classes: the quantile at 1 - 0.05 / 10 of a binomial distribution.
    assert refused.figures.worst_classes[0].upper == pytest.approx(-0.09, abs=0.005)
    assert verdict_of(queries(1000, gained), queries(1000, lost), GateRules(class_fall=0.1)).passed


def test_classes_with_few_queries_are_not_tested() -> None:
    ruined = range(3, 190, CLASSES)
    verdict = verdict_of(queries(190, []), queries(190, ruined), GateRules(min_queries=1, margin=1, min_difference=-1))
    assert verdict.figures.worst_classes == ()
    assert (verdict.figures.classes_tested, verdict.figures.classes_too_small) == (0, 10)


def set_of(champion: np.ndarray, challenger: np.ndarray, rules: GateRules | None = None) -> Verdict:
    """Compare two models by leave-one-out on the index part."""
    return judge(Evidence(Pair(champion, challenger), names(INDEX_LABELS)), rules or GateRules())


def test_leave_one_out_uses_each_image_as_a_query() -> None:
    verdict = set_of(INDEX, INDEX[:, ::-1])  # another order of the dimensions changes no cosine
    assert verdict.passed
    assert verdict.figures.accuracy is not None
    assert verdict.figures.accuracy.n_queries == 300
    assert "leave-one-out" in verdict.figures.accuracy.measure


def test_no_image_votes_for_itself() -> None:
    shuffled = np.random.default_rng(8).permutation(INDEX_LABELS)
    verdict = judge(Evidence(Pair(INDEX, INDEX), names(shuffled)), GateRules(ks=(1,)))
    assert verdict.figures.accuracy is not None
    assert verdict.figures.accuracy.champion == pytest.approx(1 / CLASSES, abs=0.06)


@pytest.mark.parametrize(
    ("collapsed", "sign"),
    [
        (INDEX + 50, "the spread of the features is 0.000"),
        (INDEX[:, :1] @ np.ones((1, DIMS), np.float32), "RankMe is 0.06"),
        (np.repeat(INDEX[:150], 2, axis=0), "near-identical to another is 100.0%, above 10.0% (the champion has 0.0%)"),
        (INDEX * (np.arange(DIMS) < 10), "the share of dead dimensions is 37.5%, above 25.0%"),
    ],
)
def test_a_collapsed_model_is_refused(collapsed: np.ndarray, sign: str) -> None:
    verdict = set_of(INDEX, collapsed.astype(np.float32))
    assert not verdict.passed
    assert any(reason.startswith("collapse: ") and sign in reason for reason in verdict.reasons), verdict.reasons
    assert set_of(INDEX, INDEX).passed


def test_equal_vectors_of_all_images_break_every_rule() -> None:
    verdict = set_of(INDEX, np.ones_like(INDEX))
    assert sum(reason.startswith("collapse: ") for reason in verdict.reasons) == 4
    assert not set_of(INDEX, np.zeros_like(INDEX)).passed


def test_nan_is_refused_and_a_broken_champion_is_an_error() -> None:
    broken = INDEX.copy()
    broken[7, 2] = np.nan
    verdict = set_of(INDEX, broken)
    assert verdict.reasons == ("1 of 300 images have a feature that is NaN or infinite",)
    assert verdict.figures.accuracy is None
    json.dumps(verdict.as_json(), allow_nan=False)
    with pytest.raises(ValueError, match="a feature of the champion is NaN"):
        set_of(broken, INDEX)


def test_nan_in_a_crop_is_refused() -> None:
    crops = INDEX[:, None].copy()
    crops[3, 0, 0] = np.inf
    verdict = judge(Evidence(Pair(INDEX, INDEX), views=Pair(INDEX[:, None], crops)))
    assert verdict.reasons == ("a feature of a crop is NaN or infinite",)


def test_images_without_labels_are_judged_by_their_crops() -> None:
    rng = np.random.default_rng(5)
    images = rng.normal(size=(400, DIMS)).astype(np.float32)
    good = images[:, None] + 0.1 * rng.normal(size=(400, 2, DIMS)).astype(np.float32)
    bad = images[:, None] + 1.0 * rng.normal(size=(400, 2, DIMS)).astype(np.float32)
    assert judge(Evidence(Pair(images, images), views=Pair(good, good))).passed
    assert judge(Evidence(Pair(images, images), views=Pair(bad, good))).passed
    verdict = judge(Evidence(Pair(images, images), views=Pair(good, bad)))
    assert verdict.reasons[0].startswith("the challenger is worse: images found by crops of themselves")
    assert verdict.figures.worst_classes == ()


def test_the_score_of_crops_is_that_of_training() -> None:
    torch = pytest.importorskip("torch", reason="the definition in training uses torch")
    from training.evaluate.label_free import recall_of_own
    from training.spread import rankme_share as rankme_in_training
    from training.spread import token_spread

    rng = np.random.default_rng(6)
    images = rng.normal(size=(1100, DIMS)).astype(np.float32)
    crops = images[:, None] + rng.normal(size=(1100, 2, DIMS)).astype(np.float32)
    scores = view_scores(Pair(images, images), Pair(crops, crops))
    expected = [recall_of_own(torch.from_numpy(crops[:, v]), torch.from_numpy(images), (1, 5)) for v in range(2)]
    assert scores.most == 4
    assert scores.champion.mean() / scores.most == pytest.approx(np.mean(expected))
    assert 0.1 < np.mean(expected) < 0.9
    assert rankme_share(images) == pytest.approx(rankme_in_training(torch.from_numpy(images)), rel=1e-4)
    assert spread(images) == pytest.approx(float(token_spread(torch.from_numpy(images))), rel=1e-4)


def test_a_model_with_equal_features_finds_nothing() -> None:
    images, crops = np.ones((50, 4), np.float32), np.ones((50, 1, 4), np.float32)
    assert view_scores(Pair(images, images), Pair(crops, crops)).champion.sum() == 0


def test_neighbours_kept_is_the_overlap_of_the_nearest_images() -> None:
    angles = np.array([0, 1, 3, 10, 11, 13])
    circle = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1).astype(np.float32)
    swapped = circle[[3, 1, 2, 0, 4, 5]]  # images 0 and 3 change places
    assert neighbours_kept(circle, circle, 2) == 1
    # Image 1 keeps image 2 of (0, 2), image 2 keeps image 1 of (0, 1), and so on; 0 and 3 keep nothing.
    assert neighbours_kept(circle, swapped, 2) == pytest.approx((0 + 1 + 1 + 0 + 1 + 1) / 12)
    assert neighbours_kept(circle, swapped, 100) == 1
    assert neighbours_kept(circle[:2], circle[:2], 2) is None


def test_live_neighbours_are_information_only() -> None:
    rng = np.random.default_rng(7)
    live = Pair(rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32))
    few = Pair(live.champion[:2], live.challenger[:2])
    verdict = judge(Evidence(Pair(INDEX, INDEX), names(INDEX_LABELS), live={"shop": live, "few": few}))
    assert verdict.passed
    [shown] = verdict.figures.live_neighbours_kept
    assert (shown.collection, shown.n_items) == ("shop", 40)
    assert shown.kept == pytest.approx(10 / 39, abs=0.1)


def test_a_verdict_is_json() -> None:
    verdict = verdict_of(queries(1000, range(100)), queries(1000, range(90)))
    read = json.loads(json.dumps(verdict.as_json(), allow_nan=False))
    assert read["passed"] is True
    assert read["figures"]["accuracy"]["challenger"] == pytest.approx(0.91)
    assert read["rules"]["ks"] == [1, 5, 10, 20]
    assert GateRules.read(read["rules"]) == GateRules()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"margins": 0.1}, "unknown gate rule 'margins'; the rules are margin, min_difference"),
        ({"margin": 2}, "gate rule margin=2.0: must be from 0 to 1"),
        ({"margin": "1"}, "gate rule margin='1': must be a number"),
        ({"margin": float("nan")}, "gate rule margin=nan"),
        ({"margin": True}, "gate rule margin=True: must be a number"),
        ({"min_queries": 0}, "gate rule min_queries=0: must be at least 1"),
        ({"min_queries": 2.5}, "gate rule min_queries=2.5: must be an integer"),
        ({"ks": []}, "gate rule ks=.*: must be one or more numbers"),
        ({"ks": 5}, "gate rule ks=5: must be a list of integers"),
        ({"confidence": 1}, "gate rule confidence=1.0: must be between 0 and 1"),
    ],
)
def test_wrong_rules_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateRules.read(values)


def test_a_retraining_with_wrong_rules_is_refused_before_it_starts() -> None:
    assert RetrainParams(data=["images"], gate_rules={"margin": 0.02}).gate_rules == {"margin": 0.02}
    with pytest.raises(ValueError, match="unknown gate rule 'margins'"):
        RetrainParams(data=["images"], gate_rules={"margins": 0.02})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Pair(INDEX[:1], INDEX[:1]), ["a"]), "1 images"),
        ((Pair(INDEX, INDEX), ["a"]), "1 labels for 300 images"),
        ((Pair(INDEX, INDEX),), "images without labels need views"),
        ((Pair(INDEX, INDEX), names(INDEX_LABELS), Pair(INDEX, INDEX), ["a"]), "1 labels for 300 queries"),
    ],
)
def test_incomplete_evidence_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evidence(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features of the same images"):
        Pair(INDEX, INDEX[1:])
