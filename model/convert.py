"""Converts published DINOv2 weights to Meta's tensor names, which this project uses, and back.

Meta, timm and Hugging Face store the backbone in different formats. For each format, a table maps each tensor name of
this project to the names of the file's tensors that are concatenated into it (usually one). `convert` iterates over the
tensors that the model needs, and reports every missing or extra tensor and every tensor with a wrong shape, by its name
in the file. Nothing is skipped silently: the tables also list the tensors that are dropped (the projection heads in
training dumps, and the heads of classifiers).

Sources of the tables: facebookresearch/dinov2 (hub and training dumps, `train/train.py`), huggingface/transformers
(`models/dinov2/convert_dinov2_to_hf.py` and the parameter names in version 5), timm (`models/vision_transformer.py`,
the function that converts DINOv2).

The features depend on the rule by which `pos_embed` is resized (see `model/pos_embed.py`), but a file does not record
this rule. Each `Dialect`, which describes one format, therefore contains the rule that its publisher's code uses.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from model.config import PosEmbedRule, ViTConfig

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Shape = tuple[int, ...]

MAX_LISTED = 10
"""The maximum number of keys that an error message lists for each kind of problem.

A wrong file can have hundreds of wrong keys.
"""


class CheckpointError(ValueError):
    """The error raised when a weights file cannot be used. The message gives the reason."""


@dataclass(frozen=True)
class Dialect:
    """A publisher's file format, with the names that a backbone's tensors have in such a file.

    `keys` maps our name for a tensor or module to one or more names in the file, where `#` is the block number. If
    there are several names, the file's tensors are concatenated in this order into one tensor. A tensor that `keys`
    does not list has the same name in the file. `describes` is called with the tensor names in a file and returns
    whether the file has this format.
    """

    name: str
    describes: Callable[[Iterable[str]], bool]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()  # prefixes that are removed from the names of the backbone's tensors
    dropped: tuple[str, ...] = ()  # name prefixes of tensors that are not part of a backbone
    absent: tuple[str, ...] = ()  # tensors that the format does not store; they are set to zeros
    class_position_in_cls_token: bool = False  # pos_embed lacks the class token's row, which was added to cls_token
    any_img_size: bool = False  # pos_embed may be for a grid other than the configuration's
    pos_embed_rule: Callable[[ViTConfig], PosEmbedRule] = lambda config: config.pos_embed_rule


_HUGGING_FACE_KEYS = {
    "cls_token": ("embeddings.cls_token",),
    "mask_token": ("embeddings.mask_token",),
    "register_tokens": ("embeddings.register_tokens",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "blocks.#.norm1": ("encoder.layer.#.norm1",),
    "blocks.#.attn.qkv": tuple(f"encoder.layer.#.attention.attention.{part}" for part in ("query", "key", "value")),
    "blocks.#.attn.proj": ("encoder.layer.#.attention.output.dense",),
    "blocks.#.ls1.gamma": ("encoder.layer.#.layer_scale1.lambda1",),
    "blocks.#.norm2": ("encoder.layer.#.norm2",),
    "blocks.#.mlp.fc1": ("encoder.layer.#.mlp.fc1",),
    "blocks.#.mlp.fc2": ("encoder.layer.#.mlp.fc2",),
    "blocks.#.mlp.w12": ("encoder.layer.#.mlp.weights_in",),
    "blocks.#.mlp.w3": ("encoder.layer.#.mlp.weights_out",),
    "blocks.#.ls2.gamma": ("encoder.layer.#.layer_scale2.lambda1",),
    "norm": ("layernorm",),
}
# The names in `model.state_dict()` since transformers 5. Files that transformers 5 writes still use the names above.
_HUGGING_FACE_MEMORY_KEYS = _HUGGING_FACE_KEYS | {
    "blocks.#.attn.qkv": tuple(f"encoder.layer.#.attention.{part}_proj" for part in "qkv"),
    "blocks.#.attn.proj": ("encoder.layer.#.attention.o_proj",),
    "blocks.#.mlp.w12": ("encoder.layer.#.mlp.gate_proj", "encoder.layer.#.mlp.up_proj"),
    "blocks.#.mlp.w3": ("encoder.layer.#.mlp.down_proj",),
}
_TIMM_KEYS = {
    "register_tokens": ("reg_token",),
    "blocks.#.mlp.w12": ("blocks.#.mlp.fc1",),
    "blocks.#.mlp.w3": ("blocks.#.mlp.fc2",),
}


def _any_ends(keys: Iterable[str], ending: str) -> bool:
    return any(key.endswith(ending) for key in keys)


def _hugging_face_rule(config: ViTConfig) -> PosEmbedRule:
    return "antialias" if config.num_register_tokens else "size"


META_DUMP = Dialect(
    "Meta training dump",
    lambda keys: any(key.startswith("backbone.") for key in keys),
    prefixes=("backbone.",),
    dropped=("dino_head.", "ibot_head."),
    any_img_size=True,
)
HUGGING_FACE_MEMORY = Dialect(
    "Hugging Face (state_dict of transformers 5)",
    lambda keys: _any_ends(keys, "attention.q_proj.weight"),
    keys=_HUGGING_FACE_MEMORY_KEYS,
    prefixes=("dinov2.", "dinov2_with_registers."),
    dropped=("classifier.",),
    pos_embed_rule=_hugging_face_rule,
)
HUGGING_FACE = replace(
    HUGGING_FACE_MEMORY,
    name="Hugging Face",
    describes=lambda keys: _any_ends(keys, "embeddings.cls_token"),
    keys=_HUGGING_FACE_KEYS,
)
TIMM_REGISTERS = Dialect(
    "timm",
    lambda keys: "reg_token" in keys,
    keys=_TIMM_KEYS,
    absent=("mask_token",),
    class_position_in_cls_token=True,
    pos_embed_rule=lambda config: "antialias",
)
TIMM = replace(
    TIMM_REGISTERS,
    # Meta's names without the mask token, which Meta's own files always contain.
    describes=lambda keys: "cls_token" in keys and "mask_token" not in keys and "register_tokens" not in keys,
    class_position_in_cls_token=False,
)
META_HUB = Dialect("Meta hub", lambda keys: "cls_token" in keys)

DIALECTS = (META_DUMP, HUGGING_FACE_MEMORY, HUGGING_FACE, TIMM_REGISTERS, TIMM, META_HUB)
"""All dialects, in the order in which `detect` tries them."""


def detect(keys: Iterable[str]) -> Dialect:
    """Return the dialect of a file whose tensors have the names `keys`.

    Raises:
        CheckpointError: no dialect matches. The message lists the dialects and some of the file's names.
    """
    names_in_file = set(keys)
    if names_in_file and all(key.startswith(_HEADS) for key in names_in_file):
        raise CheckpointError(
            f"only a projection head (DINO's or iBOT's), without a backbone: {_listed(sorted(names_in_file))}"
        )
    for dialect in DIALECTS:
        if dialect.describes(names_in_file):
            return dialect
    names = ", ".join(dict.fromkeys(dialect.name for dialect in DIALECTS))
    raise CheckpointError(f"not the weights of a DINOv2 backbone ({names}): {_listed(sorted(names_in_file))}")


_HEADS = ("dino_head.", "ibot_head.", "mlp.", "last_layer.")  # with and without the prefix of a training dump


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{len(items)} ({', '.join(items[:MAX_LISTED])}{more})"


def _file_names(key: str, dialect: Dialect) -> tuple[str, ...]:
    """Return the names of the file's tensors that are concatenated into our tensor `key` (usually one name)."""
    number = re.match(r"blocks\.(\d+)\.", key)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.#.", key)
    module, _, leaf = generic.rpartition(".")
    if generic in dialect.keys:
        names = dialect.keys[generic]
    elif module in dialect.keys:
        names = tuple(f"{name}.{leaf}" for name in dialect.keys[module])
    else:
        names = (generic,)
    return tuple(name.replace("#", number.group(1)) if number else name for name in names)


