"""The sentinels: what they notice, what they leave alone, what they say, and that a resumed run decides the same."""

import json
import math

import pytest
import torch

from training.watch.measure import KNN, Measure
from training.watch.sentinels import (
    FirstNotFinite,
    Limits,
    Sentinels,
    Verdict,
    difference_error,
    load_replay,
    rankme,
    rankme_share,
    save_replay,
)

LN_K = math.log(64)
MANY = 10**9  # held-out images, so that the accuracy has no noise
HEALTHY = {"dino_over_ln_k": 0.8, "teacher_entropy": 0.6 * LN_K, "rankme_share": 0.4, "token_spread": 0.7}
BAD = {**HEALTHY, "rankme_share": 0.01, "token_spread": 1e-4}


def sentinels(**changes):
    return Sentinels(Limits(**{"n_prototypes": 64, "patience": 3, **changes}))


def run(watch, lines):
    """Verdicts of lines at steps 1, 2, ..., as the loop sees them."""
    found = [watch.check_line(step, line) for step, line in enumerate(lines, 1)]
    return [verdict for verdict in found if verdict]


def test_rankme_on_known_matrices():
    eye = torch.eye(8)
    assert rankme(eye) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.cat((eye, 3 * eye))) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.ones(10, 4) * torch.arange(1, 11)[:, None]) == pytest.approx(1, abs=1e-3)
    singular = torch.tensor([4.0, 2.0, 1.0])
    shares = (singular / 7).tolist()
    basis, _ = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    assert rankme(basis * singular) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-4)
    assert rankme(5 * basis.half()) == pytest.approx(3, rel=1e-2)
    assert rankme_share(torch.cat((eye, eye))) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(4, 4)) == pytest.approx(1, abs=1e-3)  # no direction at all
    assert math.isnan(rankme(torch.full((3, 3), float("inf"))))


def test_a_collapse_is_told_with_its_signs_and_the_action():
    [verdict, *more] = run(sentinels(), [HEALTHY] * 40 + [BAD] * 3)
    assert not more
    assert (verdict.kind, verdict.action, verdict.step, verdict.back_to) == ("collapse", "stop", 43, 40)
    for words in (
        "step 43: collapse: ",
        "3 lines in a row",
        "RankMe",
        "mean cosine of 0.9999",
        "The run stops",
        "Lower lr",
    ):
        assert words in verdict.message


def test_the_limits_reach_the_rule():
    assert run(sentinels(min_rankme_share=0.5), [{**HEALTHY, "teacher_entropy": 0.0}] * 3)[0].step == 3
    assert run(sentinels(), [{**HEALTHY, "teacher_entropy": 0.0}] * 3) == []
    lost = [{**HEALTHY, "measure": 0.6}, *[{**HEALTHY, "measure": 0.1, "dino_over_ln_k": 1.0}] * 3]
    assert run(sentinels(n_measured=300), lost)[0].step == 4
    assert run(sentinels(n_measured=0), lost) == []


def test_fresh_heads_at_ln_k_with_healthy_features_are_no_collapse():
    """Fault T2. The figures are those of the recorded run `continue` of benchmarks/false_alarms.py."""
    fresh = {"dino_over_ln_k": 1.12, "teacher_entropy": 0.89 * LN_K, "rankme_share": 0.94, "token_spread": 0.74}
    frozen = [{**fresh, "lr_backbone": 0.0, "teacher_entropy": LN_K}] * 45
    assert run(sentinels(), frozen + [{**fresh, "lr_backbone": 1e-5}] * 45) == []


def test_a_warning_is_said_once_each_time_it_begins():
    found = run(sentinels(on_collapse="warn"), [HEALTHY] * 40 + [BAD] * 10 + [HEALTHY] + [BAD] * 10)
    assert [(v.step, v.action) for v in found] == [(43, "warn"), (54, "warn")]


