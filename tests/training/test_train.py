"""The loop: it learns, resumes bit for bit, lists what it cannot read, and refuses nonsense."""

import functools
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.all_features import extract_features
from model.artifact import bundled_artifact, read_manifest
from model.checkpoint import load_checkpoint, load_state_dict_file
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from tests.training.tiny import ALONE, QUIET, TINY
from training import step
from training import train as loop
from training.__main__ import main
from training.config import TrainConfig
from training.data.crops import Crops, make_micros
from training.ending import RunStopped
from training.losses import koleo_loss
from training.optimizer import clip_gradients, make_optimizer, set_schedule
from training.provenance import code_revision
from training.recipe import load_config, recipe_names
from training.setup import make_setup, strategy_of
from training.state import find_state
from training.student_teacher import DinoHead, Network, Output, make_teacher, update_teacher
from training.watch.monitor import read_lines
from training.watch.sentinels import Limits, load_replay
from training.wiring import crop_settings, make_schedules, step_settings


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("apples", "pears", "plums"):
        for i in range(9):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 30)).save(path)
    return tmp_path / "photos"


def config(photos, out, **changes):
    return TrainConfig.model_validate({"data": photos, "out": out, **TINY, **changes})


def lines(out):
    return read_lines(out / "metrics.jsonl")


def parts_of(config):
    return make_setup(config, ALONE).parts


def test_a_run_leaves_a_checkpoint_that_loads_strictly_and_its_figures(photos, tmp_path):
    out = tmp_path / "run"
    path = loop.train(config(photos, out), QUIET)
    assert path.name == "checkpoint.best.safetensors"
    weights, vit_config, provenance = load_checkpoint(out / "checkpoint.safetensors")
    assert vit_config == ViTConfig(**{**TINY["vit"], "pos_embed_rule": "antialias"})
    DinoVisionTransformer(vit_config).load_state_dict(weights, strict=True)
    found = lines(out)
    assert [line["step"] for line in found] == list(range(1, 10))  # 25 images to train on: 3 steps per epoch
    assert all(
        np.isfinite(line[key])
        for line in found
        for key in ("loss", "dino", "ibot", "koleo", "teacher_entropy", "images_per_s")
    )
    assert all(line["dino_over_ln_k"] == pytest.approx(line["dino"] / math.log(32)) for line in found)  # 1: collapse
    assert provenance["steps"] == 9
    assert provenance["preprocess"] == {**PreprocessSpec(resize=28, crop=28).model_dump(mode="json")}
    assert provenance["photos"] == 25
    assert set(provenance["knn"]) == {"cls", "mean", "cls+mean"}
    assert json.loads((out / "knn.json").read_text())["cls"].keys() == {"1", "10", "20"}


def test_it_learns(photos, tmp_path):
    loop.train(config(photos, tmp_path / "run", epochs=40, drop_path=0.0, lr=2e-2, seed=1), QUIET)
    dino = [line["dino"] for line in lines(tmp_path / "run")]
    assert np.mean(dino[-10:]) < 0.97 * np.mean(dino[:5])


class StopError(Exception):
    """Stands for the plug being pulled."""