def _plain_names(keys: Iterable[str], dialect: Dialect) -> tuple[dict[str, str], list[str]]:
    """Remove two things from a file's tensor names: the dialect's prefix, and the chunk number from FSDP training.

    Returns:
        A dictionary that maps each resulting name to the name in the file, and a list of the names of the tensors that
            the dialect drops.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    plain: dict[str, str] = {}
    dropped: list[str] = []
    for key in keys:
        if key.startswith(dialect.dropped):
            dropped.append(key)
            continue
        name = next((key.removeprefix(prefix) for prefix in dialect.prefixes if key.startswith(prefix)), key)
        # FSDP training groups blocks: blocks.<chunk>.<index>. The index runs across all chunks.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        if name in plain:
            raise CheckpointError(f"{plain[name]} and {key} are the same tensor {name}")
        plain[name] = key
    return plain, dropped


@dataclass
class KeyReport:
    """The tensors that a file lacks, has in excess, or has with the wrong shape, by the names in the file's format."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def raise_if_any(self, dialect: Dialect) -> None:
        """Raise an error if the report is not empty.

        Raises:
            CheckpointError: the report lists at least one tensor. The message lists up to `MAX_LISTED` names of each
                kind.
        """
        kinds = {"missing": self.missing, "extra": self.extra, "misshapen": self.misshapen}
        found = [f"{kind} keys: {_listed(keys)}" for kind, keys in kinds.items() if keys]
        if found:
            raise CheckpointError(f"the weights ({dialect.name}) do not fit the model: {'; '.join(found)}")


