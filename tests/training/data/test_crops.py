"""A step's crops and masks: their shapes and order, and that ranks and micro-batches see what one process sees."""

from dataclasses import replace

import pytest
import torch

from tests.training.tiny import ALONE
from training.config import TrainConfig
from training.data import crops as crops_module
from training.data.augment import Geometry, Jitter, View
from training.data.crops import make_crops, make_micros
from training.distributed import World
from training.wiring import crop_settings

BATCH = 6
CPU = torch.device("cpu")


def config(**changes):
    return TrainConfig.model_validate(
        {
            "data": "photos",
            "out": "run",
            "vit": {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 56},
            "global_size": 56,
            "local_size": 28,
            "n_local": 3,
            "eval_crop": 56,
            "batch_size": BATCH,
            **changes,
        }
    )


@pytest.fixture
def photos():
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (BATCH, 3, 9, 9), generator=generator).float()
    return torch.nn.functional.interpolate(small, 64, mode="bilinear").byte(), torch.linspace(0.6, 1.7, BATCH)


def crops_of(settings, photos, positions, step=4):
    images, aspect = (values[positions] for values in photos)
    crops = crop_settings(settings)
    return make_crops(crops, images, aspect, step, torch.tensor(positions), crops.phase(0.0), CPU)


def joined(settings, photos, split, step=4):
    """The crops of all images, made part by part, in the order of the whole."""
    parts = [crops_of(settings, photos, positions, step) for positions in split]
    order = torch.tensor([position for part in split for position in part]).argsort()

    def by_photo(name, views):
        return torch.cat([getattr(p, name).unflatten(0, (views, -1)) for p in parts], dim=1)[:, order].flatten(0, 1)

    return {"globals_": by_photo("globals_", 2), "locals_": by_photo("locals_", 3), "masks": by_photo("masks", 2)}


def test_shapes_and_order(photos):
    crops = crops_of(config(), photos, list(range(BATCH)))
    assert crops.globals_.shape == (2 * BATCH, 3, 56, 56)
    assert crops.locals_.shape == (3 * BATCH, 3, 28, 28)
    assert crops.masks.shape == (2 * BATCH, 16)
    assert crops.masks.dtype == torch.bool
    assert int(crops.masks.any(dim=1).sum()) == BATCH  # half of the images
    assert torch.equal(crops.hidden, crops.masks)
    assert crops.selected.tolist() == crops.masks.flatten().nonzero().flatten().tolist()
    everything = crops_of(config(ibot_patches="all"), photos, [0, 1])
    assert not everything.hidden.any()
    assert everything.masks.all()
    assert everything.selected.tolist() == list(range(2 * 2 * 16))
    assert crops_of(config(n_local=0), photos, [0, 1]).locals_ is None


def test_views_are_of_their_photo(photos):
    """Without changes of colour all views of a flat image have its colour."""
    plain = config(brightness=0, contrast=0, saturation=0, hue=0, gray=0, blur=(0, 0, 0), solarize=0)
    images = (torch.arange(BATCH) * 40).byte()[:, None, None, None].expand(-1, 3, 64, 64)
    crops = crops_of(plain, (images, torch.ones(BATCH)), [4, 1])
    for found, views in ((crops.globals_, 2), (crops.locals_, 3)):
        by_photo = found.unflatten(0, (views, 2))
        torch.testing.assert_close(by_photo[:, 0], by_photo[:1, 0, :, :1, :1].expand_as(by_photo[:, 0]))
        assert (by_photo[:, 0] > by_photo[:, 1]).all()


@pytest.mark.parametrize(
    "split", [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 0, 3, 1], [4, 2]]]
)
def test_ranks_and_micro_batches_see_what_one_process_sees(photos, split):
    whole = joined(config(), photos, [list(range(BATCH))])
    for name, found in joined(config(), photos, split).items():
        torch.testing.assert_close(found, whole[name], atol=1e-5, rtol=0)


def test_seed_and_step_change_everything(photos):
    everyone = [list(range(BATCH))]
    first = joined(config(), photos, everyone)
    assert all(torch.equal(found, first[name]) for name, found in joined(config(), photos, everyone).items())
    for other in (joined(config(seed=1), photos, everyone), joined(config(), photos, everyone, step=5)):
        assert not torch.equal(other["masks"], first["masks"])
        for name in ("globals_", "locals_"):
            assert (other[name] - first[name]).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_first_second_and_local_views_are_drawn_apart(photos):
    same = {"local_size": 56, "local_scale": (0.32, 1.0), "blur": (0, 0, 0), "solarize": 0.0}
    crops = crops_of(config(**same), photos, list(range(BATCH)))
    views = torch.cat((crops.globals_.unflatten(0, (2, -1)), crops.locals_.unflatten(0, (3, -1))))  # [5, B, ...]
    for i in range(5):
        for other in range(i):
            assert (views[i] - views[other]).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_the_settings_of_the_views_reach_them():
    given = config(
        global_scale=(0.4, 0.9),
        local_scale=(0.1, 0.3),
        blur=(0.1, 0.2, 0.3),
        solarize=0.4,
        last_phase={"share": 0.5, "global_size": 84, "local_size": 42, "local_scale": (0.2, 0.25)},
    )
    crops = crop_settings(given)
    assert crops.phase(0.49).views == (
        (View(56, (0.4, 0.9), 0.1, 0.0), 1),
        (View(56, (0.4, 0.9), 0.2, 0.4), 1),
        (View(28, (0.1, 0.3), 0.3, 0.0), 3),
    )
    assert crops.phase(0.5).views == (
        (View(84, (0.32, 1.0), 0.1, 0.0), 1),
        (View(84, (0.32, 1.0), 0.2, 0.4), 1),
        (View(42, (0.2, 0.25), 0.3, 0.0), 3),
    )


