"""A step's crops and masks: their shapes and order, and that ranks and micro-batches see what one process sees."""

import pytest
import torch

from training.config import TrainConfig
from training.data.crops import make_crops
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


def test_no_masks_where_none_are_wanted(photos):
    masks = crops_of(config(mask_probability=0.0), photos, [2, 3]).masks
    assert masks.shape == (4, 16)
    assert not masks.any()