@dataclass(frozen=True)
class Converted:
    """The result of `convert`.

    It contains the backbone's float32 arrays, keyed by our names, the model's configuration, the file's dialect, and
    the names of the file's tensors that were dropped.
    """

    arrays: dict[str, FloatArray]
    config: ViTConfig
    dialect: Dialect
    dropped: list[str]


@dataclass(frozen=True)
class _Plan:
    """How `convert` builds a backbone's tensors.

    `sources` maps our name for each tensor to the names of the file's tensors that are concatenated into it.
    """

    sources: dict[str, list[str]]
    config: ViTConfig
    dialect: Dialect
    dropped: list[str]


def backbone_shapes(config: ViTConfig) -> dict[str, Shape]:
    """Return the shape of each tensor of a backbone, keyed by Meta's name, in the order of its `state_dict`."""
    dim, hidden, p = config.embed_dim, config.hidden_dim, config.patch_size
    shapes: dict[str, Shape] = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + config.grid**2, dim)}
    shapes["mask_token"] = (1, dim)
    if config.num_register_tokens:
        shapes["register_tokens"] = (1, config.num_register_tokens, dim)
    shapes |= {"patch_embed.proj.weight": (dim, 3, p, p), "patch_embed.proj.bias": (dim,)}
    for i in range(config.depth):
        block: dict[str, Shape] = {}
        for name, width in (("norm1", dim), ("attn.qkv", 3 * dim), ("attn.proj", dim), ("norm2", dim)):
            block |= {f"{name}.weight": (width,) if "norm" in name else (width, dim), f"{name}.bias": (width,)}
        if config.ffn == "mlp":
            layers = (("mlp.fc1", hidden, dim), ("mlp.fc2", dim, hidden))
        else:
            layers = (("mlp.w12", 2 * hidden, dim), ("mlp.w3", dim, hidden))
        for name, rows, columns in layers:
            block |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        if config.layerscale_init is not None:
            block |= {"ls1.gamma": (dim,), "ls2.gamma": (dim,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def _plan(shapes: Mapping[str, Shape], config: ViTConfig, dialect: Dialect | None) -> _Plan:
    """Determine which of a file's tensors are concatenated into each tensor of a backbone.

    `shapes` maps the name of each tensor in the file to its shape.

    Raises:
        CheckpointError: the format is unknown, or the file lacks a tensor, contains an extra one, or contains one with
            the wrong shape. The message lists up to `MAX_LISTED` names of each kind.
    """
    dialect = detect(shapes) if dialect is None else dialect
    plain, dropped = _plain_names(shapes, dialect)
    config = replace(config, pos_embed_rule=dialect.pos_embed_rule(config))
    if dialect.any_img_size and "pos_embed" in plain:
        patches = math.prod(shapes[plain["pos_embed"]]) // config.embed_dim - 1
        config = replace(config, img_size=max(1, round(max(patches, 0) ** 0.5)) * config.patch_size)
    report = KeyReport(extra=sorted(plain.values()))
    sources: dict[str, list[str]] = {}
    for key, shape in backbone_shapes(config).items():
        if key in dialect.absent:
            continue
        names = _file_names(key, dialect)
        if key == "pos_embed" and dialect.class_position_in_cls_token:
            shape = (1, shape[1] - 1, shape[2])
        part_shape = (shape[0] // len(names), *shape[1:])
        sources[key] = []
        for name in names:
            if name not in plain:
                report.missing.append(name)
                continue
            original = plain[name]
            report.extra.remove(original)
            if shapes[original] != part_shape:
                report.misshapen.append(f"{original} {list(shapes[original])} instead of {list(part_shape)}")
            sources[key].append(original)
    report.raise_if_any(dialect)
    return _Plan(sources, config, dialect, dropped)


def check_tensors(shapes: Mapping[str, Shape], config: ViTConfig, dialect: Dialect | None = None) -> None:
    """Check that a file in the format `dialect` contains exactly a backbone's tensors, each with the right shape.

    `shapes` maps the name of each tensor in the file to its shape. If `dialect` is None, the format is detected.

    Raises:
        CheckpointError: the file lacks a tensor, contains an extra one, or contains one with the wrong shape. The
            message lists up to `MAX_LISTED` names of each kind.
    """
    _plan(shapes, config, dialect)


def convert(tensors: Mapping[str, Array], config: ViTConfig, dialect: Dialect | None = None) -> Converted:
    """Convert a file's arrays to the arrays of a backbone. An array that needs no change is not copied.

    Args:
        tensors: the file's arrays, keyed by name.
        config: the expected shape of the model. The returned configuration is a copy of it with two exceptions:
            `pos_embed_rule` is taken from the dialect, and, for a training dump, `img_size` is computed from the dump's
            `pos_embed`.
        dialect: the format of the file. If None, the format is detected.

    Raises:
        CheckpointError: the format is unknown, or the file lacks a tensor, contains an extra one, or contains one with
            the wrong shape (the message lists up to `MAX_LISTED` names of each kind), or a weight is NaN or infinite
            (the message names the tensor).
    """
    plan = _plan({name: array.shape for name, array in tensors.items()}, config, dialect)
    arrays: dict[str, FloatArray] = {}
    for key, shape in backbone_shapes(plan.config).items():
        if key in plan.dialect.absent:
            arrays[key] = np.zeros(shape, np.float32)
            continue
        parts = [tensors[name].astype(np.float32, copy=False) for name in plan.sources[key]]
        for name, part in zip(plan.sources[key], parts, strict=True):
            if problem := finite_problem(name, part):
                raise CheckpointError(problem)
        arrays[key] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if plan.dialect.class_position_in_cls_token:
        positions = arrays["pos_embed"]
        arrays["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return Converted(arrays, plan.config, plan.dialect, plan.dropped)


def finite_problem(name: str, array: Array) -> str | None:
    """Return what is wrong if an array of weights contains NaN or infinity, or None if all values are finite.

    Only the smallest and the largest value are examined, because each of them is NaN if any value is NaN.
    """
    with np.errstate(invalid="ignore"):
        if not array.size or (np.isfinite(array.min()) and np.isfinite(array.max())):
            return None
    bad = array.size - int(np.isfinite(array).sum())
    return f"the tensor {name} contains {bad} of {array.size} values that are NaN or infinite"


def to_dialect(arrays: Mapping[str, Array], config: ViTConfig, dialect: Dialect) -> dict[str, Array]:
    """Return a backbone's arrays under the names of another format. This is the inverse of `convert`.

    An array that is stored in parts, such as `qkv` in Hugging Face's format, is split. A backbone without LayerScale
    gets gains of 1, which change nothing, because the other formats have no backbones without LayerScale. Tensors that
    the format does not store are left out.

    Args:
        arrays: the backbone's arrays, keyed by our names.
        config: the shape of the backbone.
        dialect: the format.
    """
    ones = np.ones(config.embed_dim, np.float32)
    gains = {f"blocks.{i}.ls{n}.gamma": ones for i in range(config.depth) for n in (1, 2)}
    renamed: dict[str, Array] = {}
    for key, array in (arrays if config.layerscale_init is not None else {**arrays, **gains}).items():
        if key in dialect.absent:
            continue
        if dialect.class_position_in_cls_token:
            array = _with_class_position(key, array, arrays["pos_embed"])
        names = _file_names(key, dialect)
        renamed |= {
            name: np.ascontiguousarray(part) for name, part in zip(names, np.split(array, len(names)), strict=True)
        }
    return renamed


def _with_class_position(key: str, array: Array, pos_embed: Array) -> Array:
    """Move the class token's position from `pos_embed` into `cls_token`."""
    if key == "cls_token":
        return np.asarray(array + pos_embed[:, :1])
    return pos_embed[:, 1:] if key == "pos_embed" else array
