"""Choose the settings for continuing from a trained backbone, from the number of images and the time budget.

A company has 300 images or 2 million. No fixed recipe suits both: with 300 images, batches of 256 leave one step per
epoch, and heads with 16,384 prototypes never learn. These rules choose the settings instead. They rest on runs of small
networks on at most 2,640 images, and are extrapolated beyond (docs/decisions/0032-continue-on-small-sets.md):

- Steps matter more than the size of a batch. The batch grows with the square root of the number of images and shrinks
  until the budget contains enough steps.
- The number of prototypes grows with the square root of the number of images.
- The teacher's moving average covers a fixed share of the run. At the momentum of long runs, a teacher would hardly
  change in a few hundred steps.
- The peak learning rate does not depend on the size of the batch, and is lower for wider networks. This rule is a
  cautious guess.

All functions are pure. `training/config.py` has the settings of the same names.
"""

import math
from dataclasses import asdict, dataclass
from typing import Protocol

MIN_IMAGES = 50
"""With fewer images, neither training nor the choice of the best checkpoint can be trusted."""

SMALL_BATCH, MAX_BATCH = 32, 1024
MIN_STEPS = 125
"""The fewest steps with which a measured run gained: four points on groceries, by a small network."""

WANTED_STEPS = 1000
"""Steps below which the batch is made smaller, down to `SMALL_BATCH` images."""

DEFAULT_STEPS = 4000
"""Steps of a run without a time budget."""

MAX_EPOCHS = 50.0
"""In a run of 100 epochs on 300 images, the accuracy was highest after 47, and the features kept drifting."""

PEAK_LR = 7e-4
"""The best peak learning rate of AdamW in the measurements, which is used for networks up to `LR_WIDTH` wide."""

LR_WIDTH = 192
EMA_SHARE = 0.2
"""The window of the teacher's moving average, 1 / (1 - momentum) steps, as a share of the run."""

LONG_RUN = 20_000
"""Steps from which on DINOv2's teacher temperature is used. In fewer steps its soft targets do not sharpen."""

TRAINING_SHARE = 0.85
"""Share of the time budget that remains for training steps, after reading images, evaluations and saving."""


@dataclass(frozen=True)
class ContinueSettings:
    """Settings of a run that continues from a trained backbone. The names are those of `TrainConfig`."""

    batch_size: int
    epochs: float
    n_prototypes: int
    freeze_backbone: float
    freeze_last_layer: float
    warmup: float
    lr: float
    layer_decay: float
    weight_decay: tuple[float, float]
    drop_path: float
    momentum: tuple[float, float]
    teacher_temp: tuple[float, float]
    teacher_temp_warmup: float

    def as_overrides(self) -> dict[str, object]:
        """Return the settings by name."""
        return asdict(self)


def power_of_two(value: float) -> int:
    """Return the largest power of two that is at most `value`.

    Raises:
        ValueError: `value` is below 1.
    """
    if value < 1:
        raise ValueError(f"value={value} must be at least 1")
    return int(2 ** math.floor(math.log2(value)))


def batch_for(n_images: int, budget: float = math.inf) -> int:
    """Return the batch size for `n_images` training images and a budget of `budget` images seen in the whole run.

    The size is a power of two near the square root of the number of images, from 32 to 1,024. It is halved, down to 32,
    while the budget contains fewer than `WANTED_STEPS` steps. A batch never has more images than there are.

    Raises:
        ValueError: `n_images` is below 2.
    """
    if n_images < 2:
        raise ValueError(f"n_images={n_images} must be at least 2, because a batch has two images or more")
    batch = min(max(power_of_two(math.sqrt(n_images)), SMALL_BATCH), MAX_BATCH)
    while batch > SMALL_BATCH and budget / batch < WANTED_STEPS:
        batch //= 2
    return min(batch, power_of_two(n_images))


def prototypes_for(n_images: int) -> int:
    """Return the number of prototypes of the heads for `n_images` training images.

    The number is the power of two closest, as a ratio, to 16 times the square root of the number of images. It is from
    256 to 65,536, as in DINOv2's short recipe.

    Raises:
        ValueError: `n_images` is below 1.
    """
    if n_images < 1:
        raise ValueError(f"n_images={n_images} must be at least 1")
    exponent = round(math.log2(16 * math.sqrt(n_images)))
    return min(max(2**exponent, 256), 65536)