def test_the_settings_of_the_colours_reach_every_view(photos, monkeypatch):
    given = {"white_balance": 0.15, "brightness": 0.31, "contrast": 0.32, "saturation": 0.33, "hue": 0.34, "gray": 0.35}
    seen, augmented_views = [], crops_module.augmented_views

    def noted(images, aspect, view, n_views, jitter, geometry, random):
        seen.append(jitter)
        return augmented_views(images, aspect, view, n_views, jitter, geometry, random)

    monkeypatch.setattr(crops_module, "augmented_views", noted)
    crops_of(config(jitter_probability=0.6, **given), photos, [0])
    assert seen == [Jitter(probability=0.6, **given)] * 3


def test_the_settings_of_the_geometry_reach_every_view(photos):
    """Without colours, and with boxes of the whole image, a mirror image is the only difference."""
    same = {"local_size": 56, "global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "blur": (0, 0, 0), "solarize": 0.0}
    settings = crop_settings(config(**same, jitter_probability=0.0, gray=0.0))
    images = photos[0]

    def crops_with(geometry):
        given = replace(settings, geometry=geometry)
        made = make_crops(given, images, torch.ones(BATCH), 4, torch.arange(BATCH), given.phase(0.0), CPU)
        return torch.cat((made.globals_, made.locals_))

    plain = crops_with(Geometry(flip=0.0))
    torch.testing.assert_close(crops_with(Geometry(flip=0.0, vertical_flip=1.0)), plain.flip(2), atol=1e-5, rtol=0)
    mirrored = (crops_with(Geometry()) - plain.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert 0 < int(mirrored.sum()) < len(mirrored)  # half of them by default


@pytest.mark.parametrize(("ratio", "probability"), [((0.25, 0.25), 1.0), ((0.5, 0.5), 0.5)])
def test_the_settings_of_the_masks_reach_them(photos, ratio, probability):
    masks = crops_of(config(mask_ratio=ratio, mask_probability=probability), photos, list(range(BATCH))).masks
    counts = masks.sum(dim=1)
    assert int((counts > 0).sum()) == 2 * BATCH * probability
    assert int(counts.max()) == 16 * ratio[0]


def test_both_global_views_have_masks_of_their_own(photos):
    masks = crops_of(config(mask_ratio=(0.3, 0.5), mask_probability=1.0), photos, list(range(BATCH))).masks
    first, second = masks.unflatten(0, (2, -1))
    assert (first != second).any(dim=1).all()


@pytest.mark.parametrize(
    ("micro", "last", "step", "sizes"),
    [
        (3, 2, 0, [3, 3]),
        (3, 2, 4, [3, 3]),
        (3, 2, 5, [2, 2, 2]),
        (3, None, 5, [3, 3]),
        (None, 2, 5, [2, 2, 2]),
        (None, None, 0, [6]),
    ],
)
def test_micro_batches_have_the_size_of_their_phase(photos, micro, last, step, sizes):
    phase = {"share": 0.2, "global_size": 84, "local_size": 42, "micro_batch": last}
    given = config(micro_batch=micro, last_phase=phase)
    images, aspect = photos
    found = make_micros(crop_settings(given), ALONE, images, aspect, step, 6)
    assert [len(crops.globals_) // 2 for crops in found] == sizes
    assert {crops.globals_.shape[-1] for crops in found} == {84 if step == 5 else 56}


def test_no_masks_where_none_are_wanted(photos):
    masks = crops_of(config(mask_probability=0.0), photos, [2, 3]).masks
    assert masks.shape == (4, 16)
    assert not masks.any()


@pytest.mark.parametrize("changes", [{}, {"white_balance": 0.2, "vertical_flip": 0.5, "quarter_turns": 0.5}])
def test_making_the_crops_never_waits_for_the_device(photos, changes):
    """A tensor on the meta device has no data, so code that reads a value raises an error."""
    images, aspect = photos
    settings = crop_settings(config(micro_batch=3, **changes))
    meta = World(0, 1, torch.device("meta"))
    for step in range(5):
        micros = make_micros(settings, meta, images, aspect, step, 10)
        assert [micro.globals_.device.type for micro in micros] == ["meta", "meta"]
        assert micros[0].globals_.shape == (6, 3, 56, 56)
