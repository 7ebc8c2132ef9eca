"""Tests that checkpoints of every format load into the same backbone, and that every fault of a file is reported."""

import logging
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="weights are read with torch: pip install '.[train]'")

from safetensors.torch import load_file, save_file  # noqa: E402

import model as model_package  # noqa: E402
from model import config as model_config  # noqa: E402
from model.checkpoint import load_checkpoint, load_model, load_state_dict_file, save_checkpoint  # noqa: E402
from model.config import ViTConfig  # noqa: E402
from model.convert import MAX_LISTED, CheckpointError  # noqa: E402
from model.vit import DinoVisionTransformer  # noqa: E402
from tests.disk_log import DiskLog  # noqa: E402

StateDict = dict[str, torch.Tensor]

TINY = {
    "test_plain": ViTConfig(embed_dim=16, depth=4, num_heads=2, img_size=56),
    "test_reg": ViTConfig(
        embed_dim=16, depth=4, num_heads=2, img_size=56, num_register_tokens=4, pos_embed_rule="antialias"
    ),
    "test_swiglu": ViTConfig(embed_dim=16, depth=4, num_heads=2, img_size=56, ffn="swiglu"),
    "test_swiglu_reg": ViTConfig(
        embed_dim=16,
        depth=4,
        num_heads=2,
        img_size=56,
        ffn="swiglu",
        num_register_tokens=4,
        pos_embed_rule="antialias",
    ),
}


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register small models under names of their own, so that the test files are only kilobytes."""
    for name, config in TINY.items():
        monkeypatch.setitem(model_config.CONFIGS, name, config)


def random_model(name: str, img_size: int = 56) -> DinoVisionTransformer:
    torch.manual_seed(3)
    model = DinoVisionTransformer(replace(TINY[name], img_size=img_size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def features(model: DinoVisionTransformer, size: tuple[int, int] = (42, 70)) -> torch.Tensor:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        return model.forward_features(x)["x_prenorm"]


# The four formats, made from Meta's by the documented key maps. They go the other way round than the converter.


def as_meta(state: StateDict) -> StateDict:
    return dict(state)


def as_dump(state: StateDict) -> StateDict:
    heads = {
        f"{head}.{key}": torch.ones(2)
        for head in ("dino_head", "ibot_head")
        for key in ("mlp.0.weight", "mlp.0.bias", "mlp.4.weight", "last_layer.weight_g", "last_layer.weight_v")
    }
    return {f"backbone.{key}": value for key, value in state.items()} | heads


def as_chunked_dump(state: StateDict) -> StateDict:
    """Return the dump's tensors as FSDP names them: two chunks of two blocks. The block index continues in the second
    chunk: blocks.1.2, blocks.1.3.
    """
    renamed = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            index = key.split(".")[1]
            key = key.replace("blocks.", f"blocks.{int(index) // 2}.", 1)
        renamed[key] = value
    return as_dump(renamed)


def as_timm(state: StateDict) -> StateDict:
    state = {
        key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): value
        for key, value in state.items()
        if key != "mask_token"
    }
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
    return state


def as_hugging_face(state: StateDict) -> StateDict:
    swaps = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("blocks.", "encoder.layer."),
        ("attn.proj", "attention.output.dense"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("mlp.w12", "mlp.weights_in"),
        ("mlp.w3", "mlp.weights_out"),
    ]
    renamed: StateDict = {}
    for key, value in state.items():
        if key in ("cls_token", "mask_token", "register_tokens"):
            renamed[f"embeddings.{key}"] = value
        elif key.startswith("norm."):
            renamed[f"layer{key}"] = value
        else:
            for old, new in swaps:
                key = key.replace(old, new)
            if ".attn.qkv." in key:
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[key.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
            else:
                renamed[key] = value
    return renamed


def save_meta(tensors: StateDict, path: Path) -> None:
    torch.save(tensors, path)


def save_dump(tensors: StateDict, path: Path) -> None:
    torch.save({"teacher": tensors}, path)


def save_safe(tensors: StateDict, path: Path) -> None:
    save_file(tensors, path)


FORMATS = {
    "meta": (as_meta, save_meta),
    "dump": (as_dump, save_dump),
    "chunked": (as_chunked_dump, save_dump),
    "timm": (as_timm, save_safe),
    "hugging-face": (as_hugging_face, save_safe),
}
RULES = {  # format, with registers -> rule
    ("meta", False): "offset",
    ("dump", False): "offset",
    ("chunked", False): "offset",
    ("timm", False): "antialias",
    ("hugging-face", False): "size",
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_gives_the_same_backbone(file_format: str, name: str, tmp_path: Path) -> None:
    original = random_model(name)
    convert, save = FORMATS[file_format]
    save(convert(original.state_dict()), tmp_path / "weights")
    loaded = load_model(name, weights=tmp_path / "weights")
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.pos_embed_rule == RULES.get((file_format, "_reg" in name), "antialias")
    original.config = replace(original.config, pos_embed_rule=loaded.config.pos_embed_rule)
    torch.testing.assert_close(features(loaded), features(original))
    if file_format == "timm":
        assert loaded.mask_token.abs().max() == 0
    else:
        torch.testing.assert_close(loaded.mask_token, original.mask_token)


@pytest.mark.parametrize("rule", ["offset", "antialias", "size"])
def test_resize_rule_can_be_overridden(rule: str, tmp_path: Path) -> None:
    original = random_model("test_plain")
    save_safe(as_hugging_face(original.state_dict()), tmp_path / "weights")
    loaded = load_model("test_plain", weights=tmp_path / "weights", pos_embed_rule=rule)
    assert loaded.config.pos_embed_rule == rule
    original.config = replace(original.config, pos_embed_rule=rule)
    torch.testing.assert_close(features(loaded), features(original))
    with pytest.raises(ValueError, match="pos_embed_rule"):
        load_model("test_plain", weights=tmp_path / "weights", pos_embed_rule="bilinear")


def test_a_dump_brings_its_image_size(tmp_path: Path) -> None:
    """A dump of training at 224 pixels has 257 positions. The released weights have 1370."""
    original = random_model("test_plain", img_size=28)
    save_dump(as_dump(original.state_dict()), tmp_path / "dump.pth")
    loaded = load_model("test_plain", weights=tmp_path / "dump.pth")
    assert loaded.config.img_size == 28
    torch.testing.assert_close(features(loaded), features(original))
    save_meta(original.state_dict(), tmp_path / "hub.pth")
    with pytest.raises(CheckpointError, match=r"misshapen keys: 1 \(pos_embed \[1, 5, 16\] instead of \[1, 17, 16\]\)"):
        load_model("test_plain", weights=tmp_path / "hub.pth")


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in random_model("test_plain").state_dict().items()}
    save_meta(state, tmp_path / "weights")
    assert {p.dtype for p in load_model("test_plain", weights=tmp_path / "weights").parameters()} == {torch.float32}


def test_dropped_heads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_dump(as_dump(random_model("test_plain").state_dict()), tmp_path / "weights")
    with caplog.at_level(logging.INFO):
        load_model("test_plain", weights=tmp_path / "weights")
    assert "left out 10 tensors of dino_head, ibot_head" in caplog.text


def remove(*names: str) -> Callable[[StateDict], None]:
    return lambda state: [state.pop(name) for name in names] and None


def put(**tensors: torch.Tensor) -> Callable[[StateDict], None]:
    return lambda state: state.update({name.replace("__", "."): value for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("file_format", "damage", "message"),
    [
        ("meta", remove("norm.bias", "blocks.2.ls1.gamma"), r"missing keys: 2 \(blocks.2.ls1.gamma, norm.bias\)"),
        ("meta", put(head__weight=torch.zeros(3)), r"extra keys: 1 \(head.weight\)"),
        ("meta", put(norm__bias=torch.zeros(9)), r"misshapen keys: 1 \(norm.bias \[9\] instead of \[16\]\)"),
        ("meta", put(dino_head__x=torch.zeros(1)), r"extra keys: 1 \(dino_head.x\)"),  # no heads in a hub file
        ("dump", remove("backbone.cls_token"), r"missing keys: 1 \(cls_token\)"),
        ("dump", put(dino_loss__center=torch.zeros(1)), r"extra keys: 1 \(dino_loss.center\)"),
        ("chunked", put(backbone__blocks__0__2__norm1__bias=torch.zeros(16)), "are the same tensor"),
        ("timm", put(fc_norm__bias=torch.zeros(16)), r"extra keys: 1 \(fc_norm.bias\)"),
        (
            "hugging-face",
            remove("encoder.layer.1.attention.attention.key.weight"),
            r"missing keys: 1 \(encoder.layer.1.attention.attention.key.weight\)",
        ),
        (
            "hugging-face",
            put(encoder__layer__0__attention__attention__value__bias=torch.zeros(17)),
            r"misshapen keys: 1 \(encoder.layer.0.attention.attention.value.bias \[17\] instead of \[16\]\)",
        ),
        ("hugging-face", put(pooler__bias=torch.zeros(1)), r"extra keys: 1 \(pooler.bias\)"),
    ],
)
def test_what_does_not_fit_is_listed(
    file_format: str, damage: Callable[[StateDict], None], message: str, tmp_path: Path
) -> None:
    convert, save = FORMATS[file_format]
    tensors = convert(random_model("test_plain").state_dict())
    damage(tensors)
    save(tensors, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model("test_plain", weights=tmp_path / "weights")
    assert str(tmp_path / "weights") in str(caught.value)


def test_all_problems_come_in_one_bounded_message(tmp_path: Path) -> None:
    state = random_model("test_plain").state_dict()
    state = {key.replace("blocks.", "layers."): value for key, value in state.items()} | {"norm.bias": torch.zeros(2)}
    save_meta(state, tmp_path / "weights")
    with pytest.raises(CheckpointError) as caught:
        load_model("test_plain", weights=tmp_path / "weights")
    message = str(caught.value)
    assert "missing keys: 56" in message
    assert "extra keys: 56" in message
    assert "misshapen keys: 1" in message
    assert message.count(f"and {56 - MAX_LISTED} more") == 2
    assert len(message) < 2000


def test_registers_of_the_file_and_of_the_name_must_agree(tmp_path: Path) -> None:
    save_meta(random_model("test_reg").state_dict(), tmp_path / "reg")
    with pytest.raises(CheckpointError, match=r"extra keys: 1 \(register_tokens\)"):
        load_model("test_plain", weights=tmp_path / "reg")
    save_meta(random_model("test_plain").state_dict(), tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"missing keys: 1 \(register_tokens\)"):
        load_model("test_reg", weights=tmp_path / "plain")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (Path("exploded"),)


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": torch.zeros(1), "extra": Bomb()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"cls_token": Bomb()}, protocol=2))
    for name, message in (("new.pth", "could run any code"), ("old.pth", "not a readable ZIP archive")):
        with pytest.raises(CheckpointError, match=message):
            load_state_dict_file(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", b"\x08\0\0\0\0\0\0\0{not js}", b"\xff\xff\xff\xff\xff\xff\xff\x7f{", b"PK"],
)
def test_files_that_are_no_weights(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "weights")):
        load_state_dict_file(tmp_path / "weights")


@pytest.mark.parametrize("save", [save_meta, save_safe])
def test_a_truncated_file(save: Callable[[StateDict, Path], None], tmp_path: Path) -> None:
    save(random_model("test_plain").state_dict(), tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path / "weights")):
        load_state_dict_file(tmp_path / "weights")


def test_other_contents(tmp_path: Path) -> None:
    torch.save({"optimizer": {"lr": 1}, "epoch": 3}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"found \['optimizer', 'epoch'\]"):
        load_state_dict_file(tmp_path / "weights")
    save_safe({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet")
    with pytest.raises(CheckpointError, match="not the weights of a DINOv2 backbone"):
        load_model("test_plain", weights=tmp_path / "resnet")
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        load_state_dict_file(tmp_path / "nothing")


# Our own checkpoints


@pytest.mark.parametrize("name", TINY)
def test_own_checkpoint_survives(name: str, tmp_path: Path) -> None:
    original = random_model(name, img_size=42)
    config = replace(original.config, pos_embed_rule="size", layerscale_init=0.1)
    save_checkpoint(tmp_path / "sub" / "c.safetensors", original.state_dict(), config, {"seed": 3, "knn": 0.5})
    state_dict, loaded_config, provenance = load_checkpoint(tmp_path / "sub" / "c.safetensors")
    assert loaded_config == config
    assert provenance == {"seed": 3, "knn": 0.5}
    assert state_dict.keys() == original.state_dict().keys()
    for key, value in original.state_dict().items():
        torch.testing.assert_close(state_dict[key], value, rtol=0, atol=0)
    model = load_model(name, weights=tmp_path / "sub" / "c.safetensors")
    assert model.config == config
    original.config = config
    torch.testing.assert_close(features(model), features(original))
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["c.safetensors"]
    assert stat.S_IMODE((tmp_path / "sub" / "c.safetensors").stat().st_mode) == 0o644


def test_own_checkpoint_of_another_shape(tmp_path: Path) -> None:
    original = random_model("test_reg")
    save_checkpoint(tmp_path / "c", original.state_dict(), original.config, {})
    with pytest.raises(CheckpointError, match="not a test_plain: num_register_tokens 4 instead of 0"):
        load_model("test_plain", weights=tmp_path / "c")
    with pytest.raises(CheckpointError, match="extra keys: 1"):
        save_checkpoint(tmp_path / "d", original.state_dict(), TINY["test_plain"], {})
    assert not (tmp_path / "d").exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = random_model("test_plain")
    log = DiskLog(monkeypatch)
    save_checkpoint(tmp_path / "c", original.state_dict(), original.config, {})
    log.assert_durable(tmp_path / "c")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = random_model("test_plain")
    save_checkpoint(tmp_path / "c", original.state_dict(), original.config, {"n": 1})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        save_checkpoint(tmp_path / "c", original.state_dict(), original.config, {"n": 2})
    assert load_checkpoint(tmp_path / "c")[2] == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "not a checkpoint of this project"),
        ({"format": "dinov2-service"}, "metadata cannot be read"),
        ({"format": "dinov2-service", "config": '{"embed_dim": 16}'}, "metadata cannot be read"),
        ({"format": "dinov2-service", "config": '{"embed_dim": 16, "rope": 1}'}, r"unknown fields \['rope'\]"),
    ],
)
def test_metadata_that_is_not_ours(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file(random_model("test_plain").state_dict(), tmp_path / "c", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "c")


def test_save_does_not_change_tensors(tmp_path: Path) -> None:
    original = random_model("test_plain")
    save_checkpoint(tmp_path / "c", original.state_dict(), original.config, {})
    stored = load_file(tmp_path / "c")
    assert all(torch.equal(stored[key], value) for key, value in original.state_dict().items())


# Names


def test_aliases_and_unknown_names(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = DinoVisionTransformer(model_config.config_for("dinov2_vits14")).state_dict()
    save_meta({key: torch.zeros(value.shape) for key, value in shapes.items()}, tmp_path / "w.pth")
    for name in ("dinov2_vits14", "facebook/dinov2-small", "vit_small_patch14_dinov2.lvd142m"):
        assert model_package.load_model(name, weights=tmp_path / "w.pth").embed_dim == 384
    with pytest.raises(ValueError, match="did you mean dinov2_vits14"):
        load_model("dinov2_vits15", weights=tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no weights are published for 'dinov2_vitt14'"):
        load_model("dinov2_vitt14")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model_package.nothing
