"""Code written for torch hub's models works with `hubconf.py`, and each result has a plain definition.

`benchmarks/hub_oracles.py` compares the same calls with Meta's code and with recorded numbers.
"""

import subprocess
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the adapters are torch modules: pip install '.[train]'")

import torch
from torch import Tensor, nn

import hubconf
from model import config as model_config
from model import zoo
from model.checkpoint import load_model, save_checkpoint
from model.config import ViTConfig
from model.convert import CheckpointError
from model.hub import HubModel, LinearClassifier, backbone_entry, classifier_entry, hub_model
from model.vit import DinoVisionTransformer

ROOT = Path(__file__).resolve().parents[3]
PLAIN = ViTConfig(embed_dim=24, depth=5, num_heads=3, img_size=56)
REGISTERS = replace(PLAIN, num_register_tokens=4, pos_embed_rule="antialias", ffn="swiglu")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the two smallest published architectures small."""
    monkeypatch.setitem(model_config.CONFIGS, "dinov2_vits14", PLAIN)
    monkeypatch.setitem(model_config.CONFIGS, "dinov2_vits14_reg", REGISTERS)


def network(config: ViTConfig) -> DinoVisionTransformer:
    torch.manual_seed(2)
    model = DinoVisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def adapter(config: ViTConfig) -> HubModel:
    model = HubModel(config)
    model.load_state_dict(network(config).state_dict())
    return model.eval()


def images(n: int = 2, height: int = 42, width: int = 70) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(height))


def masks(n: int = 2, patches: int = 15) -> Tensor:
    return torch.rand(n, patches, generator=torch.Generator().manual_seed(patches)) < 0.4


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(network(PLAIN).state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.mark.parametrize("config", [PLAIN, REGISTERS], ids=["plain", "registers"])
@torch.inference_mode()
def test_calls_of_the_model(config: ViTConfig) -> None:
    model, plain, x, m = adapter(config), network(config), images(), masks()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    for given, features in ((None, model(x, is_training=True)), (m, model(x, masks=m, is_training=True))):
        expected = plain.forward_features(x, given)
        assert features.keys() == expected.keys()
        assert features.pop("masks") is given
        expected.pop("masks")
        torch.testing.assert_close(features, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(x, m), plain.forward_features(x, m)["x_norm_clstoken"], rtol=0, atol=0)
    assert not torch.equal(model(x, masks=m), model(x))


@torch.inference_mode()
def test_lists_of_inputs_give_lists_of_features() -> None:
    model, first, second = adapter(PLAIN), images(2), images(3, 56, 28)
    apart = [model.forward_features(first, masks()), model.forward_features(second)]
    together = model([first, second], masks=[masks(), None], is_training=True)
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        torch.testing.assert_close(one["x_prenorm"], other["x_prenorm"], rtol=0, atol=0)
    assert together[0]["masks"] is not None
    assert together[1]["masks"] is None
    unmasked = model.forward_features([first, second])
    torch.testing.assert_close(unmasked[1]["x_norm_patchtokens"], apart[1]["x_norm_patchtokens"], rtol=0, atol=0)
    torch.testing.assert_close(model([first, second])[1], model(second), rtol=0, atol=0)
    with pytest.raises(ValueError, match="shorter"):
        model([first, second], masks=[None])


@torch.inference_mode()
def test_intermediate_layers() -> None:
    model, plain, x = adapter(REGISTERS), network(REGISTERS), images()
    for options in ({}, {"n": 3}, {"n": [0, 2], "norm": False}, {"n": 2, "return_class_token": True}):
        ours, theirs = model.get_intermediate_layers(x, **options), plain.get_intermediate_layers(x, **options)
        assert type(ours) is tuple
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    grids = model.get_intermediate_layers(x, n=2, reshape=True)
    assert all(grid.shape == (2, 24, 3, 5) and grid.is_contiguous() for grid in grids)
    grids[0].view(2, -1)


@pytest.mark.parametrize(
    ("config", "interpolation"),
    [
        (PLAIN, (False, 0.1)),
        (REGISTERS, (True, 0.0)),
        (replace(PLAIN, pos_embed_rule="size"), (False, 0.0)),
    ],
)
def test_attributes(config: ViTConfig, interpolation: tuple[bool, float]) -> None:
    model = adapter(config)
    assert (model.embed_dim, model.num_features, model.n_blocks, model.num_heads) == (24, 24, 5, 3)
    assert (model.num_tokens, model.num_register_tokens) == (1, config.num_register_tokens)
    assert (model.patch_size, model.chunked_blocks, len(model.blocks)) == (14, False, 5)
    assert (model.interpolate_antialias, model.interpolate_offset) == interpolation
    assert isinstance(model.head, nn.Identity)
    embed = model.patch_embed
    assert (embed.img_size, embed.patch_size, embed.patches_resolution) == ((56, 56), (14, 14), (4, 4))
    assert (embed.num_patches, embed.in_chans, embed.embed_dim) == (16, 3, 24)
    assert model.state_dict().keys() == network(config).state_dict().keys()


@pytest.mark.parametrize("config", [PLAIN, REGISTERS], ids=["plain", "registers"])
@torch.inference_mode()
def test_positions_are_those_that_the_tokens_get(config: ViTConfig) -> None:
    """In Meta's code, `w` is the height. A grid that is not square shows an exchange."""
    model, x = adapter(config), images()
    patches = model.patch_embed(x)
    tokens = torch.cat((model.cls_token.expand(2, -1, -1), patches), dim=1)
    positions = model.interpolate_pos_encoding(tokens, x.shape[2], x.shape[3])
    assert positions.shape == (1, 16, 24)
    prepared = model.prepare_tokens_with_masks(x)
    without_registers = torch.cat((prepared[:, :1], prepared[:, 1 + config.num_register_tokens :]), dim=1)
    torch.testing.assert_close(tokens + positions, without_registers)
    assert model.interpolate_pos_encoding(tokens.half(), 42, 70).dtype == torch.float16
    torch.testing.assert_close(model.interpolate_pos_encoding(tokens, 56, 56), model.pos_embed)


