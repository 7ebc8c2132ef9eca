"""Whitening: the network stays the same up to a rotation, and its cosines are those of whitening by a matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.config import ViTConfig
from model.vit import DinoVisionTransformer
from training.whiten import whiten

D = 24


def make_model(**changes):
    """Random weights, norms and LayerScale too: ones and zeros would hide what is not carried over."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(ViTConfig(**{"embed_dim": D, "depth": 2, "num_heads": 2, "img_size": 28, **changes}))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "gamma" in name or ("norm" in name and "weight" in name) else 0.0, 0.2)
    return model.eval()


def class_tokens(model, n=200):
    """Of blurred noise: a few directions hold most of the variance."""
    pixels = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad():
        return model(F.interpolate(pixels, (28, 28), mode="bilinear"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"ffn": "swiglu"}, {"num_register_tokens": 4, "pos_embed_rule": "antialias"}, {"layerscale_init": None}],
    ids=["mlp", "swiglu", "registers", "no-layerscale"],
)
def test_the_network_is_the_same_up_to_a_rotation(changes):
    model = make_model(**changes)
    x = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(2))  # another grid: positions are resized
    masks = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        before = model.forward_features(x, masks)["x_prenorm"].double()
        rotation = whiten(model, class_tokens(model), 0.01)
        after = model.forward_features(x, masks)["x_prenorm"].double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(D, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(after, before @ rotation.T, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)


def test_the_cosines_are_those_of_whitening_by_a_matrix():
    model, shrinkage = make_model(), 0.02
    cls = class_tokens(model)
    plain = (cls.double() - model.norm.bias.double()) / model.norm.weight.double()
    centred = plain - plain.mean(dim=0)
    variance, directions = torch.linalg.eigh(torch.cov(plain.T))
    kept = (directions[:, 1:] / (variance[1:] + shrinkage * variance[1:].mean()).sqrt()).detach()
    expected = F.normalize(centred @ kept, dim=1)
    whiten(model, cls, shrinkage)
    found = class_tokens(model).double()
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(D, dtype=torch.float64), atol=1e-4, rtol=0)
    found = F.normalize(found, dim=1)
    before = F.normalize(cls.double(), dim=1)
    off = (found @ found.T - expected @ expected.T).detach().abs()
    assert off.mean() < 0.02  # the gains are met to within their spacing
    assert (before @ before.T - expected @ expected.T).detach().abs().mean() > 0.2  # it was far from that


@pytest.mark.parametrize("spread", [0.05, 20.0])
def test_shrinkage_is_a_share_of_the_variance_there_is(spread):
    """The class tokens say how large variances are; the wanted gains follow them in proportion."""
    model, other = make_model(), make_model()
    cls = class_tokens(model)
    mean = cls.mean(dim=0)
    rotation = whiten(model, cls, 0.3)
    scaled = whiten(other, mean + spread * (cls - mean), 0.3)
    torch.testing.assert_close(other.norm.weight * spread, model.norm.weight, rtol=1e-3, atol=0)
    torch.testing.assert_close(scaled.abs(), rotation.abs(), atol=1e-3, rtol=0)


def test_whitening_twice_changes_little():
    model = make_model()
    whiten(model, class_tokens(model), 0.01)
    once = F.normalize(class_tokens(model), dim=1)
    whiten(model, class_tokens(model), 0.01)
    twice = F.normalize(class_tokens(model), dim=1)
    assert (once @ once.T - twice @ twice.T).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("shrinkage", "n", "message"), [(0.0, 200, "shrinkage.*0.0"), (float("nan"), 200, "nan"), (0.1, 1, "two images")]
)
def test_impossible_input_is_refused(shrinkage, n, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        whiten(model, class_tokens(model, n), shrinkage)


def test_a_gain_of_zero_is_refused():
    model = make_model()
    cls = class_tokens(model)
    model.norm.weight.data[3] = 0
    with pytest.raises(ValueError, match="gain of the last norm is 0"):
        whiten(model, cls, 0.1)
