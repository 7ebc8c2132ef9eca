"""Writes a backbone in the file format of another project: Meta's, timm's or Hugging Face transformers'.

    meta           <name>.pth: what facebookresearch/dinov2 loads with `torch.load` and `load_state_dict(strict=True)`
    timm           model.safetensors and config.json: what `timm.create_model("local-dir:FOLDER")` loads
    transformers   model.safetensors, config.json and preprocessor_config.json: what `AutoModel.from_pretrained` loads

The tensor names come from the tables in `model/convert.py`, which also read these formats. Features are equal at the
model's own image size. At other sizes they are equal only if the other library resizes positions by the model's rule
(`notes`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from model.config import CONFIGS, PosEmbedRule, ViTConfig
from model.convert import HUGGING_FACE, META_HUB, TIMM, TIMM_REGISTERS, Array, Dialect, finite_problem, to_dialect
from model.export.options import Backbone, WeightsDtype
from model.files import publish, working_folder, write_text
from model.preprocess import PreprocessSpec
from model.timm_config import timm_config
from model.zoo import ENTRIES

Format = Literal["meta", "timm", "transformers"]

CONFIG: Final = "config.json"
TENSORS: Final = "model.safetensors"
PREPROCESSOR: Final = "preprocessor_config.json"
_BICUBIC: Final = 3  # Pillow's number


@dataclass(frozen=True)
class Exported:
    """The result of an export: the folder, its files, notes for the user, and a line of code that loads the model."""

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]
    usage: str


def export_format(backbone: Backbone, out_dir: Path, file_format: Format, dtype: WeightsDtype = "float32") -> Exported:
    """Write `<out_dir>/<name>-<format>/`, completely or not at all.

    Args:
        backbone: the model.
        out_dir: the parent folder. It is created if missing.
        file_format: the project whose format is written.
        dtype: the type in which the weights are stored.

    Raises:
        ValueError: the folder exists, or the weights do not fit into `dtype`.
        OSError: a file cannot be written.
    """
    target = out_dir / f"{backbone.name}-{file_format}"
    if target.exists():
        raise ValueError(f"{target} exists: delete it, or choose another --out or --name")
    dialect = dialect_of(file_format, backbone.config)
    with np.errstate(over="ignore"):  # a value that is too large becomes infinite, which is an error below
        tensors = {
            name: np.ascontiguousarray(array.astype(dtype, copy=False))
            for name, array in to_dialect(backbone.weights, backbone.config, dialect).items()
        }
    for name, array in tensors.items():
        if problem := finite_problem(name, array):
            raise ValueError(f"weights in {dtype}: {problem}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with working_folder(out_dir, ".exporting-") as temporary:
        folder = temporary / "new"
        folder.mkdir()
        _write(folder, backbone, file_format, tensors, dtype)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes its file readable by the owner only
        files = tuple(sorted(path.name for path in folder.iterdir()))
        publish(folder, target)
    return Exported(target, files, tuple(notes(backbone, file_format)), _usage(target, file_format))


def _usage(folder: Path, file_format: Format) -> str:
    """Return a line of Python that loads the exported model."""
    if file_format == "transformers":
        return f'transformers.AutoModel.from_pretrained("{folder}")'
    if file_format == "timm":
        return f'timm.create_model("local-dir:{folder}", pretrained=True)'
    file = folder / f"{folder.name.removesuffix('-meta')}.pth"
    return f'model.load_state_dict(torch.load("{file}"))'


def dialect_of(file_format: Format, config: ViTConfig) -> Dialect:
    """Return the tensor names of a format."""
    if file_format == "meta":
        return META_HUB
    if file_format == "transformers":
        return HUGGING_FACE
    return TIMM_REGISTERS if config.num_register_tokens else TIMM


def rule_of(file_format: Format, config: ViTConfig) -> PosEmbedRule:
    """Return the rule by which the other project's code resizes the positions of a model of this shape."""
    if file_format == "timm" or config.num_register_tokens:
        return "antialias"
    return "offset" if file_format == "meta" else "size"


