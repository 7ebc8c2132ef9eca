"""Tests that the numpy reference equals torch in float64, for every kind of backbone."""

import math

import numpy as np
import pytest

from model.engines.numpy_reference import NumpyReference, erf
from tests.model.random_models import BASE, VARIANTS, arrays, random_model, random_pixels

SIZES = [(98, 98), (70, 112)]  # the size of the positions, and another


def test_erf() -> None:
    x = np.concatenate([np.linspace(-8, 8, 50_001), [-np.inf, np.inf, -1e300, 1e-300]])
    np.testing.assert_allclose(erf(x), [math.erf(value) for value in x], rtol=0, atol=1e-12)
    assert np.isnan(erf(np.array([np.nan]))).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_features_equal_torchs(variant: str, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="torch is the reference of the reference: pip install '.[train]'")
    model, pixels = random_model(VARIANTS[variant]).double(), random_pixels(2, size)
    x = torch.from_numpy(pixels).double()
    with torch.no_grad():
        expected, layer = model.forward_features(x), model.get_intermediate_layers(x, n=[1])[0]
        attention = model.get_attention(x)[:, :, 0]
    reference = NumpyReference(arrays(model), model.config)
    features = reference.run(pixels)
    names = ("x_norm_clstoken", "x_norm_patchtokens", "x_norm_regtokens")
    for ours, name in zip(features, names, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected[name].numpy(), rtol=1e-6, atol=1e-6)  # float32 rounds by 1e-7
    extras = reference.run_outputs(pixels, ["attention", "layer.1"])
    np.testing.assert_allclose(extras["attention"], attention.numpy(), rtol=0, atol=1e-6)
    patches = extras["layer.1"][:, 1 + model.config.num_register_tokens :]
    np.testing.assert_allclose(patches, layer.numpy(), rtol=1e-6, atol=1e-6)


def test_a_size_that_does_not_fit_and_a_missing_output() -> None:
    with pytest.raises(ValueError, match=r"input of 98x99 pixels: both sides must be multiples of the patch size 14"):
        NumpyReference({}, BASE).run(random_pixels(1, (98, 99)))