def test_the_head_can_be_replaced() -> None:
    model = adapter(PLAIN)
    model.head = nn.Linear(24, 3)
    assert model(images()).shape == (2, 3)


# The entry points


def test_torch_hub_loads_from_this_folder(weights: Path) -> None:
    names = [f"dinov2_vit{size}14{reg}{head}" for size in "sblg" for reg in ("", "_reg") for head in ("", "_lc")]
    assert set(names) == set(hubconf.__all__) - {"dinov2", "dinov2_timm"}
    assert [getattr(hubconf, name).__name__ for name in names] == names
    model = torch.hub.load(str(ROOT), "dinov2_vits14", source="local", weights=weights)
    assert model.n_blocks == 5
    torch.testing.assert_close(model(images()), network(PLAIN)(images()))


def test_a_module_of_the_same_name_is_reported(tmp_path: Path) -> None:
    """A user's own `model.py` hides this project's package. The message names the file."""
    (tmp_path / "model.py").write_text("")
    code = f"import model, sys; sys.path.insert(0, {str(ROOT)!r}); import hubconf"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"a module named model is already imported from {tmp_path / 'model.py'}" in result.stderr


def test_weights_of_every_kind(weights: Path, tmp_path: Path) -> None:
    make = backbone_entry("dinov2_vits14")
    config = replace(PLAIN, img_size=42, pos_embed_rule="size")
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoint.safetensors", network(config).state_dict(), config, {})
    assert (make(weights=str(weights)).config, make(weights=run).config) == (PLAIN, config)
    assert make(weights=run, interpolate_antialias=True, interpolate_offset=0.0).config.pos_embed_rule == "antialias"
    assert make(weights=weights, img_size=56).config == PLAIN
    with pytest.raises(ValueError, match="img_size=224: the weights have positions for 56 pixels"):
        make(weights=weights, img_size=224)
    assert hub_model(run).config == config
    with pytest.raises(CheckpointError, match=r"not a dinov2_vits14_reg: .*num_register_tokens 0 instead of 4"):
        backbone_entry("dinov2_vits14_reg")(weights=run)
    with pytest.raises(FileNotFoundError, match="no such file"):
        make(weights=tmp_path / "none.pth")
    with pytest.raises(TypeError, match="ffn_layer"):
        make(weights=weights, ffn_layer="mlp")


def test_weights_that_are_not_finite(weights: Path) -> None:
    state = torch.load(weights)
    state["norm.weight"][3] = float("nan")
    torch.save(state, weights)
    with pytest.raises(
        CheckpointError, match=r"the tensor norm\.weight contains 1 of 24 values that are NaN or infinite"
    ):
        backbone_entry("dinov2_vits14")(weights=weights)


