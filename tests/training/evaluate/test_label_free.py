"""Measures that need no classes: each is its definition, and a collapsed network gets the worst value."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.evaluate.label_free import (
    measure_label_free,
    query_crops,
    query_features,
    recall_of_own,
)

VIT = ViTConfig(embed_dim=16, depth=1, num_heads=2, img_size=28, pos_embed_rule="antialias", layerscale_init=1.0)
SPEC = PreprocessSpec(resize=32, crop=28, patch_size=14)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = DinoVisionTransformer(VIT).eval()
    with torch.no_grad():  # the class token of a random network hardly depends on the image
        network.patch_embed.proj.weight.mul_(20)
    return network


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{number:02}.png" for number in range(24)]
    for path in paths:
        colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((40, 32), Image.Resampling.NEAREST).save(path)
    return paths


def test_recall_is_its_definition():
    draw = torch.Generator().manual_seed(0)
    queries, database = torch.randn(9, 4, generator=draw), torch.randn(9, 4, generator=draw)
    places = []
    for number, query in enumerate(queries):
        cosines = [float(query @ row / query.norm() / row.norm()) for row in database]
        places.append(sorted(cosines, reverse=True).index(cosines[number]))
    expected = [sum(place < k for place in places) / 9 for k in (1, 5)]
    assert recall_of_own(queries, database, (1, 5)) == pytest.approx(expected)
    assert 0 < expected[0] < expected[1] < 1  # otherwise this test would compare nothing


def test_a_network_that_maps_all_images_to_one_vector_finds_nothing():
    one = torch.ones(6, 4)
    assert recall_of_own(one, one, (1, 5)) == [0.0, 0.0]


def test_a_network_that_sees_colours_finds_images_and_a_collapsed_one_does_not(network, images):
    found = measure_label_free(network, images, SPEC)
    assert found.n_images == 24
    assert found.retrieval_1 > 3 / 24
    assert found.retrieval_1 <= found.retrieval_5 < 1
    assert found.spread > 1e-4
    assert measure_label_free(network, images, SPEC) == found
    with torch.no_grad():
        network.norm.weight.zero_()
        network.norm.bias.fill_(1.0)
    collapsed = measure_label_free(network, images, SPEC)
    assert (collapsed.retrieval_1, collapsed.retrieval_5) == (0.0, 0.0)
    assert collapsed.view_certainty == pytest.approx(0, abs=1e-6)
    assert 0.01 < found.view_certainty < 1
    assert collapsed.spread == pytest.approx(0, abs=1e-9)
    assert collapsed.rankme_share == pytest.approx(1 / 16, rel=1e-2)


def test_the_same_crops_are_made_in_each_call_and_others_for_another_seed(network, images):
    state = torch.get_rng_state()
    first = query_features(network, images, query_crops(SPEC))
    assert torch.equal(first, query_features(network, images, query_crops(SPEC), workers=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, query_features(network, images, query_crops(SPEC, seed=1)))
    alone = query_features(network, images[:3], query_crops(SPEC))  # a crop does not depend on later images
    assert torch.allclose(alone, first[:3], atol=1e-5)


def test_the_network_keeps_its_mode_and_the_number_of_images_is_bounded(network, images):
    network.train()
    assert measure_label_free(network, images, SPEC, most=10).n_images == 8  # every third
    assert network.training


def test_unreadable_images_are_left_out(network, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    assert measure_label_free(network, [images[0], broken, *images[1:4]], SPEC).n_images == 4
    with pytest.raises(ValueError, match="1 of 2 held-out images can be read"):
        measure_label_free(network, [images[0], broken], SPEC)


def test_a_weight_that_is_not_finite_is_an_error(network, images):
    with torch.no_grad():
        network.blocks[0].mlp.fc1.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinite: the model.s tensor blocks\.0\.mlp\.fc1\.weight"):
        measure_label_free(network, images, SPEC)


def test_an_input_of_any_size_is_refused(network, images):
    with pytest.raises(ValueError, match="crop=None"):
        measure_label_free(network, images, PreprocessSpec(resize=32, crop=None, patch_size=14))