def test_a_stopped_run_goes_on_bit_for_bit(photos, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected, _, _ = load_checkpoint(loop.train(config(photos, whole), QUIET))
    one_step = loop.train_step

    def pulled(*args):
        if args[4] == 5:
            raise StopError
        return one_step(*args)

    monkeypatch.setattr(loop, "train_step", pulled)
    with pytest.raises(StopError):
        loop.train(config(photos, broken, save_every_minutes=1e-9), QUIET)
    monkeypatch.setattr(loop, "train_step", one_step)
    torch.rand(17)  # whatever happened to the global generator in between
    resumed, _, _ = load_checkpoint(loop.train(config(photos, broken), QUIET))
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    figures = ("step", "loss", "dino", "ibot", "koleo", "lr")
    assert [[line[f] for f in figures] for line in lines(broken)] == [[x[f] for f in figures] for x in lines(whole)]


def test_another_run_in_the_same_folder_is_refused(photos, tmp_path):
    loop.train(config(photos, tmp_path / "run", epochs=1), QUIET)
    with pytest.raises(ValueError, match=r"lr: 0\.004 -> 0\.001"):
        loop.train(config(photos, tmp_path / "run", epochs=1, lr=1e-3), QUIET)


def test_broken_files_are_listed_and_the_run_goes_on(photos, tmp_path):
    (photos / "apples" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (photos / "pears" / "empty.png").write_bytes(b"")
    loop.train(config(photos, tmp_path / "run", epochs=1), QUIET)
    listed = (tmp_path / "run" / "skipped.txt").read_text()
    assert "broken.jpg: " in listed
    assert "empty.png: " in listed


def test_a_folder_of_one_class_trains_without_knn(photos, tmp_path):
    shutil.copytree(photos / "apples", tmp_path / "flat")
    out = tmp_path / "run"
    loop.train(config(tmp_path / "flat", out, epochs=1, batch_size=4, n_local=0), QUIET)
    assert json.loads((out / "knn.json").read_text()) == {}


def test_the_command_line(photos, tmp_path, capsys, monkeypatch):
    changes = [
        f"{k}={'{embed_dim = 16, depth = 1, num_heads = 2, img_size = 28}' if k == 'vit' else v}"
        for k, v in TINY.items()
    ]
    arguments = ["training", "--data", str(photos), "--recipe", "smoke", "--out", str(tmp_path / "run"), "epochs=1"]
    monkeypatch.setattr("sys.argv", arguments + [c for c in changes if not c.startswith("epochs")])
    assert main() == 0
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    monkeypatch.setattr("sys.argv", [*arguments[:2], str(tmp_path / "nowhere"), *arguments[3:]])
    assert main() == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_defaults_are_those_of_dinov2s_short_recipe():
    """facebookresearch/dinov2, `configs/ssl_default_config.yaml` and `train/vitl16_short.yaml`; epochs as shares."""
    expected = {
        "dino_weight": 1.0,
        "ibot_weight": 1.0,
        "koleo_weight": 0.1,
        "student_temp": 0.1,
        "shared_head": True,
        "n_prototypes": 65536,
        "head_hidden_dim": 2048,
        "head_bottleneck_dim": 256,
        "centering": "sinkhorn",
        "teacher_temp": (0.04, 0.07),
        "teacher_temp_warmup": 0.3,
        "momentum": (0.992, 1.0),
        "center_momentum": 0.9,
        "mask_ratio": (0.1, 0.5),
        "mask_probability": 0.5,
        "ibot_patches": "masked",
        "global_size": 224,
        "global_scale": (0.32, 1.0),
        "local_scale": (0.05, 0.32),
        "n_local": 8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "jitter_probability": 0.8,
        "gray": 0.2,
        "blur": (0.0, 0.9, 0.5),
        "solarize": 0.2,
        "white_balance": 0.0,
        "optimizer": "adamw",
        "lr": 4e-3,
        "min_lr": 1e-6,
        "warmup": 0.1,
        "weight_decay": (0.04, 0.4),
        "betas": (0.9, 0.999),
        "layer_decay": 0.9,
        "patch_embed_lr_mult": 0.2,
        "freeze_last_layer": 0.01,
        "clip_grad": 3.0,
        "freeze_backbone": 0.0,
        "last_phase": None,
    }
    found = TrainConfig(data="-", out="-")
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_valid_and_says_how_it_is_run(recipe, tmp_path):
    found = load_config(
        recipe,
        tmp_path,
        tmp_path,
        ["epochs=2.5", "global_scale=[0.5, 1.0]", "seed=7", "init=dinov2_vits14", "teacher=b"],
    )
    assert (found.epochs, found.global_scale, found.seed, found.recipe) == (2.5, (0.5, 1.0), 7, recipe)
    assert "-m training" in (Path(__file__).parents[2] / f"training/recipes/{recipe}.toml").read_text()


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("nonsense", [], "nonsense.*smoke"),
        ("smoke", ["epochs"], "key=value"),
        ("smoke", ["epoch=3"], "unknown setting 'epoch': did you mean epochs"),
        ("smoke", ["epochs=-1"], "epochs"),
        ("smoke", ["global_size=99"], "global_size=99"),
        ("smoke", ["vit={width = 3}"], "width"),
        ("smoke", ["model=resnet"], "resnet"),
        ("smoke", ["warmup=1.5"], "warmup=1.5"),
        ("smoke", ["freeze_backbone=-0.1"], "freeze_backbone=-0.1"),
        ("smoke", ["local_size=0"], "local_size=0"),
        ("smoke", ["last_phase={share = 0.2, global_size = 100, local_size = 42}"], "last_phase.global_size=100"),
        ("smoke", ["lr=inf"], "^lr=inf: must be a finite number$"),
        ("smoke", ["epochs=1e30"], "^epochs=1e\\+30: must be at most"),
        ("smoke", ["epochs=three"], "^epochs='three': must be a number"),
        ("smoke", ["seed=-1"], "^seed=-1: must be at least 0"),
        ("smoke", ["global_scale=[1.0, 0.4]"], "^global_scale=.1, 0.4.: the first value must"),
        ("smoke", ["local_scale=[0.0, 0.4]"], "^local_scale.0=0.0: must be more than 0"),
        ("smoke", ["last_phase={share = 1.2, global_size = 98, local_size = 42}"], "last_phase.share"),
    ],
)
def test_impossible_settings_are_refused(recipe, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, tmp_path, tmp_path, overrides)


