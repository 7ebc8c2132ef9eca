"""The spread of features is 1 minus the mean cosine of two of them, also where cosines are too coarse."""

import math

import pytest
import torch

from training.spread import token_spread


def test_the_spread_is_its_definition():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [float(a @ b / a.norm() / b.norm()) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    assert float(token_spread(rows)) == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-5)
    assert float(token_spread(torch.eye(4))) == pytest.approx(1)
    assert float(token_spread(torch.ones(4, 3) * torch.arange(1, 5)[:, None])) == pytest.approx(0, abs=1e-12)
    assert float(token_spread(torch.ones(1, 3))) == 0


def test_the_spread_of_almost_equal_rows_is_exact():
    """The float32 cosine of the rows is 1 at this distance."""
    tiny = 1e-5
    rows = torch.tensor([[1.0, 0.0], [1.0, tiny]])
    assert float(token_spread(rows)) == pytest.approx(tiny**2 / 2, rel=1e-2)


def test_the_spread_of_what_is_not_finite_is_not_a_number():
    assert math.isnan(float(token_spread(torch.tensor([[1.0, math.inf], [1.0, 2.0]]))))


def test_the_host_does_not_wait_for_the_spread(monkeypatch):
    rows = torch.randn(4, 3)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waited for the device"))
    token_spread(rows)
