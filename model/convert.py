"""How others name the same tensors, as tables, and the one strict function that reads them.

Four publishers store DINOv2's backbone. Ours are Meta's names; a table says, for a tensor of ours, which tensors of
the file make it. The reader walks the tensors that the model needs, so whatever a file lacks, has too much or has in
another shape is known exactly, in the file's own names, and nothing is skipped in silence: what is dropped (heads of
training dumps and of classifiers) is named in a table, too.

Sources of the tables: facebookresearch/dinov2 (hub and training dumps, `train/train.py`), huggingface/transformers
(`models/dinov2/convert_dinov2_to_hf.py` and the names that its version 5 has in memory), timm
(`models/vision_transformer.py`, the function that converts DINOv2).

A file says nothing about how `pos_embed` is resized (see `model/pos_embed.py`). But its publisher's code has a rule,
and features differ between them, so each dialect names the rule that gives the features its own library would give.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.config import PosEmbedRule, ViTConfig

MAX_LISTED = 10
"""Keys listed for each kind of problem; a wrong file can have hundreds."""


class CheckpointError(ValueError):
    """A weights file that cannot be used; the message says which file, which keys and what was expected."""


@dataclass(frozen=True)
class Dialect:
    """One way to store a backbone.

    `keys` maps our tensor, or module, to the file's, `#` standing for the block number; several of the file's make one
    of ours, stacked in that order. Names that are not in the table are the same in the file.
    """

    name: str
    describes: Callable[[Iterable[str]], bool]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()  # removed where all of the backbone's tensors carry it
    dropped: tuple[str, ...] = ()  # tensors that are no part of a backbone, known by how their names begin
    absent: tuple[str, ...] = ()  # tensors that the format does not carry: zeros
    class_position_in_cls_token: bool = False  # pos_embed has no row for the class token: it was added to cls_token
    any_img_size: bool = False  # pos_embed may be made for another square than the name's configuration says
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
# What `model.state_dict()` gives since transformers 5; its files keep the names above.
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
    # Meta's names, but without the mask token, which Meta's files always have.
    describes=lambda keys: "cls_token" in keys and "mask_token" not in keys and "register_tokens" not in keys,
    class_position_in_cls_token=False,
)
META_HUB = Dialect("Meta hub", lambda keys: "cls_token" in keys)

DIALECTS = (META_DUMP, HUGGING_FACE_MEMORY, HUGGING_FACE, TIMM_REGISTERS, TIMM, META_HUB)
"""In the order in which they are tried."""


def detect(keys: Iterable[str]) -> Dialect:
    """The dialect of a file, by its keys.

    Raises:
        CheckpointError: none of the known ones; the message lists them and some of the keys.
    """
    known = set(keys)
    for dialect in DIALECTS:
        if dialect.describes(known):
            return dialect
    names = ", ".join(dict.fromkeys(dialect.name for dialect in DIALECTS))
    raise CheckpointError(f"not the weights of a DINOv2 backbone ({names}): {_listed(sorted(known))}")


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{len(items)} ({', '.join(items[:MAX_LISTED])}{more})"


def _file_names(key: str, dialect: Dialect) -> tuple[str, ...]:
    """The tensors of the file that make our tensor `key`."""
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
    """Each backbone tensor's name without prefix and chunk, to the file's own name; and the names that are dropped."""
    plain: dict[str, str] = {}
    dropped: list[str] = []
    for key in keys:
        if key.startswith(dialect.dropped):
            dropped.append(key)
            continue
        name = next((key.removeprefix(prefix) for prefix in dialect.prefixes if key.startswith(prefix)), key)
        # FSDP training groups blocks: blocks.<chunk>.<index>. The index counts through all chunks.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        if name in plain:
            raise CheckpointError(f"{plain[name]} and {key} are the same tensor {name}")
        plain[name] = key
    return plain, dropped


@dataclass
class KeyReport:
    """Everything wrong between a file and a model, in the file's names."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def raise_if_any(self, dialect: Dialect) -> None:
        """Raises CheckpointError with all of it, each list bounded by `MAX_LISTED`."""
        kinds = {"missing": self.missing, "extra": self.extra, "misshapen": self.misshapen}
        found = [f"{kind} keys: {_listed(keys)}" for kind, keys in kinds.items() if keys]
        if found:
            raise CheckpointError(f"the weights ({dialect.name}) do not fit the model: {'; '.join(found)}")


@dataclass(frozen=True)
class Converted:
    """A backbone's tensors in our names and float32, and what is known about them."""

    state_dict: dict[str, Tensor]
    config: ViTConfig
    dialect: Dialect
    dropped: list[str]


def convert(
    tensors: Mapping[str, Tensor],
    config: ViTConfig,
    expected: Callable[[ViTConfig], Mapping[str, torch.Size]],
    dialect: Dialect | None = None,
) -> Converted:
    """Read a backbone out of the tensors of a file.

    Args:
        tensors: the file's tensors.
        config: the model they should fit. The result's has the dialect's `pos_embed_rule` and, for training dumps, the
            image size that the dump's `pos_embed` was made for.
        expected: gives the names and shapes of a model's tensors.
        dialect: how the file names its tensors; None detects it.

    Raises:
        CheckpointError: missing, extra or misshapen keys, all in one message.
    """
    dialect = detect(tensors) if dialect is None else dialect
    plain, dropped = _plain_names(tensors, dialect)
    config = replace(config, pos_embed_rule=dialect.pos_embed_rule(config))
    if dialect.any_img_size and "pos_embed" in plain:
        patches = tensors[plain["pos_embed"]].numel() // config.embed_dim - 1
        config = replace(config, img_size=max(1, round(max(patches, 0) ** 0.5)) * config.patch_size)
    report = KeyReport(extra=sorted(plain.values()))
    state_dict: dict[str, Tensor] = {}
    for key, shape in expected(config).items():
        if key in dialect.absent:
            state_dict[key] = torch.zeros(shape)
            continue
        names = _file_names(key, dialect)
        if key == "pos_embed" and dialect.class_position_in_cls_token:
            shape = torch.Size((1, shape[1] - 1, shape[2]))
        part_shape = torch.Size((shape[0] // len(names), *shape[1:]))
        parts = []
        for name in names:
            if name not in plain:
                report.missing.append(name)
                continue
            original = plain[name]
            report.extra.remove(original)
            if tensors[original].shape != part_shape:
                report.misshapen.append(f"{original} {list(tensors[original].shape)} instead of {list(part_shape)}")
            parts.append(tensors[original].float())
        if len(parts) == len(names) and not report.misshapen:
            state_dict[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    report.raise_if_any(dialect)
    if dialect.class_position_in_cls_token:
        positions = state_dict["pos_embed"]
        state_dict["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
    return Converted(state_dict, config, dialect, dropped)