def images_seen(n_images: int, hours: float | None = None, images_per_s: float | None = None) -> float:
    """Return how many images a run sees in total, with repetitions.

    Without a time budget the run has `DEFAULT_STEPS` steps. No run has more than `MAX_EPOCHS` epochs, with one
    exception: a run on very few images has at least the images of `MIN_STEPS` steps if the time allows it.

    Args:
        n_images: number of training images.
        hours: the time budget, or None.
        images_per_s: measured or estimated speed of training, over all devices. It is needed if `hours` is set.

    Raises:
        ValueError: `hours` or `images_per_s` is not above 0, or `hours` is set without `images_per_s`.
    """
    for name, value in (("hours", hours), ("images_per_s", images_per_s)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number above 0")
    batch = batch_for(n_images)
    most = max(MAX_EPOCHS * n_images, float(MIN_STEPS * batch))
    if hours is None:
        return min(most, float(DEFAULT_STEPS * batch))
    if images_per_s is None:
        raise ValueError(f"hours={hours:g} needs the speed of training: set images_per_s")
    return min(most, TRAINING_SHARE * 3600 * hours * images_per_s)


def continue_settings(
    n_images: int, embed_dim: int, *, hours: float | None = None, images_per_s: float | None = None
) -> ContinueSettings:
    """Choose the settings for continuing from a trained backbone.

    Args:
        n_images: number of training images, without those that are held out.
        embed_dim: width of the backbone.
        hours: the time budget, or None for a run of `DEFAULT_STEPS` steps.
        images_per_s: measured or estimated speed of training, over all devices. It is needed if `hours` is set.

    Raises:
        ValueError: a value is out of range, or `hours` is set without `images_per_s`.
    """
    if embed_dim < 1:
        raise ValueError(f"embed_dim={embed_dim} must be at least 1")
    seen = images_seen(n_images, hours, images_per_s)
    batch = batch_for(n_images, seen)
    per_epoch = n_images // batch
    steps = max(1, round(seen / batch))
    peak = PEAK_LR * min(1.0, LR_WIDTH / embed_dim)
    momentum = min(max(1 - 1 / (EMA_SHARE * steps), 0.9), 0.996)
    return ContinueSettings(
        batch_size=batch,
        epochs=float(f"{steps / per_epoch:.6g}"),
        n_prototypes=prototypes_for(n_images),
        freeze_backbone=0.15,
        freeze_last_layer=0.02,
        warmup=0.1,
        lr=float(f"{peak / math.sqrt(batch / 1024):.2g}"),  # the loop multiplies by sqrt(batch_size / 1024)
        layer_decay=0.8,
        weight_decay=(0.04, 0.04),
        drop_path=0.0,
        momentum=(round(momentum, 4), 1.0),
        teacher_temp=(0.02, 0.04) if steps < LONG_RUN else (0.04, 0.07),
        teacher_temp_warmup=0.5,
    )


class Length(Protocol):
    """The settings that determine the number of steps of a run."""

    @property
    def epochs(self) -> float: ...

    @property
    def batch_size(self) -> int: ...


def steps_of(settings: Length, n_images: int) -> int:
    """Return the number of steps of a run with these settings, as the training loop computes it."""
    return max(1, round(settings.epochs * (n_images // settings.batch_size)))


def warning(settings: Length, n_images: int) -> str | None:
    """Return a sentence for the user if a run with these settings can hardly improve the backbone, and None otherwise.

    The sentence says why, and what to change.
    """
    if n_images < MIN_IMAGES:
        return f"{n_images} images are too few to continue on (at least {MIN_IMAGES}): use the backbone as it is"
    if (steps := steps_of(settings, n_images)) < MIN_STEPS:
        return (
            f"the run has {steps} steps, and the shortest run that improved a backbone had {MIN_STEPS}: allow more "
            "hours or epochs"
        )
    return None


TABLE_SIZES = (300, 3_000, 30_000, 300_000, 2_000_000)
MEASURED_IMAGES, MEASURED_STEPS = 3_000, 812


def table(embed_dim: int = 384) -> str:
    """Return the published table of settings as Markdown, for a backbone of width `embed_dim` and no time budget.

    The last column says whether runs of this size were measured, on networks of up to 192 dimensions, or are
    extrapolated. The learning rate of wider networks is extrapolated in all rows.
    """
    head = ("images", "batch_size", "epochs", "steps", "n_prototypes", "lr", "peak", "momentum", "basis")
    rows = [head, ("---",) * len(head)]
    for n_images in TABLE_SIZES:
        s = continue_settings(n_images, embed_dim)
        peak = s.lr * math.sqrt(s.batch_size / 1024)
        measured = n_images <= MEASURED_IMAGES and steps_of(s, n_images) <= MEASURED_STEPS
        few = n_images <= MEASURED_IMAGES
        basis = "measured" if measured else "measured in 250 steps" if few else "extrapolated"
        rows.append(
            (
                f"{n_images:,}",
                f"{s.batch_size:,}",
                f"{s.epochs:.3g}",
                f"{steps_of(s, n_images):,}",
                f"{s.n_prototypes:,}",
                f"{s.lr:.2g}",
                f"{peak:.2g}",
                f"{s.momentum[0]:g}",
                basis,
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
