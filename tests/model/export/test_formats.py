"""Round trips through the file formats of other projects, with the real transformers if it is installed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="weights of other projects are compared with torch: pip install '.[train]'")

import torch
from safetensors.numpy import load_file

from model import config as model_config
from model.checkpoint import load_model
from model.config import CONFIGS, ViTConfig, config_for
from model.convert import HUGGING_FACE, META_HUB, TIMM, TIMM_REGISTERS, backbone_shapes, convert, to_dialect
from model.export.formats import Format, export_format, notes, rule_of, transformers_config
from model.export.options import Backbone
from model.pos_embed import resize_pos_embed
from model.preprocess import PreprocessSpec, preprocess

KINDS = {
    "small": ViTConfig(embed_dim=24, depth=3, num_heads=3, img_size=56),
    "giant": ViTConfig(embed_dim=24, depth=2, num_heads=2, img_size=56, ffn="swiglu"),
    "registers": ViTConfig(
        embed_dim=24, depth=2, num_heads=3, img_size=56, num_register_tokens=4, pos_embed_rule="antialias"
    ),
    "giant_registers": ViTConfig(
        embed_dim=24,
        depth=2,
        num_heads=2,
        img_size=56,
        ffn="swiglu",
        num_register_tokens=4,
        pos_embed_rule="antialias",
    ),
}
SPEC = PreprocessSpec(resize=70, crop=56)


@pytest.fixture(autouse=True)
def small_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in KINDS.items():
        monkeypatch.setitem(model_config.CONFIGS, name, config)


def arrays(config: ViTConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in backbone_shapes(config).items()}


def backbone(kind: str = "small", spec: PreprocessSpec = SPEC, **changes: object) -> Backbone:
    config = replace(KINDS[kind], **changes)
    return Backbone("tiny", arrays(config), config, spec, {}, "Apache-2.0")


def assert_bit_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], without: tuple[str, ...] = ()) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(without):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_are_their_own_inverse(kind: str) -> None:
    config, original = KINDS[kind], arrays(KINDS[kind])
    for dialect in (META_HUB, HUGGING_FACE, TIMM_REGISTERS if config.num_register_tokens else TIMM):
        converted = convert(to_dialect(original, config, dialect), config)
        assert converted.dialect is dialect
        changed = ("mask_token", *(["cls_token", "pos_embed"] if dialect is TIMM_REGISTERS else []))
        assert_bit_equal(converted.arrays, original, without=changed if "timm" in dialect.name else ())
    if config.num_register_tokens:  # timm adds the class token's position to the class token
        renamed = to_dialect(original, config, TIMM_REGISTERS)
        np.testing.assert_array_equal(renamed["cls_token"], original["cls_token"] + original["pos_embed"][:, :1])
        np.testing.assert_array_equal(renamed["pos_embed"], original["pos_embed"][:, 1:])


@pytest.mark.parametrize("name", [name for name in CONFIGS if "vitt14" not in name])
def test_the_names_of_timm_are_those_of_its_own_conversion(name: str) -> None:
    """timm's function `_convert_dinov2` makes these names and shapes from Meta's file."""
    config = replace(config_for(name), depth=1)
    if config.embed_dim > 64:  # the names do not depend on the width
        config = replace(config, embed_dim=64, num_heads=1)
    original = arrays(config)
    expected = {}
    for key, array in original.items():
        if key != "mask_token":
            key = key.replace("register_tokens", "reg_token").replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
            expected[key] = array.shape
    if config.num_register_tokens:
        expected["pos_embed"] = (1, config.grid**2, config.embed_dim)
    dialect = TIMM_REGISTERS if config.num_register_tokens else TIMM
    assert {key: array.shape for key, array in to_dialect(original, config, dialect).items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_meta_to_ours_to_transformers_to_ours(kind: str, tmp_path: Path) -> None:
    """The weights are the same bits after each step. transformers itself loads and saves them, if it is installed."""
    original = {name: torch.from_numpy(array) for name, array in arrays(KINDS[kind]).items()}
    torch.save(original, tmp_path / "meta.pth")
    ours = load_model(kind, weights=tmp_path / "meta.pth")
    state = {name: tensor.numpy() for name, tensor in ours.state_dict().items()}
    exported = export_format(Backbone("tiny", state, ours.config, SPEC, {}, "x"), tmp_path / "out", "transformers")
    assert exported.files == ("config.json", "model.safetensors", "preprocessor_config.json")
    transformers = pytest.importorskip("transformers", reason="loads the files: pip install '.[reference]'")
    reference, report = transformers.AutoModel.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference.eval().save_pretrained(tmp_path / "theirs")
    back = load_model(
        kind, weights=tmp_path / "theirs" / "model.safetensors", pos_embed_rule=ours.config.pos_embed_rule
    )
    assert back.config == ours.config
    assert_bit_equal({name: tensor.numpy() for name, tensor in back.state_dict().items()}, state)
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), reference(pixel_values=x).pooler_output, rtol=1e-4, atol=2e-5)


def test_the_configuration_is_that_of_the_published_models() -> None:
    transformers = pytest.importorskip("transformers", reason="reads the file: pip install '.[reference]'")
    for name in ("dinov2_vits14", "dinov2_vitg14", "dinov2_vitl14_reg"):
        config = config_for(name)
        settings = transformers_config(config)
        family = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
        theirs = getattr(transformers, f"{family}Config")(**settings)
        assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.mlp_ratio) == (config.embed_dim, config.depth, 4)
        assert settings["architectures"] == [f"{family}Model"]
        unknown = set(settings) - set(theirs.to_dict()) - {"torch_dtype"}
        assert not unknown


@pytest.mark.parametrize(("fit", "size"), [("crop", (90, 120)), ("squash", (90, 120)), ("crop", (56, 56))])
def test_the_image_processor_gives_the_same_pixels(fit: str, size: tuple[int, int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="reads the file: pip install '.[reference]'")
    spec = SPEC if fit == "crop" else PreprocessSpec(fit="squash", resize=None, crop=56)
    exported = export_format(backbone(spec=spec), tmp_path, "transformers")
    settings = json.loads((exported.folder / "preprocessor_config.json").read_text())
    processor = getattr(transformers, "BitImageProcessorPil", transformers.BitImageProcessor)(**settings)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_allclose(theirs, preprocess(image, spec), atol=2e-2)


@pytest.mark.parametrize(
    "spec",
    [PreprocessSpec(fit="pad", resize=None, crop=56), PreprocessSpec(resize=70, crop=None)],
    ids=["pad", "whole"],
)
def test_preprocessing_that_transformers_does_not_have(spec: PreprocessSpec, tmp_path: Path) -> None:
    exported = export_format(backbone(spec=spec), tmp_path, "transformers")
    assert "preprocessor_config.json" not in exported.files
    assert any("so there is no preprocessor_config.json" in note for note in exported.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_metas_code_loads_what_its_own_code_names(kind: str, tmp_path: Path) -> None:
    exported = export_format(backbone(kind), tmp_path, "meta")
    assert exported.files == ("tiny.pth",)
    state = torch.load(exported.folder / "tiny.pth", weights_only=True)
    assert_bit_equal({name: tensor.numpy() for name, tensor in state.items()}, arrays(KINDS[kind]))
    assert 'torch.load("' in exported.usage


@pytest.mark.parametrize("kind", KINDS)
def test_timms_folder(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind]
    exported = export_format(backbone(kind), tmp_path, "timm")
    settings = json.loads((exported.folder / "config.json").read_text())
    size, reg = ("giant", "reg4_") if "giant" in kind else ("small", "reg4_")
    reg = reg if config.num_register_tokens else ""
    assert settings["architecture"] == f"vit_{size}_patch14_{reg}dinov2"
    arguments = settings["model_args"]
    assert (arguments["embed_dim"], arguments["depth"], arguments["num_heads"]) == (24, config.depth, config.num_heads)
    stored = load_file(exported.folder / "model.safetensors")
    assert int(24 * arguments["mlp_ratio"]) == len(stored["blocks.0.mlp.fc1.bias"])  # timm computes the width so
    assert "mask_token" not in stored
    assert any("mask token" in note for note in exported.notes)
    published = export_format(
        Backbone("s", to_small(), replace(config_for("dinov2_vits14"), depth=12), SPEC, {}, "x"), tmp_path, "timm"
    )
    own = json.loads((published.folder / "config.json").read_text())
    assert own["architecture"] == "vit_small_patch14_dinov2"
    assert own["model_args"] == {"img_size": 518, "dynamic_img_size": True, "patch_size": 14}


def to_small() -> dict[str, np.ndarray]:
    """Return one tensor, because the tensors of a published size are large and their values do not matter."""
    return {"norm.bias": np.zeros(384, np.float32)}


@pytest.mark.parametrize("file_format", ["meta", "timm", "transformers"])
@pytest.mark.parametrize("kind", ["small", "registers"])
def test_the_difference_of_positions_is_told_when_there_is_one(file_format: Format, kind: str) -> None:
    """It is told exactly if the other library's positions at another size differ from this model's."""
    config = KINDS[kind]
    positions = arrays(config)["pos_embed"]
    for rule in ("offset", "antialias", "size"):
        told = [note for note in notes(backbone(kind, pos_embed_rule=rule), file_format) if "only at 56x56" in note]
        ours, theirs = (resize_pos_embed(positions, (3, 2), r) for r in (rule, rule_of(file_format, config)))
        assert bool(told) == (not np.array_equal(ours, theirs))
        if told:
            assert f"by the rule {rule_of(file_format, config)}, and this model uses {rule}" in told[0]
    expected = (
        "antialias" if kind == "registers" or file_format == "timm" else {"meta": "offset"}.get(file_format, "size")
    )
    assert rule_of(file_format, config) == expected


def test_a_model_without_layerscale_gets_gains_that_change_nothing(tmp_path: Path) -> None:
    exported = export_format(backbone(layerscale_init=None), tmp_path, "meta")
    assert any("no LayerScale" in note for note in exported.notes)
    model = load_model("small", weights=exported.folder / "tiny.pth")
    assert (model.blocks[0].ls1.gamma == 1).all()


def test_half_precision_and_values_that_it_cannot_hold(tmp_path: Path) -> None:
    exported = export_format(backbone(), tmp_path, "transformers", "float16")
    assert {array.dtype.name for array in load_file(exported.folder / "model.safetensors").values()} == {"float16"}
    assert json.loads((exported.folder / "config.json").read_text())["torch_dtype"] == "float16"
    large = backbone()
    large.weights["norm.bias"][2] = 1e5
    with pytest.raises(ValueError, match=r"weights in float16: the tensor layernorm\.bias contains 1 of 24 values"):
        export_format(large, tmp_path / "large", "transformers", "float16")
    assert not (tmp_path / "large").exists()


def test_nothing_is_overwritten_or_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_format(backbone(), tmp_path, "meta")
    with pytest.raises(ValueError, match="tiny-meta exists: delete it, or choose another --out or --name"):
        export_format(backbone(), tmp_path, "meta")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.export.formats.write_text", full)
    with pytest.raises(OSError, match="No space"):
        export_format(backbone(), tmp_path, "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-meta"]
