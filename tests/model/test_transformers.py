"""Compares Hugging Face's own models on random weights with our converter, our backbone and the resize rule.

Every parameter is random and LayerScale's gains are far from one, so the comparison fails if a tensor is dropped,
swapped or left at its initial value.
"""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the backbone is torch: pip install '.[train]'")
transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install '.[reference]'")

from model.checkpoint import load_state_dict_file  # noqa: E402
from model.config import ViTConfig  # noqa: E402
from model.convert import Converted, convert  # noqa: E402
from model.vit import DinoVisionTransformer  # noqa: E402

SIZES = [(56, 56), (28, 70), (84, 56), (42, 42), (14, 14), (70, 112)]


def hugging_face(registers: bool, swiglu: bool, task: bool) -> torch.nn.Module:
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=4,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn=swiglu,
        **({"num_register_tokens": 3} if registers else {}),
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}{'ForImageClassification' if task else 'Model'}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.uniform_(0.2, 0.6)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    return model


def ours_from(tensors: dict[str, torch.Tensor], registers: bool, swiglu: bool) -> DinoVisionTransformer:
    config = ViTConfig(
        embed_dim=48,
        depth=3,
        num_heads=4,
        img_size=56,
        ffn="swiglu" if swiglu else "mlp",
        num_register_tokens=3 if registers else 0,
    )
    converted = convert({name: tensor.numpy() for name, tensor in tensors.items()}, config)
    assert converted.config.pos_embed_rule == ("antialias" if registers else "size")
    assert converted.dialect.name.startswith("Hugging Face")
    model = DinoVisionTransformer(converted.config).eval()
    load(model, converted)
    return model


def load(model: DinoVisionTransformer, converted: Converted) -> None:
    model.load_state_dict({name: torch.from_numpy(array) for name, array in converted.arrays.items()}, strict=True)


@torch.inference_mode()
def assert_same_features(reference: torch.nn.Module, model: DinoVisionTransformer) -> None:
    generator = torch.Generator().manual_seed(8)
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width, generator=generator)
        theirs = reference(pixel_values=x, output_hidden_states=True)
        features = model.forward_features(x)
        ours = [features[f"x_norm_{part}"] for part in ("clstoken", "regtokens", "patchtokens")]
        ours[0] = ours[0].unsqueeze(1)
        torch.testing.assert_close(torch.cat(ours, dim=1), theirs.last_hidden_state, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(model(x), theirs.pooler_output, rtol=1e-4, atol=2e-5)
        layers = model.get_intermediate_layers(x, n=[0, 1], norm=False)
        for layer, hidden in zip(layers, theirs.hidden_states[1:3], strict=True):
            torch.testing.assert_close(layer, hidden[:, 1 + model.num_register_tokens :], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_features_from_a_file(registers: bool, swiglu: bool, tmp_path: Path) -> None:
    reference = hugging_face(registers, swiglu, task=False)
    reference.save_pretrained(tmp_path)
    tensors = load_state_dict_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in tensors  # the names of the published files
    assert_same_features(reference, ours_from(tensors, registers, swiglu))


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_features_from_a_state_dict(registers: bool, swiglu: bool) -> None:
    reference = hugging_face(registers, swiglu, task=False)
    assert_same_features(reference, ours_from(reference.state_dict(), registers, swiglu))


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_the_classifier_of_a_task_model_is_left_out(registers: bool, tmp_path: Path) -> None:
    task_model = hugging_face(registers, swiglu=False, task=True)
    task_model.save_pretrained(tmp_path)
    backbone = task_model.dinov2_with_registers if registers else task_model.dinov2
    tensors = load_state_dict_file(tmp_path / "model.safetensors")
    assert {"classifier.weight", "classifier.bias"} < tensors.keys()
    assert_same_features(backbone, ours_from(tensors, registers, swiglu=False))


@torch.inference_mode()
def test_masked_patches() -> None:
    reference = hugging_face(registers=True, swiglu=False, task=False)
    model = ours_from(reference.state_dict(), registers=True, swiglu=False)
    generator = torch.Generator().manual_seed(9)
    x, masks = torch.randn(2, 3, 56, 56, generator=generator), torch.rand(2, 16, generator=generator) < 0.4
    theirs = reference(pixel_values=x, bool_masked_pos=masks).last_hidden_state
    torch.testing.assert_close(
        model.forward_features(x, masks)["x_norm_patchtokens"], theirs[:, 4:], rtol=1e-4, atol=2e-5
    )


@torch.inference_mode()
def test_another_resize_rule_would_show() -> None:
    """The comparison above is able to fail: two rules differ by far more than its tolerance."""
    reference = hugging_face(registers=False, swiglu=False, task=False)
    x = torch.randn(1, 3, 28, 70, generator=torch.Generator().manual_seed(10))
    config = ViTConfig(embed_dim=48, depth=3, num_heads=4, img_size=56, pos_embed_rule="offset")
    model = DinoVisionTransformer(config).eval()
    load(model, convert({name: tensor.numpy() for name, tensor in reference.state_dict().items()}, config))
    assert (model(x) - reference(pixel_values=x).pooler_output).abs().max() > 1e-3
