"""The mix of two sets of weights is the plain weighted sum, and the choice of a share never prefers a worse figure."""

import math

import pytest
import torch

from training.interpolate import SHARES, best_share, mix


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in (("a", (3, 4)), ("b.c", (5,)))}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mix_is_the_plain_weighted_sum(share, dtype):
    initial, final = weights(0, dtype), weights(1, dtype)
    mixed = mix(initial, final, share)
    for name in initial:
        expected = (1 - share) * initial[name].double() + share * final[name].double()
        assert mixed[name].dtype == dtype
        torch.testing.assert_close(mixed[name], expected.to(dtype))


def test_the_ends_are_exact_copies():
    initial, final = weights(0), weights(1)
    for share, source in ((0, initial), (1, final)):
        mixed = mix(initial, final, share)
        assert all(torch.equal(mixed[name], source[name]) for name in source)
        mixed["a"].zero_()
        assert source["a"].any()


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=f"share={share} must be 0"):
        mix(weights(0), weights(1), share)


def test_weights_of_different_networks_are_refused():
    initial = weights(0)
    with pytest.raises(ValueError, match=r"differ in \['d'\]"):
        mix(initial, initial | {"d": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match=r"a has shape \[3, 4\] and \[4\]"):
        mix(initial, initial | {"a": torch.zeros(4)}, 0.5)
    whole = {"n": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"n has type torch\.int64"):
        mix(whole, whole, 0.5)


@pytest.mark.parametrize(
    ("measures", "margin", "expected"),
    [
        ({0: 0.5, 0.5: 0.6, 1: 0.55}, 0, 0.5),
        ({0: 0.5, 0.5: 0.4, 1: 0.3}, 0, 0),
        ({0: 0.5, 0.5: 0.5, 1: 0.5}, 0, 0),  # a tie keeps the start
        ({1: 0.6, 0.5: 0.6, 0: 0.5}, 0, 0.5),  # a tie keeps the smaller change
        ({0: 0.5, 0.5: 0.52, 1: 0.53}, 0.05, 0),
        ({0: 0.5, 0.5: 0.52, 1: 0.56}, 0.05, 1),
        ({0: -3.0, 1: -2.0}, 0, 1),
    ],
)
def test_the_best_share_is_above_the_start_by_more_than_the_margin(measures, margin, expected):
    assert best_share(measures, margin) == expected


def test_a_choice_needs_the_start_and_finite_figures():
    with pytest.raises(ValueError, match=r"shares \[0.5, 1\] lack the start"):
        best_share({1: 0.5, 0.5: 0.4})
    with pytest.raises(ValueError, match="the measure of share 1 is nan"):
        best_share({0: 0.5, 1: math.nan})
