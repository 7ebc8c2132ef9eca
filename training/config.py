"""All settings of a training run, in one frozen pydantic model.

A recipe (`training/recipes/NAME.toml`) sets some of the settings, and `key=value` pairs on the command line override
the recipe. Unknown keys and impossible values are errors. The length of a warm-up is given as a share of the run, so
a run with fewer epochs has the same schedules, compressed into fewer steps.
"""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.config import ViTConfig, config_for
from model.messages import in_words
from model.preprocess import PreprocessSpec
from training.watch.sentinels import Action

RECIPES = Path(__file__).parent / "recipes"
Share = float
Range = tuple[float, float]
Address = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A path or a URL. It is a string because `Path` turns `s3://` into `s3:/`."""


class LastPhase(BaseModel):
    """The settings of the last part of a run, which uses other crop sizes, usually larger ones.

    If only the last steps use larger crops, most steps stay cheap, and the network still learns from images of the size
    at which it will be used. DINOv2 ends its runs at 518 pixels (arXiv 2304.07193, section 4, "Adapting the
    resolution") and restarts all schedules. Here, setting `lr_mult` restarts the schedules of the learning rate and of
    the teacher's momentum. If `lr_mult` is None, the learning rate and the momentum stay near their final values. The
    student then still learns, but little of what it learns reaches its moving average, which is the network that the
    run's checkpoint contains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    share: Share = Field(gt=0, lt=1, description="share of the run's steps")
    global_size: int
    local_size: int
    global_scale: Range = (0.32, 1.0)
    local_scale: Range = (0.05, 0.32)
    lr_mult: float | None = Field(None, gt=0, description="factor on the peak learning rate; restarts the schedules")
    micro_batch: int | None = Field(None, ge=1, description="`micro_batch` for larger crops; None: as in the run")


class TrainConfig(BaseModel):
    """The settings of one training run.

    The defaults come from DINOv2's short recipe. The exceptions are the model, the batch and crop sizes, drop path,
    centering, and the settings that DINOv2 does not have.

    Raises:
        pydantic.ValidationError: a key is unknown or a value is out of range. The error is a ValueError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # data, output and device
    data: Address = Field(
        description="folder of images (any depth; subfolders such as `train` and `val` separate training images from "
        "held-out images), tar shards (a folder, a file, `name-{000..099}.tar`, a URL) or a Hugging Face dataset saved "
        "on disk"
    )
    out: Path = Field(description="folder for checkpoints and logs")
    recipe: str = "none"
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = Field("auto", description="auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 if the device supports it; fp16 scales the loss"
    )
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile each block; auto: on GPUs")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="with several ranks: a whole copy on each (ddp) or slices (fsdp); auto: fsdp for ViT-g"
    )
    checkpoint_blocks: bool = Field(
        False, description="store only the blocks' inputs for the backward pass: less memory, a third more computing"
    )
    held_out_share: Share = Field(0.1, ge=0, lt=1, description="share held out for k-NN if `data` has no train and val")
    cache_size: int = Field(
        160, ge=32, description="side in pixels of the squares that images are resized to before cropping"
    )
    cache_bytes: int = Field(
        4 * 2**30, ge=0, description="memory per rank for images; if the images do not fit, they are streamed"
    )
    workers: int | None = Field(None, ge=1, description="threads that decode images; None: one per core")
    ahead_steps: int = Field(4, ge=1, description="steps to decode in advance when images are streamed")
    ahead_bytes: int = Field(2**30, ge=1, description="memory limit for the steps that are decoded in advance")
    max_broken_share: float = Field(0.5, ge=0, le=1, description="a larger share of unreadable images stops the run")

    # the network
    model: str = "dinov2_vitt14"
    vit: dict[str, Any] = Field(default_factory=dict, description="fields of ViTConfig that differ from the model's")
    init: Address | None = Field(
        None, description="backbone to start from: checkpoint file, artifact folder, or name of published weights"
    )
    teacher: Address | None = Field(
        None, description="frozen teacher for distillation: a run's folder, or a backbone as in `init`"
    )
    teacher_model: str = Field("dinov2_vitg14", description="name of the teacher's model, if its file does not have it")
    drop_path: float = Field(0.0, ge=0, lt=1)
    n_prototypes: int = Field(65536, ge=2)
    head_hidden_dim: int = Field(2048, ge=1)
    head_bottleneck_dim: int = Field(256, ge=1)
    ibot_bottleneck_dim: int | None = Field(
        None, ge=1, description="bottleneck of a separate iBOT head; None: as DINO's"
    )
    shared_head: bool = True

    # crops
    global_size: int = 224
    local_size: int = 98
    n_local: int = Field(8, ge=0)
    global_scale: Range = (0.32, 1.0)
    local_scale: Range = (0.05, 0.32)
    last_phase: LastPhase | None = Field(None, description="other crop sizes and scales for the end of the run")
    white_balance: float = Field(
        0.0, ge=0, lt=1, description="each channel is multiplied by a random factor, 1 +- at most this; not in DINOv2"
    )
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = Field(0.1, ge=0, le=0.5)
    jitter_probability: float = Field(0.8, ge=0, le=1)
    gray: float = Field(0.2, ge=0, le=1)
    blur: tuple[float, float, float] = Field(
        (0.0, 0.9, 0.5), description="probability for first global, second global and local crops, as in DINOv2's code"
    )
    solarize: float = Field(0.2, ge=0, le=1, description="probability for the second global crop")

    # losses
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temp: float = 0.1
    teacher_temp: Range = Field((0.04, 0.07), description="first and last value")
    teacher_temp_warmup: Share = 0.3
    centering: Literal["sinkhorn", "softmax", "batch_norm"] = Field(
        "sinkhorn",
        description="the teacher's centering: Sinkhorn-Knopp, a moving centre with softmax, or batch normalisation",
    )
    center_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the moving centre")
    koleo_over_ranks: bool = Field(
        True, description="true: KoLeo searches neighbours on all ranks; false: on each rank alone, as in Meta's code"
    )
    ibot_patches: Literal["masked", "all"] = Field(
        "masked",
        description="all: for distillation, iBOT uses every patch of both global crops, and no patch is masked",
    )
    mask_ratio: Range = (0.1, 0.5)
    mask_probability: float = Field(0.5, ge=0, le=1)

    # optimisation
    epochs: float = Field(100, gt=0, le=1e6)
    batch_size: int = Field(64, ge=2, description="images in one step, over all ranks and micro-batches")
    micro_batch: int | None = Field(
        None, ge=1, description="images in one forward pass on one rank; None: all of the rank's images"
    )
    optimizer: Literal["adamw", "sgd_normalized"] = Field(
        "adamw", description="sgd_normalized: momentum over unit-norm gradients, for very large batches"
    )
    lr: float = Field(
        4e-3, gt=0, description="peak learning rate at batch size 1024; scaled by sqrt(batch_size / 1024)"
    )
    min_lr: float = 1e-6
    warmup: Share = 0.1
    weight_decay: Range = Field((0.04, 0.4), description="first and last value of a cosine")
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: Range = Field((0.992, 1.0), description="momentum of the teacher's EMA: first and last value of a cosine")
    layer_decay: float = 0.9
    patch_embed_lr_mult: float = 0.2
    freeze_last_layer: Share = 0.01
    freeze_backbone: Share = Field(
        0.0, description="share of the run in which only the heads train; new heads would ruin a backbone from `init`"
    )
    clip_grad: float = 3.0

    # logging, saving and sentinels
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    save_every_minutes: float = Field(5, gt=0)
    keep_states: int = Field(2, ge=1, description="number of newest states to keep for resuming")
    keep_checkpoints_every_epochs: float = Field(
        0, ge=0, description="epochs between checkpoints for `dinov2 average`; 0: none"
    )
    eval_every_epochs: float = Field(0, ge=0, description="epochs between k-NN evaluations; 0: only at the end")
    sheet_every: int = Field(0, ge=0, description="steps between image sheets; 0: only at the end")
    measure_peak: bool = Field(
        False, description="time a matrix product at the start, to report MFU on unknown devices"
    )
    wandb: str | None = Field(None, description="Weights & Biases project; None: no logging there")
    on_collapse: Action = Field("stop", description="stop, rollback (and lower the learning rates) or warn")
    on_not_finite: Literal["stop", "rollback"] = Field("rollback", description="stop, or rollback (and skip that step)")
    on_knn: Action = Field("stop", description="as `on_collapse`, if the k-NN accuracy falls by more than `knn_margin`")
    sentinel_lines: int = Field(5, ge=1, description="consecutive bad lines in metrics.jsonl that count as a collapse")
    rollback_lr_factor: float = Field(0.5, gt=0, le=1, description="factor on the learning rates after a rollback")
    knn_margin: float = Field(
        5.0, gt=0, description="accepted fall of the k-NN accuracy below its best, in percentage points"
    )
    min_rankme_share: float = Field(
        0.05, ge=0, le=1, description="lowest accepted effective rank of class tokens, as a share of the largest"
    )
    max_rollbacks: int = Field(3, ge=0)
    whiten: float | None = Field(
        None,
        gt=0,
        description="shrinkage for whitening the class token at the end; None: no whitening; not in DINOv2",
    )
    eval_resize: int = 256
    eval_crop: int = 224

    @model_validator(mode="after")
    def _fits(self) -> Self:
        patch = self.vit_config.patch_size
        sizes = {name: getattr(self, name) for name in ("global_size", "local_size", "eval_crop")}
        if self.last_phase is not None:
            sizes["last_phase.global_size"] = self.last_phase.global_size
            sizes["last_phase.local_size"] = self.last_phase.local_size
        for name, size in sizes.items():
            if size < patch or size % patch:
                raise ValueError(f"{name}={size} must be a multiple of the patch size {patch}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}=[{low:g}, {high:g}] must be shares of the image, above 0 and up to 1")
        for name in ("warmup", "teacher_temp_warmup", "freeze_last_layer", "freeze_backbone"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share of the run, 0 to 1")
        _ = self.eval_spec
        return self

    @property
    def vit_config(self) -> ViTConfig:
        """Return the configuration of the model named `model`, with the overrides in `vit` applied.

        Raises:
            ValueError: the model is unknown, or `vit` has an unknown field.
        """
        base = config_for(self.model)
        unknown = set(self.vit) - set(base.__dataclass_fields__)
        if unknown:
            raise ValueError(f"vit: unknown {sorted(unknown)}; allowed: {sorted(base.__dataclass_fields__)}")
        return replace(base, **self.vit)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the losses, keyed by the name of the loss: `dino`, `ibot` and `koleo`."""
        return {name: getattr(self, f"{name}_weight") for name in loss_names()}

    @property
    def eval_spec(self) -> PreprocessSpec:
        """Return the preprocessing for the evaluations of the run."""
        patch = self.vit_config.patch_size
        return PreprocessSpec(resize=self.eval_resize, crop=self.eval_crop, patch_size=patch)


def loss_names() -> list[str]:
    """Return the names of the losses that have a setting `NAME_weight`, in the order of these settings."""
    return [name.removesuffix("_weight") for name in TrainConfig.model_fields if name.endswith("_weight")]


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _parse_value(text: str) -> object:
    """Parse `text` as a TOML value, such as `0.1`, `true` or `{depth = 6}`. Return `text` itself if it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def load_config(recipe: str, data: str | Path, out: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Load a recipe by its name or from a TOML file, apply `key=value` overrides, and return the settings.

    Raises:
        OSError: the recipe's file cannot be read.
        ValueError: the recipe is unknown (the message lists the names) or is not TOML, an override has no `=`, or a key
            or a value is not allowed.
    """
    path = RECIPES / f"{recipe}.toml"
    if recipe.endswith(".toml"):
        path, recipe = Path(recipe), Path(recipe).stem
    elif recipe not in recipe_names():
        raise ValueError(f"unknown recipe {recipe!r}: give a TOML file, or one of {', '.join(recipe_names())}")
    try:
        values: dict[str, object] = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    values |= parse_overrides(overrides or [])
    for key in values:
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(key, TrainConfig.model_fields, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "the settings are the fields of training/config.py"
            raise ValueError(f"unknown setting {key!r}: {hint}")
    try:
        return TrainConfig.model_validate({**values, "recipe": recipe, "data": data, "out": out})
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """Parse settings of the form `key=value` into a dictionary. A value that is not TOML is stored as text.

    Raises:
        ValueError: an override has no `=`.
    """
    values: dict[str, object] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} must look like key=value")
        values[key] = _parse_value(text)
    return values
