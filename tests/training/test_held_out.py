"""The loss on held-out images: it is DINO's loss, two calls agree, and a call changes nothing in the run."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny import ALONE, TINY
from training.config import TrainConfig
from training.data.crops import make_crops
from training.data.dataset import Photo
from training.data.sources import open_source
from training.held_out import SEED, HeldOutImages, held_out_loss, read_held_out
from training.losses import dino_loss, sinkhorn_knopp
from training.setup import make_setup
from training.wiring import crop_settings, step_settings


def config(**changes):
    return TrainConfig.model_validate({"data": "-", "out": "-", **TINY, **changes})


@pytest.fixture(scope="module")
def images():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (19, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return HeldOutImages(pixels, torch.ones(19))


def loss_of(settings, setup, images, temp=0.05, **more):
    return held_out_loss(step_settings(settings), setup, crop_settings(settings), images, temp, **more)


@torch.no_grad()
def test_the_loss_is_its_definition(images):
    settings = config()
    setup = make_setup(settings, ALONE)
    ema, crops_of = setup.parts.ema, crop_settings(settings)
    expected = []
    for batch in range(2):  # 19 images are two batches of 8; the last 3 images are left out
        at = slice(8 * batch, 8 * batch + 8)
        fixed = crops_of.__class__(**{**vars(crops_of), "seed": SEED})
        crops = make_crops(
            fixed, images.pixels[at], images.aspect[at], batch, torch.arange(8), fixed.phases[0], ALONE.device
        )
        logits = ema.dino_head(ema.backbone(crops.globals_))
        local = ema.dino_head(ema.backbone(crops.locals_)).unflatten(0, (2, 8))
        views = [*logits.chunk(2), *local]
        targets = sinkhorn_knopp(torch.stack(logits.chunk(2)), 0.05)
        pairs = [
            dino_loss(view, targets[teacher], settings.student_temp)
            for number, view in enumerate(views)
            for teacher in range(2)
            if number != teacher
        ]
        assert len(pairs) == 2 + 2 * 2
        expected.append(torch.stack(pairs).mean())
    assert loss_of(settings, setup, images) == pytest.approx(
        float(torch.stack(expected).mean()) / math.log(32), rel=1e-5
    )


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax", "batch_norm"])
def test_a_call_changes_nothing_and_two_calls_agree(images, centering):
    settings = config(centering=centering)
    setup = make_setup(settings, ALONE)
    for buffer in setup.parts.buffers.values():
        buffer.normal_()
    setup.parts.student.train()
    weights = copy.deepcopy(setup.parts.student.state_dict())
    buffers, state = copy.deepcopy(setup.parts.buffers), torch.get_rng_state()
    first = loss_of(settings, setup, images)
    assert first == loss_of(settings, setup, images)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, setup.parts.buffers[name]) for name, value in buffers.items())
    assert all(torch.equal(value, weights[name]) for name, value in setup.parts.student.state_dict().items())
    assert setup.parts.student.training
    assert all(parameter.grad is None for parameter in setup.parts.student.parameters())


def test_micro_batches_give_the_same_loss(images):
    whole, split = config(), config(micro_batch=2)
    setup = make_setup(whole, ALONE)
    assert loss_of(split, setup, images) == pytest.approx(loss_of(whole, setup, images), rel=1e-5)


def test_fewer_images_than_a_batch_are_one_batch(images):
    settings = config()
    setup = make_setup(settings, ALONE)
    few = HeldOutImages(images.pixels[:3], images.aspect[:3])
    assert 0.5 < loss_of(settings, setup, few) < 3


def test_another_network_may_predict(images):
    settings = config()
    setup = make_setup(settings, ALONE)
    other = copy.deepcopy(setup.parts.ema)
    with torch.no_grad():
        other.dino_head.last_layer.weight_v.zero_()  # logits of 0: the prediction says nothing
        other.dino_head.last_layer.weight_v[:, 0] = 1.0
    assert loss_of(settings, setup, images, predictor=other) == pytest.approx(1, abs=1e-4)
    assert loss_of(settings, setup, images) != pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    for number in range(9):
        Image.fromarray(np.full((20, 40, 3), 20 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"nothing")
    source = open_source(str(folder), folder / "index")
    return [Photo(source, number) for number in range(len(source))]


def test_images_are_read_in_order_and_broken_ones_are_left_out(photos):
    found = read_held_out(photos, 16, ALONE)
    assert found.pixels.shape == (8, 3, 16, 16)
    assert found.pixels[:, 0, 0, 0].tolist() == [20 * number for number in range(9) if number != 3]
    assert found.aspect.tolist() == [2.0] * 8


def test_the_number_of_images_is_bounded(photos):
    assert len(read_held_out(photos, 16, ALONE, most=4).pixels) == 2  # numbers 0, 3 (broken) and 6
    assert read_held_out(photos[:1], 16, ALONE) is None
    assert read_held_out([], 16, ALONE) is None
