"""All settings of a training run, in one frozen pydantic model.

A recipe sets some of the settings, and `key=value` pairs on the command line override the recipe (training/recipes.py).
Unknown keys, values out of range and impossible combinations are errors. The length of a warm-up is given as a share of
the run, so a run with fewer epochs has the same schedules, compressed into fewer steps.

docs/training-settings.md is made from this file. This module does not import torch.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from model.config import ViTConfig, config_for
from model.preprocess import PreprocessSpec
from training.watch.action import Action

Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, le=1)]
Scales = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Side = Annotated[int, Field(ge=1, le=4096)]
Weight = Annotated[float, Field(ge=0, le=1e4)]
PositiveWeight = Annotated[float, Field(gt=0, le=1e9)]
Strength = Annotated[float, Field(ge=0, le=2)]
Temperature = Annotated[float, Field(gt=0, le=10)]
Decay = Annotated[float, Field(ge=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Address = Annotated[
    str, Field(min_length=1), BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
]
"""A path or a URL. It is a string because `Path` turns `s3://` into `s3:/`."""

Addresses = Annotated[
    tuple[Address, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)
]


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

    share: float = Field(gt=0, lt=1, description="share of the run's steps")
    global_size: Side
    local_size: Side
    global_scale: Scales = (0.32, 1.0)
    local_scale: Scales = (0.05, 0.32)
    lr_mult: float | None = Field(
        None, gt=0, le=1e3, description="factor on the peak learning rate; restarts the schedules"
    )
    micro_batch: int | None = Field(None, ge=1, description="`micro_batch` for larger crops; unset: as in the run")


class TrainConfig(BaseModel):
    """The settings of one training run.

    The defaults come from DINOv2's short recipe. The exceptions are the model, the batch size, drop path, centering,
    and the settings that DINOv2 does not have.

    Raises:
        pydantic.ValidationError: a key is unknown or a value is out of range. The error is a ValueError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # data, output and device
    data: Addresses = Field(
        min_length=1,
        description="one or more sources, each a folder of images (any depth; subfolders such as `train` and `val` "
        "separate training images from held-out images), tar shards (a folder, a file, `name-{000..099}.tar`, a URL) "
        "or a Hugging Face dataset saved on disk",
    )
    data_weights: tuple[PositiveWeight, ...] | None = Field(
        None, description="relative shares of the sources in the samples; unset: every image is drawn equally often"
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="balanced: every class is drawn equally often; unlabelled images count as one class"
    )
    out: Path = Field(description="folder for checkpoints and logs")
    recipe: str = Field("none", description="name of the recipe; set by the command")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random numbers of the run")
    device: str = Field("auto", description="auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 if the device supports it, otherwise fp16 on a GPU and fp32 on a CPU; fp16 scales "
        "the loss",
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile each block; auto: on GPUs, if there is a C compiler"
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="with several ranks: a whole copy on each (ddp) or slices (fsdp); auto: fsdp for ViT-g"
    )
    checkpoint_blocks: bool = Field(
        False, description="store only the blocks' inputs for the backward pass: less memory, a third more computing"
    )
    held_out_share: float = Field(
        0.1, ge=0, lt=1, description="share of the images held out for evaluation if `data` has no train and val"
    )
    exclude: Address | None = Field(
        None, description="text file with the paths of images that are neither trained on nor held out, one per line"
    )
    cache_size: int | None = Field(
        None,
        ge=32,
        le=4096,
        description="side in pixels of the squares that images are resized to before cropping; unset: as large as the "
        "crops need, so that none is enlarged",
    )
    cache_bytes: int = Field(
        4 * 2**30, ge=0, description="memory per rank for images; if the images do not fit, they are streamed"
    )
    workers: int | None = Field(None, ge=1, le=1024, description="threads that decode images; unset: one per core")
    ahead_steps: int = Field(4, ge=1, le=1000, description="steps to decode in advance when images are streamed")
    ahead_bytes: int = Field(2**30, ge=1, description="memory limit for the steps that are decoded in advance")
    max_broken_share: Share = Field(0.5, description="a larger share of unreadable images stops the run")

    # the network
    model: str = Field("dinov2_vitt14", description="name of the network on torch hub, or dinov2_vitt14")
    vit: dict[str, Any] = Field(default_factory=dict, description="fields of ViTConfig that differ from the model's")
    init: Address | None = Field(
        None,
        description="network to start from: a checkpoint, the folder of a run (with its heads) or of an artifact, or "
        "the name of published weights",
    )
    teacher: Address | None = Field(
        None, description="frozen teacher for distillation: a run's folder, or a backbone as in `init`"
    )
    teacher_model: str = Field("dinov2_vitg14", description="name of the teacher's model, if its file does not have it")
    drop_path: float = Field(0.0, ge=0, lt=1, description="share of samples for which a block's branch is skipped")
    n_prototypes: int = Field(65536, ge=2, le=2**22, description="number K of prototypes of a head")
    head_hidden_dim: int = Field(2048, ge=1, le=2**16, description="width of a head's hidden layers")
    head_bottleneck_dim: int = Field(256, ge=1, le=2**16, description="width of a head's output before the prototypes")
    ibot_bottleneck_dim: int | None = Field(
        None, ge=1, le=2**16, description="bottleneck of a separate iBOT head; unset: as DINO's"
    )
    shared_head: bool = Field(True, description="use one head for DINO and iBOT")

    # crops
    global_size: Side = Field(224, description="side of a global crop, pixels")
    local_size: Side = Field(98, description="side of a local crop, pixels")
    n_local: int = Field(8, ge=0, le=64, description="number of local crops of an image")
    global_scale: Scales = Field((0.32, 1.0), description="smallest and largest share of the image in a global crop")
    local_scale: Scales = Field((0.05, 0.32), description="smallest and largest share of the image in a local crop")
    crop_filter: Literal["bicubic", "bilinear"] = Field("bicubic", description="filter with which crops are resized")
    flip: Share = Field(0.5, description="probability of a horizontal mirror image")
    vertical_flip: Share = Field(0.0, description="probability of a vertical mirror image; not in DINOv2")
    quarter_turns: Share = Field(
        0.0, description="probability that a crop is turned by 90, 180 or 270 degrees; not in DINOv2"
    )
    last_phase: LastPhase | None = Field(None, description="other crop sizes and scales for the end of the run")
    white_balance: float = Field(
        0.0, ge=0, lt=1, description="each channel is multiplied by a random factor, 1 +- at most this; not in DINOv2"
    )
    brightness: Strength = Field(0.4, description="largest change of brightness, as in torchvision's ColorJitter")
    contrast: Strength = Field(0.4, description="largest change of contrast")
    saturation: Strength = Field(0.2, description="largest change of saturation")
    hue: float = Field(0.1, ge=0, le=0.5, description="largest shift of the hue, as a share of the colour circle")
    jitter_probability: Share = Field(0.8, description="probability that the colours of a crop change")
    gray: Share = Field(0.2, description="probability that a crop becomes gray")
    blur: tuple[Share, Share, Share] = Field(
        (0.0, 0.9, 0.5), description="probability for first global, second global and local crops, as in DINOv2's code"
    )
    solarize: Share = Field(0.2, description="probability for the second global crop")

    # losses
    dino_weight: Weight = Field(1.0, description="weight of the DINO loss")
    ibot_weight: Weight = Field(1.0, description="weight of the iBOT loss")
    koleo_weight: Weight = Field(0.1, description="weight of the KoLeo loss")
    student_temp: Temperature = Field(0.1, description="temperature of the student's softmax")
    teacher_temp: tuple[Temperature, Temperature] = Field(
        (0.04, 0.07), description="temperature of the teacher's targets: first and last value"
    )
    teacher_temp_warmup: Share = Field(0.3, description="share of the run in which the teacher's temperature changes")
    centering: Literal["sinkhorn", "softmax", "batch_norm"] = Field(
        "sinkhorn",
        description="the teacher's centering: Sinkhorn-Knopp, a moving centre with softmax, or batch normalisation",
    )
    center_momentum: Beta = Field(0.9, description="momentum of the moving centre")
    koleo_over_ranks: bool = Field(
        True, description="true: KoLeo searches neighbours on all ranks; false: on each rank alone, as in Meta's code"
    )
    ibot_patches: Literal["masked", "all"] = Field(
        "masked",
        description="all: for distillation, iBOT uses every patch of both global crops, and no patch is masked",
    )
    mask_ratio: tuple[Share, Share] = Field((0.1, 0.5), description="smallest and largest share of masked patches")
    mask_probability: Share = Field(0.5, description="share of the global crops that are masked")

    # length and optimisation
    scale: Literal["fixed", "continue"] = Field(
        "fixed",
        description="continue: the settings in training/scale.py that neither the recipe nor the user gives follow "
        "from the number of images and `hours`; the network and the size of evaluations are those of `init`",
    )
    hours: float | None = Field(
        None, gt=0, le=1e5, description="time for the run, from which `epochs` follows; unset: as `epochs` says"
    )
    estimate: bool = Field(
        True, description="run a few steps on trial before a new run, to estimate its time, memory and disk space"
    )
    epochs: float = Field(100, gt=0, le=1e6, description="passes over the training images")
    batch_size: int = Field(64, ge=2, le=2**20, description="images in one step, over all ranks and micro-batches")
    micro_batch: int | None = Field(
        None, ge=1, description="images in one forward pass on one rank; unset: all of the rank's images"
    )
    optimizer: Literal["adamw", "sgd_normalized"] = Field(
        "adamw", description="sgd_normalized: momentum over unit-norm gradients, for very large batches"
    )
    lr: float = Field(
        4e-3, gt=0, le=10, description="peak learning rate at batch size 1024; scaled by sqrt(batch_size / 1024)"
    )
    min_lr: float = Field(1e-6, ge=0, le=10, description="last learning rate")
    warmup: Share = Field(0.1, description="share of the run in which the learning rate rises")
    weight_decay: tuple[Decay, Decay] = Field((0.04, 0.4), description="first and last value of a cosine")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay rates of AdamW's moving averages")
    momentum: tuple[Momentum, Momentum] = Field(
        (0.992, 1.0), description="momentum of the teacher's EMA: first and last value of a cosine"
    )
    layer_decay: float = Field(
        0.9, gt=0, le=1, description="factor on the learning rate from each block to the one before"
    )
    patch_embed_lr_mult: float = Field(0.2, ge=0, le=10, description="factor on the patch embedding's learning rate")
    freeze_last_layer: Share = Field(0.01, description="share of the run in which the prototypes do not train")
    freeze_backbone: Share = Field(
        0.0, description="share of the run in which only the heads train; new heads would ruin a backbone from `init`"
    )
    clip_grad: float = Field(3.0, gt=0, le=1e6, description="largest gradient norm of the backbone and of each head")

    # logging, saving and sentinels
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    save_every_minutes: float = Field(5, gt=0, le=1e6, description="minutes between saved states")
    keep_states: int = Field(2, ge=1, le=1000, description="number of newest states to keep for resuming")
    keep_checkpoints_every_epochs: float = Field(
        0, ge=0, le=1e6, description="epochs between checkpoints for `dinov2 average`; 0: none"
    )
    eval_every_epochs: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="epochs between evaluations; unset: as `evaluations` says; 0: only at the start and the end",
    )
    evaluations: int = Field(
        10,
        ge=0,
        le=10_000,
        description="number of evaluations in the run, fewer if they would take more than a fifth of its time",
    )
    sheet_every: int = Field(0, ge=0, description="steps between image sheets; 0: only at the end")
    measure_peak: bool = Field(
        False, description="time a matrix product at the start, to report MFU on unknown devices"
    )
    wandb: str | None = Field(None, description="Weights & Biases project; unset: no logging there")
    mlflow: str | None = Field(None, description="folder or address of MLflow's tracking store; unset: no MLflow")
    on_collapse: Action = Field("stop", description="stop, rollback (and lower the learning rates) or warn")
    on_not_finite: Literal["stop", "rollback"] = Field("rollback", description="stop, or rollback (and skip that step)")
    measure: Literal["auto", "knn", "own", "views", "retrieval", "none"] = Field(
        "auto",
        description="what is measured, guards the run and chooses its best checkpoint; knn: k-NN accuracy on held-out "
        "images; own: that of leave-one-out on all images; views and retrieval: how surely and how often "
        "an image is found by another view of itself, without classes; auto: what suits the images and the start",
    )
    on_measure: Action = Field("stop", description="as `on_collapse`, if the measure falls by more than its margin")
    measure_margin: float = Field(
        5.0, gt=0, le=100, description="accepted fall of the measure below its best value, in percentage points"
    )
    patience: int = Field(
        0, ge=0, le=1000, description="evaluations without a new best value after which the run ends; 0: never"
    )
    sentinel_lines: int = Field(5, ge=1, le=1000, description="consecutive bad log lines that count as a collapse")
    rollback_lr_factor: float = Field(0.5, gt=0, le=1, description="factor on the learning rates after a rollback")
    min_rankme_share: Share = Field(
        0.05, description="lowest accepted effective rank of class tokens, as a share of the largest"
    )
    max_rollbacks: int = Field(3, ge=0, le=1000, description="number of rollbacks after which the run stops")
    whiten: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="shrinkage for whitening the class token at the end; unset: no whitening; not in DINOv2",
    )
    eval_resize: int = Field(256, ge=1, le=4096, description="short side of an image in evaluations, pixels")
    eval_crop: int = Field(224, ge=1, le=4096, description="side of the square input in evaluations, pixels")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        _ = self.eval_spec
        return self

    def _problems(self) -> Iterator[str]:
        """Yield a message for each combination of values that cannot work."""
        patch = self.vit_config.patch_size
        sizes = {name: getattr(self, name) for name in ("global_size", "local_size", "eval_crop")}
        ranges = {name: getattr(self, name) for name in ("global_scale", "local_scale", "mask_ratio")}
        if self.last_phase is not None:
            sizes |= {f"last_phase.{name}": getattr(self.last_phase, name) for name in ("global_size", "local_size")}
            ranges |= {f"last_phase.{name}": getattr(self.last_phase, name) for name in ("global_scale", "local_scale")}
        for name, size in sizes.items():
            if size < patch or size % patch:
                yield f"{name}={size} must be a multiple of the patch size {patch}"
        for name, (low, high) in ranges.items():
            if low > high:
                yield f"{name}=[{low:g}, {high:g}]: the first value must not be more than the second"
        if self.dino_weight == self.ibot_weight == 0:
            yield "dino_weight and ibot_weight are both 0: one of them must be more than 0"
        if self.min_lr > self.lr:
            yield f"min_lr={self.min_lr:g} must not be more than lr={self.lr:g}"
        if self.ibot_bottleneck_dim is not None and self.shared_head:
            yield f"ibot_bottleneck_dim={self.ibot_bottleneck_dim} needs shared_head=false"
        if self.measure == "none" and self.patience:
            yield f"patience={self.patience} needs a measure: measure='none' measures nothing"

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
        for name, value in self.vit.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"vit: {name}={value} must be a finite number")
        try:
            return replace(base, **self.vit)
        except TypeError as error:
            raise ValueError(f"vit={self.vit}: a value has the wrong type ({error})") from error

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
