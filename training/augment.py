"""Random crops and colours of whole batches, in plain tensor code that runs where the network runs.

What DINOv2 does per crop with Pillow and torchvision in worker processes (`dinov2/data/augmentations.py`) is done here
for all crops of a batch at once. Resizing and blurring are linear along each axis, so a crop is two small matrix
products, rows @ image @ columns^T: antialiased exactly as Pillow does it (with a box and the bilinear filter), with the
flip folded into the columns, and as good for a CPU as for a GPU. `tests/training/test_augment.py` compares each
operation with a plain per-image definition.

Decided knowingly: DINOv2's `GaussianBlur(p)` blurs with probability 1 - p, so the released weights saw blur on 0 / 90 /
50 % of first global, second global and local crops. The probabilities here mean what they say; the recipes state the
effective ones.

The order of the colour operations is drawn once per call, not per crop. Nothing here draws from a global generator.

Legend: V views per photo, B photos, S side of the stored square photo, o side of a crop. Images are float [.., 3, H, W]
in 0..1. A box is (top, left, height, width) as fractions of the photo's sides. Photos are stored squashed to squares;
`aspect` is their true width / height, so that a crop's aspect is right in the photo's own pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from model.preprocess import PreprocessSpec

LUMA = (0.2989, 0.587, 0.114)
BLUR_TAPS = 9
BLUR_SIGMA = (0.1, 2.0)
CROP_ATTEMPTS = 10
CROP_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class View:
    """One kind of crop: side in pixels, range of the share of the photo's area, and probabilities of the extras."""

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarize: float = 0.0


@dataclass(frozen=True)
class Jitter:
    """Strengths as in torchvision's ColorJitter, applied with `probability`; `gray` is the share of gray crops.

    `white_balance` is ours: the light of another shop or hour, which the four others do not imitate.
    """

    white_balance: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    probability: float = 0.8
    gray: float = 0.2


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _chance(n: int, probability: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) < probability


def sample_boxes(aspect: Tensor, scale: tuple[float, float], generator: Generator) -> Tensor:
    """Random-resized-crop boxes [n, 4] for photos of width / height `aspect` [n].

    Area uniform in `scale`, log aspect uniform in 3/4 to 4/3, ten attempts; if none fits, the largest centred box whose
    aspect is in range (torchvision's RandomResizedCrop).
    """
    n = aspect.shape[0]
    area = _uniform((n, CROP_ATTEMPTS), *scale, generator)
    low, high = (torch.tensor(a).log().item() for a in CROP_ASPECT)
    ratio = _uniform((n, CROP_ATTEMPTS), low, high, generator).exp() / aspect[:, None]  # in units of the photo's sides
    widths, heights = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    centred = aspect.clamp(*CROP_ASPECT) / aspect  # width / height of the fallback box, in units of the sides
    width = torch.where(found, widths.gather(1, first)[:, 0], centred.clamp(max=1))
    height = torch.where(found, heights.gather(1, first)[:, 0], (1 / centred).clamp(max=1))
    shift = torch.where(found[:, None], _uniform((n, 2), 0, 1, generator), torch.full_like(ratio[:, :2], 0.5))
    return torch.stack((shift[:, 0] * (1 - height), shift[:, 1] * (1 - width), height, width), dim=1)


def resize_weights(start: Tensor, length: Tensor, source: int, out: int) -> Tensor:
    """Rows [n, out, source] that resample [start, start + length] (pixels, [n]) to `out` pixels.

    A triangle of half width max(1, length / out) around each output pixel's centre, cut at the image's edge and
    normalised: Pillow's `resize(..., BILINEAR, box=...)`.
    """
    step = length / out  # source pixels per output pixel, [n]
    centres = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * step[:, None]  # [n, out]
    pixels = torch.arange(source, device=start.device) + 0.5
    distance = (pixels - centres[:, :, None]).abs() / step.clamp(min=1)[:, None, None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, out: int, flips: Tensor) -> Tensor:
    """Crops [V, B, 3, o, o] of `images` [B, 3, S, S] by `boxes` [V, B, 4], mirrored where `flips` [V, B]."""
    n_views, n_images = boxes.shape[:2]
    side = images.shape[-1]
    # Photo before view, so that a photo's views share one product and nothing is copied to broadcast it.
    top, left, height, width = (boxes.transpose(0, 1).flatten(0, 1) * side).unbind(1)  # each [B*V]
    rows = resize_weights(top, height, side, out).view(n_images, n_views * out, side)
    columns = resize_weights(left, width, side, out)
    columns = torch.where(flips.T.flatten()[:, None, None], columns.flip(1), columns)  # [B*V, o, S]
    by_row = images.transpose(1, 2).flatten(2)  # [B, S, 3*S]
    crops = (rows @ by_row).view(n_images * n_views, -1, side) @ columns.transpose(1, 2)  # [B*V, o*3, o]
    return crops.view(n_images, n_views, out, -1, out).permute(1, 0, 3, 2, 4)


