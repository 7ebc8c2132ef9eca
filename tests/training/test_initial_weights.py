"""What a run starts from (`init`) and learns from (`teacher`): the sources, and the messages for wrong ones."""

from dataclasses import asdict, replace

import pytest
import torch

from model.artifact import bundled_artifact, read_manifest
from model.checkpoint import save_checkpoint
from model.config import ViTConfig
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.distill import PrototypeTeacher, load_teacher
from training.setup import initial_weights

TINY = ViTConfig(embed_dim=16, depth=2, num_heads=2, img_size=28, layerscale_init=1.0)


def network(config=TINY, seed=1):
    torch.manual_seed(seed)
    return DinoVisionTransformer(config)


@pytest.fixture
def run(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.safetensors", network().state_dict(), TINY, {})
    save_checkpoint(tmp_path / "checkpoint.best.safetensors", network(seed=2).state_dict(), TINY, {})
    return tmp_path


def test_a_run_gives_its_best_checkpoint(run):
    weights = initial_weights(str(run), "dinov2_vitt14", TINY)
    assert all(torch.equal(weights[key], tensor) for key, tensor in network(seed=2).state_dict().items())


def test_the_first_value_of_the_gains_does_not_matter(run):
    assert initial_weights(str(run), "dinov2_vitt14", replace(TINY, layerscale_init=1e-5))


def test_an_artifact(tmp_path):
    config = read_manifest(bundled_artifact()).config
    assert initial_weights(str(bundled_artifact()), "dinov2_vitt14", config)["cls_token"].dtype == torch.float32


def test_another_network_is_described_by_what_differs(run):
    with pytest.raises(ValueError, match="different network") as caught:
        initial_weights(str(run), "dinov2_vitt14", replace(TINY, depth=3, pos_embed_rule="antialias"))
    message = str(caught.value)
    assert "depth=2, not depth=3, pos_embed_rule=offset, not pos_embed_rule=antialias" in message
    assert """set vit='{"depth": 2, "pos_embed_rule": "offset"}'""" in message
    assert "embed_dim" not in message


@pytest.mark.parametrize("source", ["/nonexistent.pth", "runs/none", "checkpoint.safetensors"])
def test_a_missing_path_is_no_unknown_model(source):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder"):
        initial_weights(source, "dinov2_vitt14", TINY)


def test_weights_that_are_not_finite(run):
    state = network().state_dict()
    state["norm.bias"][0] = float("nan")
    save_checkpoint(run / "checkpoint.best.safetensors", state, TINY, {})
    with pytest.raises(ValueError, match=r"norm\.bias contains 1 of 16 values that are NaN or infinite"):
        initial_weights(str(run), "dinov2_vitt14", TINY)
    with pytest.raises(ValueError, match=r"norm\.bias contains 1 of 16 values that are NaN or infinite"):
        load_teacher(config(run))


def config(teacher):
    settings = {"data": ".", "out": "out", "vit": asdict(TINY), "n_prototypes": 8, "teacher": str(teacher)}
    return TrainConfig.model_validate(settings)


def test_a_teacher_is_loaded_like_any_model(run):
    """A run's folder without saved states has no heads, so its backbone teaches with prototypes."""
    teacher = load_teacher(config(run))
    assert isinstance(teacher, PrototypeTeacher)
    assert torch.equal(teacher.backbone.cls_token, network(seed=2).cls_token)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_teacher(config("runs/none"))