def small_network(**changes):
    torch.manual_seed(0)
    settings = {"n_prototypes": 16, "hidden_dim": 8, "bottleneck_dim": 4, "shared_head": False, "drop_path_rate": 0.1}
    return Network(ViTConfig(embed_dim=16, depth=3, num_heads=2, img_size=28), **{**settings, **changes})


def test_parameter_groups_are_the_papers():
    network = small_network()
    optimizer = make_optimizer(network, layer_decay=0.5, patch_embed_lr_mult=0.2, betas=(0.9, 0.999))
    set_schedule(optimizer, {"backbone": 1.0, "head": 1.0, "last_layer": 0.0}, weight_decay=0.1)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    found = {name: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for name, p in network.named_parameters()}
    assert len(found) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert found["backbone.patch_embed.proj.weight"] == (0.2 * 0.5**4, 0.1)
    assert found["backbone.patch_embed.proj.bias"] == (0.2 * 0.5**4, 0.0)
    assert found["backbone.pos_embed"] == (0.5**4, 0.1)
    assert found["backbone.cls_token"] == (0.5**4, 0.1)
    assert found["backbone.blocks.0.attn.qkv.weight"] == (0.5**3, 0.1)
    assert found["backbone.blocks.2.ls1.gamma"] == (0.5, 0.0)
    assert found["backbone.norm.weight"] == (1.0, 0.0)
    assert found["dino_head.mlp.0.weight"] == (1.0, 0.1)
    assert found["own_ibot_head.last_layer.weight_v"] == (0.0, 0.1)


def test_clipping_is_per_sub_module():
    network = small_network()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in network.dino_head.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    clip_gradients(network, 3.0)

    def norm(module):
        return torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()

    assert norm(network.backbone) == pytest.approx(3.0, rel=1e-4)
    assert norm(network.own_ibot_head) == pytest.approx(3.0, rel=1e-4)
    assert network.dino_head.mlp[0].weight.grad[0, 0] == pytest.approx(1e-4)  # a large backbone gradient hurts no head


def test_the_teacher_follows_slowly_and_gets_no_gradient():
    student = small_network()
    teacher = make_teacher(student)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_teacher(student, teacher, 0.9)
    for old, new in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_a_shared_head_is_one_head():
    shared, separate = small_network(shared_head=True), small_network()
    assert shared.own_ibot_head is None
    assert separate.own_ibot_head is not separate.dino_head
    for network in (shared, separate):  # one call of a head for all its tokens gives what single calls would
        x, selected = torch.randn(4, 3, 28, 28), torch.tensor([1, 2, 7])
        out = network.eval()(x, x[:2, :, :14, :14], None, selected)
        features = network.backbone.forward_features(x)
        head = network.own_ibot_head or network.dino_head
        patches = features["x_norm_patchtokens"].flatten(0, 1)[selected]
        torch.testing.assert_close(out.patch_logits, head(patches))
        torch.testing.assert_close(out.global_logits, network.dino_head(features["x_norm_clstoken"]))
        torch.testing.assert_close(out.local_logits, network.dino_head(network.backbone(x[:2, :, :14, :14])))