def grayscale(images: Tensor) -> Tensor:
    """Luma [n, 1, H, W] of `images` [n, 3, H, W]."""
    r, g, b = images.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`images` [n, 3, H, W] times `factor` [n], clipped to 0..1."""
    return (images * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_white_balance(images: Tensor, gains: Tensor) -> Tensor:
    """`images` [n, 3, H, W] times one gain per channel [n, 3], clipped to 0..1: the colour of the light."""
    return (images * gains[:, :, None, None]).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with each image's mean luma: 0 flat, 1 unchanged."""
    return _blend(images, grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image: 0 gray, 1 unchanged."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of `images` [n, 3, H, W] by `shift` [n] of a full circle, in HSV."""
    value, strongest = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    r, g, b = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    by_strongest = torch.stack(((g - b) / safe, 2 + (b - r) / safe, 4 + (r - g) / safe), dim=1)
    hue = by_strongest.gather(1, strongest.unsqueeze(1))[:, 0] + 6 * shift.view(-1, 1, 1)  # sixths of the circle
    channels = []
    for offset in (5.0, 3.0, 1.0):  # red, green, blue: v - c * max(0, min(k, 4 - k, 1)), k = offset + hue mod 6
        k = (offset + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur_weights(sigma: Tensor, side: int) -> Tensor:
    """Matrices [n, side, side] of a 9-tap Gaussian of `sigma` [n] pixels, edges reflected; sigma 0 is the identity."""
    half = BLUR_TAPS // 2
    offsets = torch.arange(-half, half + 1, device=sigma.device)
    taps = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # [n, taps]
    taps = taps / taps.sum(dim=1, keepdim=True)
    source = torch.arange(side, device=sigma.device)[:, None] + offsets  # [side, taps]
    source = source.abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    weights = sigma.new_zeros(sigma.shape[0], side, side)
    index = source.expand(sigma.shape[0], -1, -1)
    return weights.scatter_add_(2, index, taps[:, None, :].expand_as(index))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """`images` [n, 3, o, o] blurred with `sigma` [n] pixels each."""
    weights = blur_weights(sigma, images.shape[-1]).unsqueeze(1)
    return weights @ images @ weights.transpose(-1, -2)


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert the values from 128/255 up of the `chosen` [n] images (Pillow's `ImageOps.solarize` at 128)."""
    return torch.where(chosen.view(-1, 1, 1, 1) & (images >= 128 / 255), 1 - images, images)


def color_jitter(images: Tensor, jitter: Jitter, generator: Generator) -> Tensor:
    """Each image [n, 3, H, W] with its own factors; those not chosen get the neutral ones."""
    n = images.shape[0]
    chosen = _chance(n, jitter.probability, generator)

    def factors(strength: float, neutral: float) -> Tensor:
        drawn = _uniform((n,), neutral - strength, neutral + strength, generator).clamp(min=neutral - 1)
        return torch.where(chosen, drawn, torch.full_like(drawn, neutral))

    if jitter.white_balance > 0:
        gains = [factors(jitter.white_balance, 1.0) for _ in range(images.shape[1])]
        images = adjust_white_balance(images, torch.stack(gains, dim=1))
    table: list[tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = [
        (adjust_brightness, jitter.brightness, 1.0),
        (adjust_contrast, jitter.contrast, 1.0),
        (adjust_saturation, jitter.saturation, 1.0),
        (adjust_hue, jitter.hue, 0.0),
    ]
    for index in torch.randperm(len(table), generator=generator, device=generator.device).tolist():
        adjust, strength, neutral = table[index]
        if strength > 0:
            images = adjust(images, factors(strength, neutral))
    if jitter.gray > 0:
        gray = _chance(n, jitter.gray, generator).view(-1, 1, 1, 1)
        images = torch.where(gray, grayscale(images), images)
    return images


def normalize(images: Tensor) -> Tensor:
    """ImageNet's mean and deviation, as `model.preprocess` applies them in evaluation and serving."""
    spec = PreprocessSpec()
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (images - mean) / std


def augmented_views(
    images: Tensor, aspect: Tensor, view: View, n_views: int, jitter: Jitter, generator: Generator
) -> Tensor:
    """`n_views` random crops of each photo, ready for the network.

    Args:
        images: float [B, 3, S, S] in 0..1.
        aspect: width / height of the photos before they were squashed [B].
        view, n_views, jitter: what to draw.
        generator: on the device of the images; the only source of randomness.

    Returns:
        [V * B, 3, o, o], all photos' first views first.
    """
    n = n_views * images.shape[0]
    boxes = sample_boxes(aspect.repeat(n_views), view.scale, generator).view(n_views, -1, 4)
    flips = _chance(n, 0.5, generator).view(n_views, -1)
    crops = crop_resize(images, boxes, view.size, flips).flatten(0, 1)
    crops = color_jitter(crops, jitter, generator)
    if view.blur > 0:
        sigma = _uniform((n,), *BLUR_SIGMA, generator) * _chance(n, view.blur, generator)
        crops = gaussian_blur(crops, sigma)
    if view.solarize > 0:
        crops = solarize(crops, _chance(n, view.solarize, generator))
    return normalize(crops)
