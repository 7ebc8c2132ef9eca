"""Features: order, blocks, broken files, boxes, and a cache that notices what changed."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.all_features import extract_features
from model.config import ViTConfig
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from training.data.dataset import read_photo
from training.evaluate.features import (
    FeatureCache,
    ForwardSettings,
    cached_features,
    compute_features,
    in_order,
    read_pixels,
)

TINY = ViTConfig(embed_dim=16, depth=3, num_heads=2, img_size=28, pos_embed_rule="antialias")
SPEC = PreprocessSpec(resize=28, crop=None)


@pytest.fixture
def model():
    """Weights far from those at the start, where all blocks give nearly the same."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (30, 30 + 12 * (i % 3), 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return sorted(tmp_path.glob("*.png"))


def test_class_tokens_of_the_last_blocks_in_the_order_of_the_photos(model, photos):
    told = []
    found = compute_features(
        model, photos, SPEC, n_blocks=2, forward=ForwardSettings(batch_size=2), advance=told.append
    )
    assert sum(told) == 7
    assert found.kept.tolist() == list(range(7))
    assert (found.cls[:, 0] - found.cls[:, 1]).abs().amax(dim=1).min() > 0.1  # the blocks differ
    for i, path in enumerate(photos):
        pixels = torch.from_numpy(preprocess(read_photo(path), SPEC))[None]
        layers = model.get_intermediate_layers(pixels, n=2, return_class_token=True)
        torch.testing.assert_close(found.cls[i], torch.stack([cls[0] for _, cls in layers]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.patch_parts["mean"][i], layers[-1][0][0].mean(0), atol=1e-5, rtol=1e-4)
    assert found.cls.requires_grad is False
    assert not found.cls.is_inference()  # probes are trained on it


def test_a_broken_photo_is_skipped_and_listed_or_an_error(model, photos):
    photos[2].write_bytes(b"no photo")
    found = compute_features(model, photos, SPEC)
    assert found.kept.tolist() == [0, 1, 3, 4, 5, 6]
    assert [(s.name, s.reason != "") for s in found.skipped] == [(str(photos[2]), True)]
    whole = compute_features(model, [p for p in photos if p != photos[2]], SPEC)
    torch.testing.assert_close(found.cls, whole.cls, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"not a known image; it starts with .*JPEG, PNG, WEBP"):
        extract_features(model, photos, SPEC)
    with pytest.raises(ValueError, match="none of 1 images could be read"):
        compute_features(model, [photos[2]], SPEC)


def test_half_precision_and_the_models_mode(photos):
    torch.manual_seed(0)
    dropping = DinoVisionTransformer(TINY, drop_path_rate=0.5).train()
    with torch.no_grad():
        for parameter in dropping.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    full = compute_features(dropping, photos, SPEC)
    assert dropping.training
    assert torch.equal(full.cls, compute_features(dropping.eval(), photos, SPEC).cls)  # nothing was dropped
    assert not dropping.training
    half = compute_features(dropping, photos, SPEC, forward=ForwardSettings(precision="bf16"))
    assert half.cls.dtype == torch.float32
    assert not torch.equal(half.cls, full.cls)
    assert torch.nn.functional.cosine_similarity(half.cls[:, 0], full.cls[:, 0]).min() > 0.99


def test_more_blocks_than_the_model_has(model, photos):
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        compute_features(model, photos, SPEC, n_blocks=4)


def test_box_is_the_part_of_the_photo(photos):
    whole = read_photo(photos[1])
    np.testing.assert_array_equal(read_pixels(photos[1], SPEC, (5, 10, 20, 15)), preprocess(whole[10:25, 5:25], SPEC))
    np.testing.assert_array_equal(read_pixels(photos[1], SPEC, (-5, -5, 99, 99)), preprocess(whole, SPEC))
    with pytest.raises(ValueError, match="contains no pixel"):
        read_pixels(photos[1], SPEC, (100, 0, 10, 10))


def test_the_cache_serves_the_same_and_notices_changes(model, photos, tmp_path):
    cache, calls = tmp_path / "cache", []
    real = model.get_intermediate_layers
    model.get_intermediate_layers = lambda *a, **k: calls.append(1) or real(*a, **k)
    photos[0].write_bytes(b"broken")

    def get(digest="a", paths=photos, **more):
        calls.clear()
        return cached_features(FeatureCache(cache, digest), model, paths, SPEC, **more), len(calls)

    first, computed = get(n_blocks=2)
    assert computed
    again, computed = get(n_blocks=2)
    assert not computed
    assert torch.equal(first.cls, again.cls)
    assert torch.equal(first.patch_parts["mean"], again.patch_parts["mean"])
    assert first.skipped == again.skipped
    fewer, computed = get(n_blocks=1)
    assert not computed
    assert torch.equal(fewer.cls, first.cls[:, 1:])
    assert get(n_blocks=3)[1]  # more blocks than the file holds
    assert get("b")[1]  # another model
    assert get(paths=photos[1:])[1]
    assert get(boxes=[(0, 0, 20, 20)] * 7)[1]
    assert get(boxes=[(0, 0, 20, 21)] * 7)[1]
    assert get(forward=ForwardSettings(precision="bf16"))[1]
    assert not get(forward=ForwardSettings(precision="bf16"))[1]
    assert not get(n_blocks=3)[1]  # and each is kept beside the others
    for changed in (SPEC.model_copy(update={"resize": 42}), SPEC.model_copy(update={"mean": (0.4, 0.4, 0.4)})):
        calls.clear()
        cached_features(FeatureCache(cache, "a"), model, photos, changed)
        assert calls
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert get()[1]  # damaged files are made anew


def test_in_order_takes_four_items_a_thread_ahead_and_no_more():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = in_order(lambda i: i, items(), 2)
    for done in range(3):
        assert next(results) == done
        assert len(taken) == 8 + done
    results.close()


def test_in_order_keeps_order_and_passes_errors_on():
    assert list(in_order(lambda i: i * i, range(50), 3)) == [i * i for i in range(50)]

    def fail(i):
        if i == 20:
            raise ValueError("twenty")
        return i

    results = in_order(fail, range(50), 2)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(ValueError, match="twenty"):
        next(results)