def test_rollbacks_after_collapse_lower_the_rate_and_end():
    watch = sentinels(on_collapse="rollback", max_rollbacks=2)
    found = run(watch, [HEALTHY] * 40 + [BAD] * 9)
    assert [(v.step, v.action, v.back_to) for v in found] == [
        (43, "rollback", 40),
        (46, "rollback", 40),
        (49, "stop", 40),
    ]
    assert watch.lr_factor == 0.25
    assert "step 40 or before, and continues with 0.5 of the lr (rollback 1 of 2)" in found[0].message
    assert "stops after 2 rollbacks, the maximum" in found[2].message


def test_not_finite_goes_back_before_the_step_and_passes_over_it():
    watch = sentinels()
    verdict = watch.check_finite(13, {"loss": math.nan, "gradient": 2.0, "head": math.inf}, None)
    assert (verdict.kind, verdict.action, verdict.step, verdict.back_to) == ("not_finite", "rollback", 13, 12)
    assert "step 13: loss is nan, head is inf." in verdict.message
    assert "skips step 13" in verdict.message
    assert [step for step in range(1, 20) if watch.passes_over(step)] == [13]
    assert watch.lr_factor == 1.0
    watch.check_finite(7, {"loss": math.nan}, None)
    watch.check_finite(8, {"loss": math.nan}, None)
    assert watch.check_finite(9, {"loss": math.nan}, None).action == "stop"
    assert watch.state.passed_over == [7, 8, 13]


def test_not_finite_may_just_stop(tmp_path):
    watch = sentinels(on_not_finite="stop")
    verdict = watch.check_finite(13, {"loss": math.nan}, tmp_path / "step_13")
    assert verdict.action == "stop"
    assert f"The batch is stored in {tmp_path / 'step_13'}" in verdict.message
    assert not watch.passes_over(13)


def test_the_knn_guard_measures_from_the_best():
    watch = sentinels(measure_margin=5)
    for step, accuracy in [(0, 0.60), (10, 0.56), (20, 0.70), (30, 0.655)]:
        assert watch.check_measure(step, KNN, accuracy, MANY) is None
    verdict = watch.check_measure(40, KNN, 0.62, MANY)
    assert (verdict.kind, verdict.action, verdict.step, verdict.back_to) == ("measure", "stop", 40, 20)
    assert f"{KNN.words} is 62.0%, down from 70.0% at step 20" in verdict.message


def test_the_knn_guard_warns_once_and_again_after_a_recovery():
    watch = sentinels(on_measure="warn")
    found = [watch.check_measure(step, KNN, k, MANY) for step, k in enumerate([0.6, 0.5, 0.4, 0.59, 0.5])]
    assert [v.step if v else None for v in found] == [None, 1, None, None, 4]


def test_a_rollback_of_the_knn_guard_lowers_the_rate():
    watch = sentinels(on_measure="rollback", rollback_lr_factor=0.1)
    watch.check_measure(0, KNN, 0.6, MANY)
    assert watch.check_measure(10, KNN, 0.1, MANY) == Verdict(
        "measure",
        "rollback",
        10,
        0,
        f"step 10: {KNN.words} is 10.0%, down from 60.0% at step 0: it lost more than 5 points and the noise of "
        "1000000000 images. The run goes back to step 0 or before, and continues with 0.1 of the lr (rollback 1 of 3). "
        "A lower lr, a longer freeze_backbone or a smaller layer_decay preserve more of the initial weights.",
    )
    assert watch.lr_factor == 0.1


def test_a_resumed_run_decides_the_same():
    def lines():
        for step in range(1, 91):
            bad = 50 <= step < 60 or 70 <= step < 71 or step > 80
            yield step, BAD if bad else HEALTHY, 0.6 if step < 65 else 0.5

    settings = {"on_collapse": "rollback", "on_measure": "warn", "max_rollbacks": 2}
    whole, broken = sentinels(**settings), sentinels(**settings)
    for step, line, knn in lines():
        expected = (whole.check_line(step, line), whole.check_measure(step, KNN, knn, MANY))
        resumed = sentinels(**settings)
        resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))  # killed after each step
        broken = resumed
        assert (broken.check_line(step, line), broken.check_measure(step, KNN, knn, MANY)) == expected
    assert whole.state_dict() == broken.state_dict()
    assert whole.state.rollbacks == 2