def notes(backbone: Backbone, file_format: Format) -> list[str]:
    """Return what differs from this project when the other library uses the files, one sentence per entry."""
    config, spec, found = backbone.config, backbone.preprocess, []
    own, theirs, side = config.pos_embed_rule, rule_of(file_format, config), config.img_size
    if own != theirs:
        found.append(
            f"features are equal only at {side}x{side} pixels: at other sizes {_LIBRARIES[file_format]} resizes "
            f"positions by the rule {theirs}, and this model uses {own} (docs/models.md, resize rules)"
        )
        if file_format == "meta":
            antialias, offset = own == "antialias", 0.1 if own == "offset" else 0.0
            found.append(f"Meta's code uses {own} with interpolate_antialias={antialias}, interpolate_offset={offset}")
    if file_format == "meta" and config.layerscale_init is None:
        found.append("the model has no LayerScale: the file has gains of 1, which give the same features")
    if file_format == "timm":
        found.append("timm's format has no mask token: it is left out")
    if file_format == "transformers" and _processor(spec) is None:
        found.append(f"transformers has no such preprocessing, so there is no {PREPROCESSOR}: {_described(spec)}")
    return found


_LIBRARIES: Final = {"meta": "Meta's code", "timm": "timm", "transformers": "transformers"}


def _write(
    folder: Path, backbone: Backbone, file_format: Format, tensors: Mapping[str, Array], dtype: WeightsDtype
) -> None:
    if file_format == "meta":
        import torch  # only this format is torch's own

        # The arrays can be mapped from a read-only file, and torch needs writable ones.
        copies = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        torch.save(copies, folder / f"{backbone.name}.pth")
        return
    try:
        save_file(dict(tensors), folder / TENSORS, metadata={"format": "pt"})
    except SafetensorError as error:  # raised on a full disk
        raise OSError(f"{folder / TENSORS}: cannot be written: {error}") from error
    settings = transformers_config(backbone.config, dtype) if file_format == "transformers" else _timm_folder(backbone)
    write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
    processor = _processor(backbone.preprocess)
    if file_format == "transformers" and processor is not None:
        write_text(folder / PREPROCESSOR, json.dumps(processor, indent=2) + "\n")


def transformers_config(config: ViTConfig, dtype: WeightsDtype = "float32") -> dict[str, Any]:
    """Return the content of a config.json for `Dinov2Config` or `Dinov2WithRegistersConfig`."""
    registers = config.num_register_tokens
    settings: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": int(config.mlp_ratio) if config.mlp_ratio == int(config.mlp_ratio) else config.mlp_ratio,
        "use_swiglu_ffn": config.ffn == "swiglu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0 if config.layerscale_init is None else config.layerscale_init,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "torch_dtype": dtype,
    }
    return settings | ({"num_register_tokens": registers} if registers else {})


def _processor(spec: PreprocessSpec) -> dict[str, Any] | None:
    """Return the content of a preprocessor_config.json, or None if transformers has no such preprocessing."""
    if spec.crop is None or spec.fit == "pad":
        return None
    square = {"height": spec.crop, "width": spec.crop}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if spec.fit == "squash" else {"shortest_edge": spec.resize},
        "resample": _BICUBIC,
        "do_center_crop": spec.fit == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _described(spec: PreprocessSpec) -> str:
    values = spec.model_dump(include={"fit", "resize", "crop"})
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _timm_folder(backbone: Backbone) -> dict[str, Any]:
    """Return the content of a config.json that `timm.create_model("local-dir:FOLDER")` reads."""
    config = backbone.config
    plain = ("embed_dim", "depth", "num_heads", "ffn", "num_register_tokens")
    name = next((n for n in ENTRIES if all(getattr(CONFIGS[n], f) == getattr(config, f) for f in plain)), None)
    base = ("dinov2_vitg14" if config.ffn == "swiglu" else "dinov2_vits14") + "_reg" * bool(config.num_register_tokens)
    arguments: dict[str, Any] = {"img_size": config.img_size, "dynamic_img_size": True, "patch_size": config.patch_size}
    if name is None:
        arguments |= {field: getattr(config, field) for field in plain[:3]}
        # timm's SwiGLU has both halves in one layer, and it computes the width of this layer from the ratio.
        width = 2 * config.hidden_dim if config.ffn == "swiglu" else config.hidden_dim
        arguments["mlp_ratio"] = _ratio(width, config.embed_dim)
        if config.num_register_tokens:
            arguments["reg_tokens"] = config.num_register_tokens
    return {
        "architecture": ENTRIES[name or base].timm_name.partition(".")[0],
        "num_classes": 0,
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": timm_config(config, backbone.preprocess),
    }


def _ratio(width: int, dim: int) -> float:
    """Return a ratio for which `int(dim * ratio)`, with which timm computes the width of a layer, is `width`."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else float(np.nextafter(ratio, np.inf))
