"""One step: its schedules act each at its own step, its loss is a table of terms, fp16's loss scale adapts."""

import math

import numpy as np
import pytest
import torch

from tests.training.tiny import ALONE, TINY
from training import step as steps
from training.config import TrainConfig, loss_names
from training.data.crops import make_micros
from training.pages.report import write_report
from training.schedules import cosine, linear_then_constant
from training.setup import LOSS_SCALE, make_setup
from training.step import SCALE_GROWS_AFTER, adapt_scale, train_step
from training.wiring import crop_settings, make_schedules, step_settings

YES, NO = torch.tensor(True), torch.tensor(False)


def config(**changes):
    return TrainConfig.model_validate({"data": "-", "out": "-", **TINY, **changes})


def micros_of(settings, step=0, total=9):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (settings.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return make_micros(crop_settings(settings), ALONE, pixels, torch.ones(settings.batch_size), step, total)


# Schedules


def test_a_cosine_rises_from_zero_to_its_base_and_falls_to_its_end():
    found = cosine(1.0, 0.1, 10, warmup=4)
    fall = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert found.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, *fall])
    assert cosine(0.5, 1.0, 4).tolist() == pytest.approx(
        [0.5, *(1 - 0.25 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))]
    )
    assert cosine(2.0, 0.0, 3, warmup=3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="warmup of 4 steps does not fit into a run of 3"):
        cosine(1.0, 0.0, 3, warmup=4)


def test_a_line_that_stays_reaches_its_end_with_the_warm_up():
    assert linear_then_constant(1.0, 3.0, 6, 3).tolist() == [1, 2, 3, 3, 3, 3]
    assert linear_then_constant(1.0, 3.0, 3, 5).tolist() == [1, 1.5, 2]  # the run ends within it
    assert linear_then_constant(1.0, 3.0, 2, 0).tolist() == [3, 3]


def test_the_schedules_of_a_run_are_the_settings():
    given = config(
        lr=0.04,
        min_lr=1e-4,
        batch_size=256,
        warmup=0.2,
        weight_decay=(0.1, 0.5),
        momentum=(0.9, 1.0),
        teacher_temp=(0.03, 0.06),
        teacher_temp_warmup=0.4,
    )
    found = make_schedules(given, 50)
    assert found.lr["head"].tolist() == pytest.approx(
        cosine(0.04 * math.sqrt(256 / 1024), 1e-4, 50, warmup=10).tolist()
    )
    assert found.lr["backbone"].tolist() == found.lr["head"].tolist()
    assert found.weight_decay.tolist() == cosine(0.1, 0.5, 50).tolist()
    assert found.momentum.tolist() == cosine(0.9, 1.0, 50).tolist()
    assert found.teacher_temp.tolist() == linear_then_constant(0.03, 0.06, 50, 20).tolist()


@pytest.mark.parametrize(("freeze", "frozen"), [(0.0, 0), (0.1, 5), (0.5, 25), (1.0, 50)])
def test_the_last_layer_is_frozen_for_its_share_of_the_steps_and_no_longer(freeze, frozen):
    lr = make_schedules(config(freeze_last_layer=freeze, warmup=0.0), 50).lr
    assert (lr["last_layer"][:frozen] == 0).all()
    assert (lr["last_layer"][frozen:] == lr["head"][frozen:]).all()
    assert (lr["head"] > 0).all()


@pytest.mark.parametrize(
    ("freeze", "warmup", "begin", "peak"), [(0.2, 0.3, 10, 5), (0.4, 0.1, 20, 5), (0.0, 0.2, 0, 10)]
)
def test_the_heads_have_warmed_up_half_way_through_the_backbones_rest(freeze, warmup, begin, peak):
    lr = make_schedules(config(freeze_backbone=freeze, warmup=warmup), 50).lr
    assert (lr["backbone"][:begin] == 0).all()
    assert (lr["backbone"][begin + 1 :] > 0).all()
    assert lr["head"].argmax() == peak - 1
    assert lr["backbone"].argmax() == begin + int(warmup * 50) - 1