class KilledError(Exception):
    """Stands for kill -9."""


def toy_run(disk, total, kill_at):
    """A loop as the real one uses the sentinels: one number as weight, a line each 5 steps, a checkpoint each 4.

    Step 13 gives NaN; k-NN falls after step 30 as long as the rate is whole. `disk` holds checkpoints by step.
    """
    watch, bad = sentinels(on_measure="rollback"), FirstNotFinite(torch.device("cpu"))
    step, weight = 0, torch.zeros(())
    if disk:
        step = max(disk)
        weight, saved = disk[step]
        watch.load_state_dict(json.loads(saved))
    while step < total:
        done = step + 1
        if done == kill_at:
            raise KilledError
        if not watch.passes_over(done):
            loss = torch.tensor(math.nan if done == 13 else done * 0.1)
            weight = weight + watch.lr_factor * loss
            bad.note(done, {"loss": loss})
        step = done
        verdict = None
        if done % 5 == 0 or done % 4 == 0:  # before a line and before a save
            found = bad.read()
            verdict = watch.check_finite(*found, None) if found else None
        if verdict is None and done % 10 == 0:
            verdict = watch.check_measure(done, KNN, 0.2 if done > 30 and watch.lr_factor == 1 else 0.6, MANY)
        if verdict is not None:
            assert verdict.action == "rollback"
            step = max((s for s in disk if s <= verdict.back_to), default=0)
            for later in [s for s in disk if s > step]:
                del disk[later]
            weight = disk[step][0] if step else torch.zeros(())
            bad.clear()
        elif done % 4 == 0:
            disk[done] = (weight, json.dumps(watch.state_dict()))
    return weight, watch.state_dict()


def test_a_run_with_rollbacks_ends_the_same_wherever_it_is_killed():
    expected, state = toy_run({}, 50, kill_at=None)
    assert state["passed_over"] == [13]
    assert state["lr_factor"] == 0.5
    plain = sum(step * 0.1 for step in range(1, 29) if step != 13) + sum(step * 0.05 for step in range(29, 51))
    assert float(expected) == pytest.approx(plain, rel=1e-5)  # back to step 28, the newest checkpoint before 30
    for kill_at in range(1, 51):
        disk = {}
        with pytest.raises(KilledError):
            toy_run(disk, 50, kill_at)
        weight, found = toy_run(disk, 50, kill_at=None)
        assert torch.equal(weight, expected), kill_at
        assert found == state, kill_at


def test_a_saved_state_shares_nothing_with_the_running_one():
    watch = sentinels()
    saved = watch.state_dict()
    watch.check_finite(3, {"loss": math.nan}, None)
    assert saved["passed_over"] == []
    other = sentinels()
    other.load_state_dict(saved)
    other.check_finite(4, {"loss": math.nan}, None)
    assert saved["passed_over"] == []


def test_the_first_step_that_is_not_finite_is_noted_without_waiting(monkeypatch):
    seen = FirstNotFinite(torch.device("cpu"))
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waited for the device"))
    for step, loss in enumerate([1.0, 2.0, math.nan, 4.0, math.inf], 1):
        seen.note(step, {"loss": torch.tensor(loss), "gradient": torch.tensor([step * 10.0])})
    monkeypatch.undo()
    step, figures = seen.read()
    assert (step, figures["gradient"], math.isnan(figures["loss"])) == (3, 30.0, True)
    assert int(seen.step) == 3
    seen.clear()
    assert seen.read() is None
    seen.note(6, {"loss": torch.tensor(1.0), "gradient": torch.tensor(-math.inf)})
    assert seen.read() == (6, {"loss": 1.0, "gradient": -math.inf})


