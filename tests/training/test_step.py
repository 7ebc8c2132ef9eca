"""The table of losses: every weight has a term and a curve, and a further loss is an entry and a weight."""

import pytest
import torch

from tests.training.tiny import ALONE, TINY
from training import step
from training.config import TrainConfig, loss_names
from training.data.crops import make_micros
from training.pages.report import write_report
from training.setup import make_setup
from training.wiring import crop_settings, make_schedules, step_settings


def config(**changes):
    return TrainConfig.model_validate({"data": "-", "out": "-", **TINY, **changes})


def figures_of(settings):
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    micros = make_micros(crop_settings(settings), ALONE, pixels, torch.ones(8), 0, 9)
    setup = make_setup(settings, ALONE)
    terms, _ = step.train_step(step_settings(settings), setup, make_schedules(settings, 9), micros, 0)
    return {name: float(value) for name, value in terms.items()}


def test_every_weight_has_a_term():
    assert loss_names() == list(step.TERMS)
    assert config(ibot_weight=0.25).loss_weights == {"dino": 1.0, "ibot": 0.25, "koleo": 0.1}


def test_the_loss_is_the_weighted_sum_of_the_table(monkeypatch):
    weights = {"dino": 0.5, "ibot": 2.0, "koleo": 0.3}
    figures = figures_of(config(**{f"{name}_weight": weight for name, weight in weights.items()}))
    assert figures["loss"] == pytest.approx(sum(weight * figures[name] for name, weight in weights.items()), rel=1e-5)

    monkeypatch.setitem(step.TERMS, "length", lambda micro: micro.output.cls.float().norm(dim=1).mean())
    monkeypatch.setattr(TrainConfig, "loss_weights", weights | {"length": 0.7})
    more = figures_of(config())
    assert more["length"] > 0
    assert more["loss"] == pytest.approx(figures["loss"] + 0.7 * more["length"], rel=1e-5)


def test_a_loss_without_weight_is_not_computed_but_for_dinos(monkeypatch):
    monkeypatch.setitem(step.TERMS, "koleo", lambda micro: pytest.fail("computed"))
    figures = figures_of(config(dino_weight=0.0, koleo_weight=0.0))
    assert (figures["koleo"], figures["dino"] > 0) == (0.0, True)
    assert figures["loss"] == pytest.approx(figures["ibot"], rel=1e-6)


def test_every_loss_is_a_curve_of_the_report(tmp_path):
    lines = [f'{{"step": {n}, "loss": 1.0, "dino": 2.0, "ibot": 3.0, "koleo": 0.5}}\n' for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = write_report(tmp_path).read_text()
    losses = page[page.index("Losses") : page.index("</figure>", page.index("Losses"))]
    assert all(name in losses for name in loss_names())
