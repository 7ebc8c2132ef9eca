"""Every kind of model can be evaluated: runs, checkpoints, weight files and artifacts. Broken ones are refused."""

import pytest
import torch
from typer.testing import CliRunner

import cli
from model import config as model_config
from model.checkpoint import save_checkpoint
from model.config import ViTConfig
from model.vit import DinoVisionTransformer
from training.evaluate.backbone import load_backbone

TINY = ViTConfig(embed_dim=16, depth=2, num_heads=2, img_size=28, pos_embed_rule="antialias")
runner = CliRunner()


def network(seed):
    torch.manual_seed(seed)
    return DinoVisionTransformer(TINY).eval()


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run: the last checkpoint and a better one."""
    folder = tmp_path / "runs" / "x"
    for name, seed in (("checkpoint", 1), ("checkpoint.best", 2)):
        provenance = {"preprocess": {"resize": 35, "crop": 28}}
        save_checkpoint(folder / f"{name}.safetensors", network(seed).state_dict(), TINY, provenance)
    return folder


def test_a_run_is_evaluated_with_its_best_checkpoint_and_its_own_preprocessing(run):
    x = torch.randn(1, 3, 28, 42)
    best, last = load_backbone(str(run)), load_backbone(str(run / "checkpoint.safetensors"))
    torch.testing.assert_close(best.model(x), network(2)(x))
    torch.testing.assert_close(last.model(x), network(1)(x))
    assert best.fingerprint != last.fingerprint
    assert (best.spec.resize, best.spec.crop, best.name) == (35, 28, str(run))


def test_a_file_of_another_project_needs_its_architecture_only(tmp_path, monkeypatch):
    monkeypatch.setitem(model_config.CONFIGS, "small", TINY)
    torch.save(
        {"model": {f"module.{key}": value for key, value in network(3).state_dict().items()}}, tmp_path / "w.pth"
    )
    with pytest.raises(ValueError, match=r"add --arch, e\.g\. --arch small"):
        load_backbone(str(tmp_path / "w.pth"))
    loaded = load_backbone(str(tmp_path / "w.pth"), arch="small")
    assert torch.equal(loaded.model.cls_token, network(3).cls_token)


@pytest.mark.parametrize("source", ["runs/none", "/nonexistent.pth", "none.safetensors"])
def test_a_missing_path_is_no_unknown_model(source, tmp_path):
    result = runner.invoke(cli.app, ["eval", source, "--task", "knn", "--data", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output == f"error: {source}: no such file or folder\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_evaluated(run, value):
    """k-NN once printed a plausible accuracy for such weights."""
    state = network(2).state_dict()
    state["blocks.0.attn.qkv.bias"][4] = value
    save_checkpoint(run / "checkpoint.best.safetensors", state, TINY, {})
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.qkv\.bias contains 1 of 48 values that are NaN or infinite"
    ):
        load_backbone(str(run))
