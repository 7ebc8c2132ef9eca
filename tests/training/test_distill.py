"""Distillation: from a run with heads, from a backbone without; what is released, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load_checkpoint
from tests.training.tiny import ALONE, QUIET
from training import distill
from training import train as loop
from training.config import TrainConfig
from training.data.crops import make_crops
from training.distill import PrototypeTeacher, load_teacher, teacher_digest
from training.distributed import World
from training.state import find_state
from training.student_teacher import Network
from training.watch.monitor import read_lines
from training.wiring import crop_settings

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "layerscale_init": 1.0}
TINY = {
    "vit": VIT,
    "global_size": 28,
    "local_size": 14,
    "n_local": 2,
    "cache_size": 32,
    "n_prototypes": 24,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "batch_size": 8,
    "epochs": 3,
    "log_every": 1,
    "eval_resize": 28,
    "eval_crop": 28,
    "precision": "fp32",
    "estimate": False,
    "on_collapse": "warn",
    "ibot_patches": "all",
}
SMALL = {**VIT, "embed_dim": 8}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("apples", "pears", "plums"):
        (folder / name).mkdir()
        for i in range(9):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 30)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    loop.train(config(photos, out, epochs=1, seed=5), QUIET)
    return out


def config(photos, out, **changes):
    return TrainConfig.model_validate({"data": photos, "out": out, **TINY, **changes})


def lines(out):
    names = ("step", "loss", "dino", "ibot", "koleo", "teacher_entropy")
    return [[line[name] for name in names] for line in read_lines(out / "metrics.jsonl")]


class PulledError(Exception):
    """Stands for the plug."""


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_student_learns_from_a_frozen_teacher_and_goes_on_bit_for_bit(photos, teacher, tmp_path, monkeypatch, kind):
    given = teacher if kind == "run" else teacher / "checkpoint.safetensors"
    settings = {"teacher": given, "vit": SMALL, "epochs": 8, "lr": 0.1, "koleo_weight": 0.0, "seed": 1, "n_local": 0}
    before = teacher_digest(load_teacher(config(photos, tmp_path, **settings)))
    whole, out = tmp_path / "whole", tmp_path / "run"
    loop.train(config(photos, whole, **settings), QUIET)
    losses = [line[1] for line in lines(whole)]
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])
    assert teacher_digest(load_teacher(config(photos, tmp_path, **settings))) == before
    weights, vit, facts = load_checkpoint(whole / "checkpoint.safetensors")
    average = torch.load(find_state(whole)[0].path, weights_only=True)["ema"]
    assert vit.embed_dim == 8
    assert all(torch.equal(weights[key], average[f"backbone.{key}"]) for key in weights)
    assert facts["teacher"] == given.name
    one_step = loop.train_step

    def pulled(*arguments):
        if arguments[4] == 10:
            raise PulledError
        return one_step(*arguments)

    monkeypatch.setattr(loop, "train_step", pulled)
    with pytest.raises(PulledError):
        loop.train(config(photos, out, **settings, save_every_minutes=1e-9), QUIET)
    monkeypatch.setattr(loop, "train_step", one_step)
    loop.train(config(photos, out, **settings), QUIET)
    again, _, _ = load_checkpoint(out / "checkpoint.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert lines(out) == lines(whole)


def test_a_runs_teacher_is_its_average_with_its_heads(photos, teacher, tmp_path):
    found = load_teacher(config(photos, tmp_path, teacher=teacher, vit=SMALL))
    expected = torch.load(find_state(teacher)[0].path, weights_only=True)["ema"]
    assert isinstance(found, Network)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def crops_of(settings, positions, step=0):
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    crops, aspect = crop_settings(settings), torch.ones(len(positions))
    return make_crops(crops, pixels[positions], aspect, step, positions, crops.phase(0.0), ALONE.device)


def test_prototypes_are_the_teachers_features_of_the_first_photos(photos, teacher, tmp_path):
    settings = config(photos, tmp_path, teacher=teacher / "checkpoint.safetensors", n_prototypes=20)
    found = load_teacher(settings)
    assert isinstance(found, PrototypeTeacher)
    steps = [[crops_of(settings, torch.arange(8), step)] for step in range(3)]  # 16 crops each: two are needed
    found.choose(iter(steps), ALONE)
    features = [found.backbone.forward_features(crops.globals_) for [crops] in steps[:2]]
    cls = torch.cat([f["x_norm_clstoken"] for f in features])[:20].double()
    expected = torch.nn.functional.normalize(cls - cls.mean(dim=0), dim=1)
    torch.testing.assert_close(found.cls_prototypes.double(), expected, rtol=1e-4, atol=1e-5)
    [crops] = steps[0]
    logits = found(crops.globals_, None, None, crops.selected)
    assert (logits.global_logits.diagonal() > 0.999).all()  # image p is most like prototype p
    assert logits.patch_logits.shape == (16 * 4, 20)
    with pytest.raises(ValueError, match="n_prototypes=20 is more than the 16 global crops"):
        load_teacher(settings).choose(iter(steps[:1]), ALONE)


def test_prototypes_do_not_depend_on_micro_batches_nor_ranks(photos, teacher, tmp_path, monkeypatch):
    """A run goes on with other micro-batches or ranks: the heads have learned which prototype is which."""
    settings = config(photos, tmp_path, teacher=teacher / "checkpoint.safetensors", n_prototypes=12)

    def chosen(steps, world=ALONE):
        found = load_teacher(settings)
        found.choose(iter(steps), world)
        return {name: value for name, value in found.named_buffers() if "backbone" not in name}

    whole = chosen([[crops_of(settings, torch.arange(8))]])
    parts = chosen([[crops_of(settings, p) for p in torch.arange(8).split(2)]])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)

    halves = [[crops_of(settings, p)] for p in torch.arange(8).split(4)]
    sent = []  # by rank 1: class tokens, then patches

    def gathered_by_1(world, x):
        sent.append(x)
        return torch.cat((x, x))

    monkeypatch.setattr(distill, "gather_rows", gathered_by_1)
    chosen([halves[1]], World(1, 2, ALONE.device))
    monkeypatch.setattr(distill, "gather_rows", lambda world, x: torch.cat((x, sent.pop(0))))
    two = chosen([halves[0]], World(0, 2, ALONE.device))
    assert not sent
    for name, value in whole.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


def test_nothing_is_hidden_where_all_patches_are_asked_for(photos, tmp_path):
    crops = crops_of(config(photos, tmp_path), torch.arange(8))
    assert not crops.hidden.any()
    assert crops.masks.all()
    assert crops.selected.tolist() == list(range(16 * 4))


def refused(photos, out, message, **changes):
    with pytest.raises(ValueError, match=message):
        loop.train(config(photos, out, **changes), QUIET)


def test_teachers_that_do_not_fit_are_refused(photos, teacher, tmp_path):
    refused(
        photos, tmp_path / "a", r"has 24 prototypes: n_prototypes=32 must be the same", teacher=teacher, n_prototypes=32
    )
    fine = {"vit": {**VIT, "patch_size": 7, "img_size": 28}}
    for given in (teacher, teacher / "checkpoint.safetensors"):
        refused(photos, tmp_path / "b", r"has patches of 14 pixels, the student .* of 7", teacher=given, **fine)
    refused(photos, tmp_path / "c", "nowhere", teacher="nowhere")
    damaged = shutil.copytree(teacher, tmp_path / "damaged")
    for path in (damaged / "states").glob("*.pt"):
        path.write_bytes(b"")
    refused(photos, tmp_path / "d", "has no complete state", teacher=damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        loop.train(config(photos, tmp_path / "e", teacher=damaged), QUIET)


def test_a_run_does_not_go_on_with_another_teacher(photos, teacher, tmp_path):
    mine = shutil.copytree(teacher, tmp_path / "teacher")
    student = {"teacher": mine, "epochs": 1, "vit": SMALL}
    loop.train(config(photos, tmp_path / "run", **student), QUIET)
    shutil.rmtree(mine)
    loop.train(config(photos, mine, epochs=1, seed=6), QUIET)
    refused(photos, tmp_path / "run", "other weights than this run's teacher had so far", **student)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher"] == str(mine)