@pytest.mark.parametrize("lr_mult", [None, 0.5])
def test_a_last_phase_begins_where_its_crops_do(lr_mult):
    last = {"share": 0.3, "global_size": 42, "local_size": 28, "lr_mult": lr_mult}
    plain, phased = make_schedules(config(), 10), make_schedules(config(last_phase=last), 10)
    for part, rates in plain.lr.items():
        again = rates[7:] if lr_mult is None else cosine(rates.max() / 2, 1e-6, 3)
        assert phased.lr[part].tolist() == pytest.approx([*rates[:7], *again])
    again = plain.momentum[7:] if lr_mult is None else cosine(*config().momentum, 3)
    assert phased.momentum.tolist() == pytest.approx([*plain.momentum[:7], *again])


# A step


def test_a_step_takes_its_own_values_of_every_schedule(monkeypatch):
    given = config()
    setup, schedules, at = make_setup(given, ALONE), make_schedules(given, 9), 6
    seen = {}

    def noted(name, function, *which):
        def call(*args):
            seen[name] = [args[i] for i in which]
            return function(*args)

        monkeypatch.setattr(steps, name, call)

    noted("set_schedule", steps.set_schedule, 1, 2)
    noted("teacher_targets", steps.teacher_targets, 3)
    noted("update_teacher", steps.update_teacher, 2)
    train_step(step_settings(given), setup, schedules, micros_of(given), at, lr_factor=0.25)
    for values in (*schedules.lr.values(), schedules.weight_decay, schedules.momentum, schedules.teacher_temp):
        assert len(np.unique(values[5:8])) == 3 or values is schedules.teacher_temp
    assert seen["set_schedule"] == [
        {part: pytest.approx(rates[at] / 4) for part, rates in schedules.lr.items()},
        schedules.weight_decay[at],
    ]
    assert seen["update_teacher"] == [schedules.momentum[at]]
    assert seen["teacher_targets"] == [schedules.teacher_temp[at]]


def test_the_teachers_temperature_moves_with_the_step(monkeypatch):
    given = config(teacher_temp_warmup=1.0)
    setup, schedules = make_setup(given, ALONE), make_schedules(given, 9)
    temps, targets = [], steps.teacher_targets
    monkeypatch.setattr(steps, "teacher_targets", lambda *args: temps.append(args[3]) or targets(*args))
    for at in (0, 4, 8):
        train_step(step_settings(given), setup, schedules, micros_of(given), at)
    assert temps == pytest.approx([0.04, 0.055, 0.07])


def test_the_loss_is_the_weighted_sum_of_its_terms():
    given = config(dino_weight=0.7, ibot_weight=1.9, koleo_weight=0.3)
    terms, _ = train_step(step_settings(given), make_setup(given, ALONE), make_schedules(given, 9), micros_of(given), 0)
    parts = 0.7 * terms["dino"] + 1.9 * terms["ibot"] + 0.3 * terms["koleo"]
    torch.testing.assert_close(terms["loss"], parts)
    assert float(terms["ibot"]) > 0
    assert float(terms["koleo"]) != 0


def test_drop_path_draws_anew_in_each_step_and_by_the_seed():
    seeds = set()
    for seed, at in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        given = config(seed=seed)
        train_step(step_settings(given), make_setup(given, ALONE), make_schedules(given, 9), micros_of(given), at)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 5


def test_the_centre_moves_by_its_momentum_after_it_was_used_and_only_to_what_is_finite():
    given = config(centering="softmax", center_momentum=0.75)
    setup, micros = make_setup(given, ALONE), micros_of(given)
    logits = setup.parts.teacher(micros[0].globals_, None, None, micros[0].selected)
    first = steps.teacher_targets(step_settings(given), setup, micros, 0.05)[0]
    torch.testing.assert_close(first.cls.probs().flatten(0, 1), (logits.global_logits / 0.05).softmax(dim=-1))
    for head, of_head in (("dino", logits.global_logits), ("ibot", logits.patch_logits)):
        torch.testing.assert_close(setup.parts.buffers[head], 0.25 * of_head.mean(dim=0, keepdim=True))
    before = {head: center.clone() for head, center in setup.parts.buffers.items()}
    micros[0].globals_[0] = math.nan
    steps.teacher_targets(step_settings(given), setup, micros, 0.05)
    assert torch.equal(setup.parts.buffers["dino"], before["dino"])


# fp16


def scale_buffers(scale=2.0**10, good=0.0):
    return {"loss_scale": torch.tensor(scale), "good_steps": torch.tensor(good)}


