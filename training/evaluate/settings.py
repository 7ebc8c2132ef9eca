"""The settings of each evaluation task.

Every choice that affects a result is a setting, and the report of an evaluation lists all settings. A setting that the
task does not have is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.messages import problem_in_words
from model.pooling import Pooling
from model.preprocess import Fit
from training.evaluate.features import Precision

OneOrMore = Annotated[
    tuple[Annotated[int, Field(ge=1, strict=True)], ...],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,)),
]
"""Integers from 1. A single integer stands for a list with one entry."""
MOST = 10**7
"""The largest number of iterations, and of images in a batch."""
Task = Literal["knn", "logistic", "linear", "segmentation", "depth", "retrieval"]


class TaskSettings(BaseModel):
    """The settings that every task has.

    If `resize`, `crop` or `fit` is None, the model's own value is used. If `crop` is 0, the whole image is used, and
    `fit` cannot be set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resize: int | None = Field(default=None, ge=1, le=4096, description="short side after resizing, pixels")
    crop: int | None = Field(default=None, ge=0, le=4096, description="side of the square input, pixels; 0: no crop")
    fit: Fit | None = Field(default=None, description="how an image becomes a square: crop, pad or squash")
    precision: Precision = Field(default="fp32", description="precision of the backbone's forward pass")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of random splits, batches and heads")

    @model_validator(mode="after")
    def _fit_has_an_effect(self) -> Self:
        if self.crop == 0 and self.fit is not None:
            raise ValueError(f"fit={self.fit} has no effect with crop=0, which uses the whole image: leave one out")
        return self


class KnnSettings(TaskSettings):
    """The settings of k-NN."""

    k: OneOrMore = Field(default=(10, 20, 100, 200), min_length=1, description="number of neighbours that vote")
    pooling: Pooling = "cls"


class LogisticSettings(TaskSettings):
    """The settings of logistic regression."""

    pooling: Pooling = "cls"
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of train on which C is chosen; if data has no split, also the share of val",
    )
    tolerance: float = Field(default=1e-6, gt=0, lt=1, description="a fit ends when the gradient is below this")
    iterations: int = Field(default=1000, ge=1, le=MOST, description="maximum number of iterations of a fit")


class LinearSettings(TaskSettings):
    """The settings of the linear probe."""

    grid: Literal["code", "paper"] = Field(
        default="code", description="learning rates: up to 0.1 (code) or 0.5 (paper)"
    )
    blocks: OneOrMore = Field(default=(1, 4), min_length=1, description="numbers of last blocks in the input of a head")
    iterations: int = Field(default=12_500, ge=1, le=MOST, description="number of training iterations")
    batch_size: int = Field(default=1024, ge=1, le=MOST, description="number of images in a batch")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of images in val if data has no split")


class DenseSettings(TaskSettings):
    """The settings that segmentation and depth have in common. Both tasks use the whole image."""

    blocks: int = Field(default=1, ge=1, description="number of last blocks to concatenate: 1 or 4 in the paper")
    iterations: int = Field(default=4000, ge=1, le=MOST, description="number of training iterations")
    batch_size: int = Field(
        default=16, ge=1, le=MOST, description="number of images in a batch; all images if there are fewer"
    )
    weight_decay: float = Field(default=1e-3, ge=0, le=1)
    memory_gb: float = Field(
        default=8.0, ge=0, le=1e6, description="memory limit for stored tokens; other tokens are computed again"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.crop not in (None, 0):
            raise ValueError(f"crop={self.crop}: segmentation and depth use the whole image; resize sets its size")
        if self.fit is not None:
            raise ValueError(f"fit={self.fit}: segmentation and depth use the whole image")
        return self


class SegmentationSettings(DenseSettings):
    """The settings of linear segmentation."""

    lr: float = Field(default=1e-3, gt=0, le=1)
    classes: int | None = Field(default=None, ge=1, le=255, description="null: the largest class in the masks plus one")
    zero_is_ignored: bool = Field(
        default=False, description="classes in masks start at 1, and 0 means no class (ADE20k)"
    )


class DepthSettings(DenseSettings):
    """The settings of linear depth."""

    lr: float = Field(default=3e-4, gt=0, le=1)
    min_depth: float = Field(default=1e-3, gt=0, description="the smallest depth, metres")
    max_depth: float = Field(default=10.0, le=1e6, description="the largest depth, metres; KITTI: 80")
    units_per_metre: float = Field(default=1000.0, gt=0, le=1e6, description="units of a 16-bit PNG; KITTI: 256")
    bins: int = Field(default=256, ge=2, le=65_536)
    gradient_weight: float = Field(default=0.5, ge=0, le=1000)

    @model_validator(mode="after")
    def _depths_rise(self) -> Self:
        if self.min_depth >= self.max_depth:
            raise ValueError(f"min_depth={self.min_depth:g} must be below max_depth={self.max_depth:g}")
        return self


class RetrievalSettings(TaskSettings):
    """The settings of retrieval."""

    k: OneOrMore = Field(default=(1, 5, 10), min_length=1, description="values of k in recall@k")
    pooling: Pooling = "cls"
    ground_truth: Path | None = Field(default=None, description="JSON file; null: class folders are used")


SETTINGS: Mapping[Task, type[TaskSettings]] = {
    "knn": KnnSettings,
    "logistic": LogisticSettings,
    "linear": LinearSettings,
    "segmentation": SegmentationSettings,
    "depth": DepthSettings,
    "retrieval": RetrievalSettings,
}


def make_settings(task: Task, given: Mapping[str, Any]) -> TaskSettings:
    """Return the settings of a task: its defaults, overridden by `given`.

    Raises:
        ValueError: the task is unknown, a given setting does not exist in this task, or its value is not allowed. The
            message names the setting.
    """
    if task not in SETTINGS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(SETTINGS)}")
    try:
        return SETTINGS[task].model_validate(dict(given))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "too_short" and problem["input"]:
                continue  # another problem names the entry that was refused
            if problem["type"] == "extra_forbidden":
                problems.append(f"{name} is not a setting of {task}; it has {', '.join(SETTINGS[task].model_fields)}")
            else:
                problems.append(problem_in_words(problem))
        raise ValueError("; ".join(problems)) from error
