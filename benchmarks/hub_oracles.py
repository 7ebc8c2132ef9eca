"""Compare the adapters for torch hub's and timm's code with the numbers and with the code of facebookresearch/dinov2.

    python benchmarks/hub_oracles.py [--oracles FILE] [--official CHECKOUT] [--out results.json]

- `oracles`: recorded outputs of Meta's `dinov2_vits14` on regenerated weights (tests/data/README.md), against
  `torch.hub.load(THIS_FOLDER, "dinov2_vits14", source="local", weights=FILE)` and against `TimmModel`
- `official`: every call that code for torch hub's models makes, on small random models of each kind (MLP and SwiGLU,
  with and without registers), against the same call in a checkout of facebookresearch/dinov2. Its code runs without
  xFormers, except for lists of inputs, which are compared with one call per input.

Each figure is the largest absolute difference of any element. The attributes must be equal.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.checkpoint import save_checkpoint  # noqa: E402
from model.config import ViTConfig, config_for  # noqa: E402
from model.hub import HubModel, LinearClassifier, TimmModel, hub_model  # noqa: E402
from model.timm_config import timm_config  # noqa: E402
from model.vit import DinoVisionTransformer  # noqa: E402
from tests.model.test_vit import oracle_image, oracle_weights  # noqa: E402

ORACLES = ROOT / "tests" / "data" / "dinov2_vits14.npz"
SIZES = ((224, 224), (518, 518), (98, 98), (224, 336))
ATTRIBUTES = (
    *("embed_dim", "num_features", "num_tokens", "n_blocks", "num_heads", "patch_size", "num_register_tokens"),
    *("interpolate_antialias", "interpolate_offset", "chunked_blocks"),
)
PATCH_ATTRIBUTES = ("img_size", "patch_size", "patches_resolution", "num_patches", "in_chans", "embed_dim")


def summary(cls: Tensor, patches: Tensor, layers: Any = None) -> dict[str, Tensor]:
    """Return the values of which the oracle file has a record."""
    values = {"x_norm_clstoken": cls, "x_norm_patchtokens_mean": patches.mean(dim=1)}
    if layers is not None:
        values["x_norm_patchtokens_every_17th"] = patches[:, ::17]
        for index, (block, token) in enumerate(layers):
            values |= {f"layer-{4 - index}/cls": token, f"layer-{4 - index}/patch_mean": block.mean(dim=1)}
    return values


@torch.inference_mode()
def compare_oracles(file: Path) -> dict[str, dict[str, float]]:
    config = config_for("dinov2_vits14")
    plain = DinoVisionTransformer(config)
    plain.load_state_dict(oracle_weights(plain))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(plain.state_dict(), path)
        hub = torch.hub.load(str(ROOT), "dinov2_vits14", source="local", weights=path).eval()
    timm = TimmModel(config, timm_config(config, None)).eval()
    timm.load_state_dict(plain.state_dict())
    with np.load(file) as stored:
        entries = {key.removeprefix("dinov2_vits14/"): stored[key] for key in stored.files}
    errors: dict[str, dict[str, float]] = {"HubModel": {}, "TimmModel": {}}
    for h, w in SIZES:
        x = oracle_image(11 + 1000 * h + w, 2, h, w)
        features = hub(x, is_training=True)
        layers = hub.get_intermediate_layers(x, n=4, return_class_token=True)
        ours = summary(hub(x), features["x_norm_patchtokens"], layers)
        errors["HubModel"][f"{h}x{w}"] = largest(entries, f"{h}x{w}", ours)
        tokens = timm.forward_features(x)
        pairs = timm.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
        ours = summary(timm.forward_head(tokens), tokens[:, 1:], [(patches, prefix[:, 0]) for patches, prefix in pairs])
        errors["TimmModel"][f"{h}x{w}"] = largest(entries, f"{h}x{w}", ours)
    masks = torch.from_numpy(np.random.default_rng(11 + 9).random((2, 256)) < 0.3)
    masked = hub(oracle_image(11 + 7, 2, 224, 224), masks=masks, is_training=True)
    ours = summary(masked["x_norm_clstoken"], masked["x_norm_patchtokens"])
    errors["HubModel"]["masked224"] = largest(entries, "masked224", ours)
    return errors


def largest(entries: dict[str, np.ndarray], group: str, ours: dict[str, Tensor]) -> float:
    expected = {key.partition("/")[2]: value for key, value in entries.items() if key.startswith(f"{group}/")}
    assert expected.keys() == ours.keys(), (sorted(expected), sorted(ours))
    return max(float(np.abs(ours[key].numpy() - value).max()) for key, value in expected.items())


def variants() -> Iterator[tuple[str, ViTConfig]]:
    for registers in (0, 4):
        for ffn in ("mlp", "swiglu"):
            yield (
                f"{ffn}, {registers} registers",
                ViTConfig(
                    embed_dim=64,
                    depth=5,
                    num_heads=4,
                    ffn=ffn,
                    img_size=98,
                    num_register_tokens=registers,
                    pos_embed_rule="antialias" if registers else "offset",
                ),
            )


def official_model(config: ViTConfig) -> Any:
    """Return Meta's network of this shape. Its class must be importable."""
    from dinov2.models.vision_transformer import DinoVisionTransformer as Official  # type: ignore[import-not-found]

    return Official(
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        ffn_layer="mlp" if config.ffn == "mlp" else "swiglufused",
        init_values=1.0,
        block_chunks=0,
        num_register_tokens=config.num_register_tokens,
        interpolate_antialias=config.pos_embed_rule == "antialias",
        interpolate_offset=0.1 if config.pos_embed_rule == "offset" else 0.0,
    ).eval()