def test_random_weights_start_as_metas() -> None:
    model = backbone_entry("dinov2_vits14")(pretrained=False, img_size=28, drop_path_rate=0.2)
    assert model.pos_embed.shape == (1, 5, 24)
    assert (model.blocks[0].ls1.gamma == 1).all()  # Meta's hub code sets 1.0, not the 1e-5 of training
    assert model.blocks[0].drop_path_rate == 0.2
    assert model.pos_embed.std() > 0.01
    with pytest.raises(ValueError, match=r"\(interpolate_antialias, interpolate_offset\)=\(True, 0.1\)"):
        backbone_entry("dinov2_vits14")(pretrained=False, interpolate_antialias=True)


class PublishedWeights(Enum):
    LVD142M = "LVD142M"


@pytest.mark.parametrize("named", ["LVD142M", PublishedWeights.LVD142M])
def test_published_weights_are_downloaded(named: object, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("model.downloads.download", lambda entry, options: asked.append(entry.name) or weights)
    monkeypatch.setattr("model.downloads.downloaded_source", lambda entry, options: zoo.Source("https://x/w", "w.pth"))
    model = backbone_entry("dinov2_vits14")(weights=named)
    assert asked == ["dinov2_vits14"]
    torch.testing.assert_close(model(images()), network(PLAIN)(images()))


# Linear classifiers


def head(layers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(layers)
    shape = (7, (1 + layers) * 24)
    return {"weight": torch.randn(shape, generator=generator), "bias": torch.randn(7, generator=generator)}


@pytest.mark.parametrize(("layers", "name"), [(1, "linear"), (4, "linear4")])
@torch.inference_mode()
def test_linear_classifiers(
    layers: int, name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = tmp_path / f"dinov2_vits14_{name}_head.pth", []
    torch.save(head(layers), file)
    monkeypatch.setattr("model.downloads.download", lambda entry, options: asked.append((entry, options)) or file)
    model = classifier_entry("dinov2_vits14")(layers=layers, backbone_weights=weights).eval()
    (entry, options) = asked[0]
    assert [source.url for source in entry.sources(options.hosts)] == [
        f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/{file.name}"
    ]
    x, plain = images(), network(PLAIN)
    blocks = plain.get_intermediate_layers(x, n=4, return_class_token=True)
    mean = blocks[3][0].mean(dim=1)
    inputs = [blocks[3][1], mean] if layers == 1 else [*(cls for _, cls in blocks), mean]
    expected = torch.cat(inputs, dim=1) @ head(layers)["weight"].T + head(layers)["bias"]
    torch.testing.assert_close(model(x), expected)
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "linear_head"}


def test_files_of_heads(weights: Path, tmp_path: Path) -> None:
    make = classifier_entry("dinov2_vits14")
    torch.save(head(4), tmp_path / "head.pth")
    model = make(weights=tmp_path / "head.pth", backbone_weights=weights)
    torch.testing.assert_close(model.linear_head.weight, head(4)["weight"])
    with pytest.raises(ValueError, match=r"head\.pth: a head for 4 blocks, but layers=1"):
        make(layers=1, weights=tmp_path / "head.pth", backbone_weights=weights)
    with pytest.raises(ValueError, match="layers=2: 1 or 4"):
        make(layers=2)
    untrained = make(layers=1, pretrained=False)
    assert isinstance(untrained, LinearClassifier)
    assert untrained(images()).shape == (2, 1000)


def test_the_file_of_a_head_with_registers_has_metas_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(network(REGISTERS).state_dict(), tmp_path / "w.pth")
    asked = []

    def download(entry: zoo.ZooEntry, options: zoo.DownloadOptions) -> Path:
        asked.append(entry.path)
        raise zoo.DownloadError("offline")

    monkeypatch.setattr("model.downloads.download", download)
    for layers in (1, 4):
        with pytest.raises(zoo.DownloadError):
            classifier_entry("dinov2_vits14_reg")(layers=layers, backbone_weights=tmp_path / "w.pth")
    assert asked == [f"dinov2_vits14/dinov2_vits14_reg4_linear{n}_head.pth" for n in ("", "4")]


def test_a_checkpoint_of_ours_is_one_line_away(tmp_path: Path) -> None:
    config = replace(PLAIN, embed_dim=36, depth=2)
    save_checkpoint(tmp_path / "checkpoint.safetensors", network(config).state_dict(), config, {})
    model = torch.hub.load(str(ROOT), "dinov2", tmp_path, source="local")
    torch.testing.assert_close(model(images()), load_model(tmp_path)(images()))