def test_a_kept_batch_comes_back(tmp_path):
    crops = {
        "globals_": torch.randn(4, 3, 8, 8),
        "masks": torch.tensor([[True, False]]),
        "half": torch.ones(2).bfloat16(),
    }
    terms = {"loss": math.nan, "dino": 1.5, "koleo": math.inf}
    path = save_replay(tmp_path / "replays", 812, ["a/b.jpg", "ü.png"], crops, terms, facts={"indices": [3, 5]})
    found = load_replay(path)
    assert (found.step, found.names) == (812, ["a/b.jpg", "ü.png"])
    assert all(torch.equal(found.crops[key], crops[key]) for key in crops)
    assert math.isnan(found.terms["loss"])
    assert (found.terms["dino"], found.terms["koleo"]) == (1.5, math.inf)
    assert json.loads(path.with_suffix(".json").read_text())["indices"] == [3, 5]


def test_only_the_latest_replays_are_kept(tmp_path):
    for step in (5, 40, 300, 2000):
        save_replay(tmp_path, step, ["x"], {"x": torch.zeros(1)}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000300.json",
        "step_00000300.safetensors",
        "step_00002000.json",
        "step_00002000.safetensors",
    ]


def test_what_is_no_replay_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_replay(tmp_path / "missing.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a batch stored"):
        load_replay(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("n_images", "stops"), [(4, False), (30, False), (300, True)])
def test_a_fall_within_the_noise_of_few_images_stops_nothing(n_images, stops):
    """60 % of 30 images have a standard error of 9 points; of 300, 3 points."""
    watch = sentinels(measure_margin=5)
    assert watch.check_measure(0, KNN, 0.6, n_images) is None
    assert (watch.check_measure(10, KNN, 0.4, n_images) is not None) == stops


def test_the_error_of_a_difference_is_that_of_two_shares():
    p, n = (0.5 * 98 + 1) / 100, 100
    assert difference_error(0.5, 0.5, 98) == pytest.approx(math.sqrt(2 * p * (1 - p) / n))
    assert difference_error(1.0, 1.0, 8) > 0.1


def test_a_run_is_stale_after_evaluations_without_a_better_value():
    watch = sentinels(patience_evaluations=2, on_measure="warn")
    stale = []
    for step, value in enumerate([0.5, 0.6, 0.6, 0.7, 0.7, 0.65]):
        watch.check_measure(step, KNN, value, MANY)
        stale.append(watch.is_stale)
    assert stale == [False, False, False, False, False, True]
    assert (watch.state.first, watch.state.best, watch.state.best_step) == (0.5, 0.7, 4)


def test_another_measure_begins_again():
    watch = sentinels()
    watch.check_measure(0, KNN, 0.9, MANY)
    assert watch.check_measure(10, Measure("other", "another measure"), 0.2, MANY) is None
    assert (watch.state.first, watch.state.best, watch.state.best_step) == (0.2, 0.2, 10)


def test_a_higher_value_of_narrower_features_is_not_the_best():
    watch = sentinels(on_measure="warn")
    for step, value, rank in [(0, 0.5, 0.60), (10, 0.6, 0.55), (20, 0.9, 0.53), (30, 0.7, 0.58)]:
        assert watch.check_measure(step, KNN, value, MANY, rank) is None
    assert (watch.state.best, watch.state.best_step) == (0.7, 30)
    watch.check_measure(40, KNN, 0.8, MANY, 0.1)
    assert (watch.state.best_step, watch.state.since_best) == (30, 1)


def test_the_checks_for_collapse_use_retrieval_rather_than_the_measure():
    watch = sentinels(on_measure="warn")
    watch.check_measure(0, KNN, 0.5, MANY, None, 0.3)
    assert (watch.state.best, watch.state.latest) == (0.5, 0.3)
    watch.check_measure(10, KNN, 0.6, MANY)
    assert (watch.state.best, watch.state.latest) == (0.6, 0.6)


def test_the_error_of_a_value_below_zero_is_that_of_zero():
    """View matching can be below 0, and a run ended with a math error."""
    assert difference_error(-0.5, 0.2, 60) == difference_error(0.0, 0.2, 60) > 0