@torch.inference_mode()
def compare_official(config: ViTConfig) -> dict[str, float]:
    """Return the largest difference of each call between Meta's code and `HubModel`."""
    theirs = official_model(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save_checkpoint(path, theirs.state_dict(), config, {})
        ours = hub_model(path).eval()
    assert isinstance(ours, HubModel)
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in PATCH_ATTRIBUTES:
        assert getattr(ours.patch_embed, name) == getattr(theirs.patch_embed, name), name
    assert isinstance(ours.head, torch.nn.Identity)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    errors: dict[str, float] = {}
    for h, w in ((98, 98), (42, 70), (112, 98)):
        x = torch.randn(2, 3, h, w, generator=generator)
        masks = torch.rand(2, h * w // 14**2, generator=generator) < 0.4
        for name, call in calls(x, masks):
            errors[f"{name} at {h}x{w}"] = difference(call(ours), call(theirs))
    first, second = torch.randn(2, 3, 98, 98, generator=generator), torch.randn(3, 3, 42, 42, generator=generator)
    masks = torch.rand(2, 49, generator=generator) < 0.4
    apart = [theirs(first, masks=masks, is_training=True), theirs(second, masks=None, is_training=True)]
    errors["list of inputs"] = difference(ours([first, second], masks=[masks, None], is_training=True), apart)
    return errors | compare_classifiers(ours, theirs, generator)


def calls(x: Tensor, masks: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield the calls to compare, as functions of a model."""
    h, w = x.shape[-2:]
    yield "model(x)", lambda model: model(x)
    yield "is_training=True", lambda model: model(x, is_training=True)
    yield "masks=m", lambda model: model(x, masks=masks)
    yield "masks=m, is_training=True", lambda model: model(x, masks, is_training=True)
    yield "forward_features", lambda model: model.forward_features(x, masks)
    yield "prepare_tokens_with_masks", lambda model: model.prepare_tokens_with_masks(x, masks)
    tokens = torch.zeros(2, 1 + masks.shape[1], 64)  # only their number and type matter
    yield "interpolate_pos_encoding", lambda model: model.interpolate_pos_encoding(tokens, h, w)
    for options in (
        {},
        {"n": 3},
        {"n": [0, 2], "reshape": True},
        {"n": 2, "return_class_token": True, "norm": False},
        {"n": range(1, 4), "reshape": True, "return_class_token": True},
    ):
        yield (
            f"get_intermediate_layers({options})",
            lambda model, options=options: model.get_intermediate_layers(x, **options),
        )


def compare_classifiers(ours: HubModel, theirs: Any, generator: torch.Generator) -> dict[str, float]:
    from dinov2.hub.classifiers import _LinearClassifierWrapper  # type: ignore[import-not-found]

    x, errors = torch.randn(2, 3, 42, 70, generator=generator), {}
    for layers in (1, 4):
        head = torch.nn.Linear((1 + layers) * ours.embed_dim, 10)
        own = LinearClassifier(backbone=ours, linear_head=head, layers=layers)
        meta = _LinearClassifierWrapper(backbone=theirs, linear_head=head, layers=layers)
        assert own.state_dict().keys() == meta.state_dict().keys()
        errors[f"_lc, layers={layers}"] = difference(own(x), meta(x))
    return errors


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference of two nested results, which must have the same structure and shapes."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        return max(difference(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        return max(difference(*pair) for pair in zip(ours, theirs, strict=True))
    if theirs is None:
        assert ours is None
        return 0.0
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype
    return float((ours.double() - theirs.double()).abs().max()) if theirs.numel() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--oracles", type=Path, default=ORACLES, help="recorded outputs of Meta's dinov2_vits14")
    parser.add_argument("--official", type=Path, help="checkout of facebookresearch/dinov2; default: not compared")
    parser.add_argument("--out", type=Path, help="file for the results")
    arguments = parser.parse_args()
    command = ["python", "benchmarks/hub_oracles.py", *(["--official", "CHECKOUT"] if arguments.official else [])]
    results: dict[str, Any] = {
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "oracles": compare_oracles(arguments.oracles),
    }
    if arguments.official:
        os.environ["XFORMERS_DISABLED"] = "1"
        sys.path.insert(0, str(arguments.official))
        results["official"] = {name: compare_official(config) for name, config in variants()}
    text = json.dumps(results, indent=2) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