def test_a_head_is_its_definition():
    torch.manual_seed(0)
    head = DinoHead(6, 9, hidden_dim=300, bottleneck_dim=40)
    weights = [parameter for name, parameter in head.named_parameters() if name.endswith(("weight", "weight_v"))]
    assert [w.std().item() for w in weights[1:]] == pytest.approx([0.02] * 3, rel=0.15)
    assert (head.last_layer.weight_g == 1).all()
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.linspace(0.5, 2, 9)[:, None])
        for parameter in head.mlp.parameters():
            parameter.mul_(10).add_(0.01)
        x = torch.randn(5, 6)
        found, hidden = head(x), x
        for layer in (0, 2, 4):
            hidden = hidden @ head.mlp[layer].weight.T + head.mlp[layer].bias
            hidden = hidden if layer == 4 else torch.nn.functional.gelu(hidden)
        rows = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
        expected = hidden / hidden.norm(dim=1, keepdim=True) @ (rows * head.last_layer.weight_g).T
    torch.testing.assert_close(found, expected)


def test_the_settings_of_network_and_optimizer_reach_them():
    given = {"betas": (0.8, 0.95), "drop_path": 0.3, "shared_head": False, "ibot_bottleneck_dim": 4}
    parts = parts_of(config("-", "-", head_bottleneck_dim=6, layer_decay=0.7, patch_embed_lr_mult=0.1, **given))
    assert {group["betas"] for group in parts.optimizer.param_groups} == {(0.8, 0.95)}
    assert min(group["lr_mult"] for group in parts.optimizer.param_groups) == pytest.approx(0.1 * 0.7**3)
    assert {block.drop_path_rate for block in parts.student.backbone.blocks} == {0.3}
    assert parts.student.dino_head.last_layer.weight_v.shape == (32, 6)
    assert parts.student.own_ibot_head.last_layer.weight_v.shape == (32, 4)
    assert parts_of(config("-", "-", shared_head=False)).student.own_ibot_head.last_layer.weight_v.shape == (32, 8)
    assert parts_of(config("-", "-", shared_head=False, ibot_weight=0.0)).student.own_ibot_head is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 3}, "batch_size=8 must be a multiple of 1 ranks times micro_batch=3"),
        (
            {"last_phase": {"share": 0.5, "global_size": 42, "local_size": 28, "micro_batch": 5}},
            r"batch_size=8 must be a multiple of 1 ranks times last_phase\.micro_batch=5",
        ),
        ({"batch_size": 26}, "batch_size=26 is more than the 25 images to train on"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config(photos, tmp_path / "run", **changes), QUIET)