def test_the_loss_scale_is_halved_by_a_step_that_is_not_finite_and_the_count_begins_again():
    buffers = scale_buffers(good=1500.0)
    for expected in (2.0**9, 2.0**8):
        adapt_scale(buffers, NO)
        assert (float(buffers["loss_scale"]), float(buffers["good_steps"])) == (expected, 0)
    adapt_scale(buffers, YES)
    assert (float(buffers["loss_scale"]), float(buffers["good_steps"])) == (2.0**8, 1)


def test_the_loss_scale_is_doubled_after_two_thousand_good_steps_in_a_row():
    assert SCALE_GROWS_AFTER == 2000
    buffers = scale_buffers()
    for number in range(1, 4001):
        adapt_scale(buffers, YES)
        if number in (1999, 2000, 3999, 4000):
            assert float(buffers["loss_scale"]) == 2.0 ** (10 + number // 2000), number
    buffers = scale_buffers(good=1998.0)
    for finite in (YES, NO, YES):
        adapt_scale(buffers, finite)
    assert float(buffers["loss_scale"]) == 2.0**9


def test_a_step_in_fp16_moves_the_weights_as_one_in_float32_and_falls_back_when_it_overflows():
    given = config(precision="fp16", drop_path=0.0)
    setup, schedules = make_setup(given, ALONE), make_schedules(given, 9)
    assert float(setup.parts.buffers["loss_scale"]) == LOSS_SCALE == 2.0**16
    setup.parts.buffers["loss_scale"].fill_(2.0)  # so small a network has large gradients
    plain = make_setup(config(drop_path=0.0), ALONE)
    norms = []
    for made in (setup, plain):
        terms, _ = train_step(step_settings(given), made, schedules, micros_of(given), 5)
        assert terms["finite"] == 1
        norms.append(float(terms["grad_norm_backbone"]))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)  # measured without the scale
    setup.parts.buffers["loss_scale"].fill_(2.0**100)
    before = [parameter.clone() for parameter in setup.parts.student.parameters()]
    terms, _ = train_step(step_settings(given), setup, schedules, micros_of(given), 6)
    assert terms["finite"] == 0
    assert float(setup.parts.buffers["loss_scale"]) == 2.0**99
    assert all(torch.equal(a, b) for a, b in zip(before, setup.parts.student.parameters(), strict=True))


# The table of losses: every weight has a term and a curve, and a further loss is an entry and a weight.


def figures_of(settings):
    setup = make_setup(settings, ALONE)
    terms, _ = train_step(step_settings(settings), setup, make_schedules(settings, 9), micros_of(settings), 0)
    return {name: float(value) for name, value in terms.items()}


def test_every_weight_has_a_term():
    assert loss_names() == list(steps.TERMS)
    assert config(ibot_weight=0.25).loss_weights == {"dino": 1.0, "ibot": 0.25, "koleo": 0.1}


def test_the_loss_is_the_weighted_sum_of_the_table(monkeypatch):
    weights = {"dino": 0.5, "ibot": 2.0, "koleo": 0.3}
    figures = figures_of(config(**{f"{name}_weight": weight for name, weight in weights.items()}))
    assert figures["loss"] == pytest.approx(sum(weight * figures[name] for name, weight in weights.items()), rel=1e-5)

    monkeypatch.setitem(steps.TERMS, "length", lambda micro: micro.output.cls.float().norm(dim=1).mean())
    monkeypatch.setattr(TrainConfig, "loss_weights", weights | {"length": 0.7})
    more = figures_of(config())
    assert more["length"] > 0
    assert more["loss"] == pytest.approx(figures["loss"] + 0.7 * more["length"], rel=1e-5)


def test_a_loss_without_weight_is_not_computed_but_for_dinos(monkeypatch):
    monkeypatch.setitem(steps.TERMS, "koleo", lambda micro: pytest.fail("computed"))
    figures = figures_of(config(dino_weight=0.0, koleo_weight=0.0))
    assert (figures["koleo"], figures["dino"] > 0) == (0.0, True)
    assert figures["loss"] == pytest.approx(figures["ibot"], rel=1e-6)


def test_every_loss_is_a_curve_of_the_report(tmp_path):
    lines = [f'{{"step": {n}, "loss": 1.0, "dino": 2.0, "ibot": 3.0, "koleo": 0.5}}\n' for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = write_report(tmp_path).read_text()
    losses = page[page.index("Losses") : page.index("</figure>", page.index("Losses"))]
    assert all(name in losses for name in loss_names())