def test_a_student_is_a_function_of_the_seed():
    states = [parts_of(config("-", "-", seed=seed)).student.state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for key in ("backbone.blocks.1.attn.qkv.weight", "backbone.pos_embed", "dino_head.last_layer.weight_v"):
        assert not torch.equal(states[0][key], states[2][key])


@pytest.mark.parametrize(
    ("model", "strategy", "expected"),
    [
        ("dinov2_vitg14", "auto", "fsdp"),
        ("dinov2_vitl14", "auto", "ddp"),
        ("dinov2_vitg14", "ddp", "ddp"),
        ("dinov2_vits14", "fsdp", "fsdp"),
    ],
)
def test_only_the_giant_is_sharded_unless_told_otherwise(model, strategy, expected):
    assert strategy_of(TrainConfig(data="-", out="-", model=model, strategy=strategy)) == expected


def test_the_settings_of_the_sentinels_reach_them(photos, tmp_path, monkeypatch):
    actions = {"on_collapse": "rollback", "on_not_finite": "stop", "on_measure": "warn"}
    bounds = {"rollback_lr_factor": 0.3, "min_rankme_share": 0.2, "measure_margin": 2.5, "max_rollbacks": 9}
    seen = []

    def stopped(run, first, stop):
        seen.append(run.sentinels.limits)
        raise StopError

    monkeypatch.setattr(loop, "training_loop", stopped)
    with pytest.raises(StopError):
        loop.train(config(photos, tmp_path / "run", sentinel_lines=7, **actions, **bounds), QUIET)
    assert seen == [Limits(32, patience=7, n_measured=27, **actions, **bounds)]


@pytest.mark.parametrize(("precision", "watched"), [("fp32", True), ("bf16", True), ("fp16", False)])
def test_gradients_are_watched_but_for_those_that_look_for_their_scale(precision, watched):
    given = config("-", "-", precision=precision)
    terms = dict.fromkeys(("loss", "grad_norm_backbone", "koleo"), torch.tensor(1.0))
    found = loop.watched(SimpleNamespace(setup=make_setup(given, ALONE)), terms)
    assert "loss" in found
    assert ("grad_norm_backbone" in found) is watched
    assert "koleo" not in found


def test_the_revision_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_revision() == "unknown"


class StubNetwork(torch.nn.Module):
    """Features that are the pixels: class token [B, 3] the mean, patch tokens [B, N, 3] the pixels themselves."""

    def __init__(self, k):
        super().__init__()
        self.dino_head, self.ibot_head = torch.nn.Linear(3, k), torch.nn.Linear(3, k)

    @staticmethod
    def tokens(x, hidden):
        patches = x.flatten(2).transpose(1, 2)
        return patches * (1 + hidden.unsqueeze(-1)) if hidden is not None else patches

    def forward(self, globals_, locals_, hidden, selected):
        patches = self.tokens(globals_, hidden)
        cls = patches.mean(dim=1)
        local = None if locals_ is None else self.dino_head(locals_.mean(dim=(2, 3)))
        return Output(cls, self.dino_head(cls), local, self.ibot_head(patches.flatten(0, 1)[selected]))


@pytest.mark.parametrize("n_local", [0, 3])
def test_the_losses_pair_different_views_only(n_local):
    n, k, temp = 4, 5, 0.1
    generator = torch.Generator().manual_seed(0)
    globals_ = torch.randn(2 * n, 3, 2, 2, generator=generator)
    locals_ = torch.randn(n_local * n, 3, 1, 1, generator=generator) if n_local else None
    masks = torch.rand(2 * n, 4, generator=generator) < 0.5
    masks[1] = False  # an image without masks counts in the iBOT mean
    selected = masks.flatten().nonzero().squeeze(1)
    cls_probs = torch.randn(2, n, k, generator=generator).softmax(-1)
    patch_probs = torch.randn(int(masks.sum()), k, generator=generator).softmax(-1)
    learner = StubNetwork(k).requires_grad_(False)
    setup = SimpleNamespace(learner=learner, world=ALONE)
    crops = Crops(globals_, locals_, masks, masks, selected)
    weights = {"dino": 1.0, "ibot": 1.0, "koleo": 0.1}
    asked = SimpleNamespace(student_temp=temp, loss_weights=weights, koleo_over_ranks=True)
    found, seen = step.losses(asked, setup, crops, step.Targets(cls_probs, patch_probs))
    assert torch.equal(seen, StubNetwork.tokens(globals_, masks).mean(dim=1)[:n])

    def cross_entropy(token, head, target):
        return -float((target * torch.log_softmax(head(token) / temp, dim=-1)).sum())

    patches = StubNetwork.tokens(globals_, masks)
    cls = patches.mean(dim=1)
    dino = 0.0
    for photo in range(n):
        for view in range(2):
            dino += cross_entropy(cls[view * n + photo], learner.dino_head, cls_probs[1 - view, photo]) / n
        for view in range(n_local):
            token = locals_[view * n + photo].mean(dim=(1, 2))
            dino += sum(cross_entropy(token, learner.dino_head, cls_probs[t, photo]) for t in range(2)) / n
    assert float(found["dino"]) == pytest.approx(dino / (2 + 2 * n_local), rel=1e-4)

    ibot, row = 0.0, 0
    for image in range(2 * n):
        for patch in masks[image].nonzero().flatten():
            token = patches[image, patch]
            ibot += cross_entropy(token, learner.ibot_head, patch_probs[row]) / int(masks[image].sum()) / (2 * n)
            row += 1
    assert float(found["ibot"]) == pytest.approx(ibot, rel=1e-4)
    assert float(found["koleo"]) == pytest.approx(float(koleo_loss(cls[:n]) + koleo_loss(cls[n:])), rel=1e-4)


def spoiled(step, at):
    """A step whose loss is not finite, every time that it is taken."""

    def run(*args):
        terms, seen = step(*args)
        return (terms | {"loss": terms["loss"] * math.nan} if args[4] == at else terms), seen

    return run


def test_what_is_not_finite_is_said_with_the_photos_and_never_saved(photos, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(loop, "train_step", spoiled(loop.train_step, 2))
    with pytest.raises(RunStopped, match=r"step 3: loss is nan.*step_00000003"):
        loop.train(config(photos, out, save_every_minutes=1e-9, log_every=100, on_not_finite="stop"), QUIET)
    assert find_state(out)[0].step == 2
    replay = load_replay(out / "replays" / "step_00000003.safetensors")
    assert len(replay.names) == 8
    assert all((photos / name).exists() for name in replay.names)
    assert replay.crops["globals_"].shape == (16, 3, 28, 28)


def test_a_run_goes_back_and_passes_over_what_is_not_finite(photos, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(loop, "train_step", spoiled(loop.train_step, 4))
    loop.train(config(photos, out, save_every_minutes=1e-9), QUIET)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 6, 7, 8, 9]
    said = [line for line in read_lines(out / "events.jsonl") if line["kind"] == "rollback"]
    assert "skips step 5" in said[0]["message"]


def test_a_gradient_that_is_not_finite_changes_no_weights(photos, tmp_path):
    started = config(photos, tmp_path / "run")
    setup = make_setup(started, ALONE)
    pixels = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    [crops_] = make_micros(crop_settings(started), ALONE, pixels, torch.ones(8), 0, 9)
    crops_.globals_[0] = math.nan
    before = [p.clone() for p in setup.parts.student.parameters()]
    terms, _ = step.train_step(step_settings(started), setup, make_schedules(started, 9), [crops_], 5)
    assert terms["finite"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, setup.parts.student.parameters(), strict=True))


def test_a_run_does_not_go_on_with_other_photos(photos, tmp_path):
    out = tmp_path / "run"
    loop.train(config(photos, out, epochs=1), QUIET)
    moved = shutil.copytree(photos, tmp_path / "moved")
    loop.train(config(moved, out, epochs=1), QUIET)  # the same images elsewhere are the same run
    for path in sorted(moved.rglob("*.png")):
        Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(ValueError, match="changed"):
        loop.train(config(moved, out, epochs=1), QUIET)


def test_warm_up_and_frozen_last_layer_may_overlap(tmp_path):
    found = load_config("smoke", tmp_path, tmp_path, ["warmup=0.6", "freeze_last_layer=0.6"])
    assert len(make_schedules(found, 10).lr["last_layer"]) == 10


def test_a_run_starts_from_another_ones_backbone(photos, tmp_path):
    first = loop.train(config(photos, tmp_path / "first", epochs=1), QUIET)
    started = config(photos, tmp_path / "second", init=first, seed=3)
    parts = parts_of(started)
    weights, _, _ = load_checkpoint(first)
    for network in (parts.student, parts.ema):
        assert all(torch.equal(network.backbone.state_dict()[key], weights[key]) for key in weights)
    _, _, found = load_checkpoint(loop.train(started, QUIET))
    assert found["init"]["name"] == "checkpoint.best.safetensors"
    assert str(tmp_path) not in json.dumps(found)


def test_a_run_starts_from_an_artifact(photos, tmp_path):
    artifact = bundled_artifact()
    manifest, files = read_manifest(artifact), sorted(artifact.iterdir())
    started = config(photos, tmp_path / "run", init=artifact, vit=asdict(manifest.config), global_size=28)
    weights = parts_of(started).student.backbone.state_dict()
    expected = load_state_dict_file(artifact / "weights.safetensors")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert sorted(artifact.iterdir()) == files


def test_a_run_does_not_start_from_another_network(photos, tmp_path):
    first = loop.train(config(photos, tmp_path / "first", epochs=1), QUIET)
    with pytest.raises(ValueError, match=r"init=.*best\.safetensors has a different network.*depth=2.*depth=3"):
        loop.train(config(photos, tmp_path / "second", init=first, vit={**TINY["vit"], "depth": 3}), QUIET)


def test_a_frozen_backbone_stays_while_the_heads_learn(photos, tmp_path):
    frozen = config(photos, tmp_path / "run", epochs=1, freeze_backbone=1.0, freeze_last_layer=0.0, warmup=0.0)
    before = parts_of(frozen).student.state_dict()
    loop.train(frozen, QUIET)
    after = torch.load(find_state(tmp_path / "run")[0].path, weights_only=True)["student"]
    moved = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert moved == {"dino_head"}


def test_compiled_blocks_train_like_plain_ones_with_drop_path_and_several_sizes(photos, tmp_path, monkeypatch):
    # Traced and differentiated as for inductor, whose C++ takes minutes to compile: that was tried by hand.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    last = {"share": 0.4, "global_size": 42, "local_size": 28}
    # KoLeo's gradient is rounding where class tokens nearly coincide, as those of an untrained network do.
    one_block = {"vit": {**TINY["vit"], "depth": 1}, "last_phase": last, "drop_path": 0.3, "epochs": 1}
    one_block |= {"koleo_weight": 0.0}
    losses = []
    for compiled in (False, True):
        out = tmp_path / f"compile={compiled}"
        loop.train(config(photos, out, compile=compiled, **one_block), QUIET)
        losses.append([line["loss"] for line in lines(out)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4  # two sizes of each phase, student and teacher


def test_a_last_phase_with_a_rate_of_its_own_begins_anew(tmp_path):
    last = "last_phase={share = 0.2, global_size = 98, local_size = 42, lr_mult = 0.5}"
    plain, phased = (
        make_schedules(load_config("smoke", tmp_path, tmp_path, ["warmup=0.1", *more]), 100) for more in ([], [last])
    )
    assert np.array_equal(plain.lr["head"][:80], phased.lr["head"][:80])
    assert phased.lr["head"][80] == phased.lr["backbone"][80] == pytest.approx(plain.lr["head"].max() / 2)
    assert phased.lr["head"][-1] < 0.1 * phased.lr["head"][80]
    assert (phased.momentum[80], plain.momentum[80] > 0.99) == (0.98, True)


def test_a_backbone_warms_up_when_it_begins_and_the_heads_before(tmp_path):
    found = load_config("smoke", tmp_path, tmp_path, ["freeze_backbone=0.2", "warmup=0.1"])
    lr = make_schedules(found, 100).lr
    assert not lr["backbone"][:20].any()
    assert np.all(np.diff(lr["backbone"][20:30]) > 0)
    assert lr["head"][10] == lr["head"].max() == lr["backbone"].max()


def test_the_last_phase_takes_larger_crops(photos, tmp_path):
    last = {"share": 0.25, "global_size": 42, "local_size": 28, "global_scale": [0.5, 1.0]}
    phased = config(photos, tmp_path / "run", last_phase=last)
    seen = [
        [(view.size, view.scale, n) for view, n in crop_settings(phased).phase(done / 8).views] for done in range(8)
    ]
    early = [(28, (0.32, 1.0), 1), (28, (0.32, 1.0), 1), (14, (0.05, 0.32), 2)]
    late = [(42, (0.5, 1.0), 1), (42, (0.5, 1.0), 1), (28, (0.05, 0.32), 2)]
    assert seen == [early] * 6 + [late] * 2
    loop.train(phased, QUIET)
    assert len(lines(tmp_path / "run")) == 9


def test_a_whitened_run_gives_away_another_basis_and_goes_on_from_the_trained_one(photos, tmp_path):
    out = tmp_path / "run"
    trained, _, _ = load_checkpoint(loop.train(config(photos, out, epochs=1), QUIET))
    whitened, _, facts = load_checkpoint(loop.train(config(photos, out, epochs=1, whiten=0.1), QUIET))
    assert facts["settings"]["whiten"] == 0.1
    assert not torch.equal(whitened["norm.weight"], trained["norm.weight"])
    again, _, _ = load_checkpoint(loop.train(config(photos, out, epochs=1), QUIET))  # the state was not whitened
    assert all(torch.equal(again[key], trained[key]) for key in trained)
    paths = sorted(photos.rglob("*.png"))
    model = DinoVisionTransformer(ViTConfig(**{**TINY["vit"], "pos_embed_rule": "antialias"}))
    model.load_state_dict(whitened)
    spec = PreprocessSpec(resize=28, crop=28)
    assert extract_features(model, paths, spec)["cls"].mean(dim=0).abs().max() < 0.3  # two images were held out
