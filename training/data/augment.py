"""Random crops and colour changes for whole batches, in plain tensor code that runs on the network's device.

DINOv2 augments one crop at a time with Pillow and torchvision (`dinov2/data/augmentations.py`). This module augments
many crops at once. `training/data/boxes.py` cuts them out of their images. `tests/training/data/test_augment.py`
compares each operation with a plain per-image definition.

`draw_views` makes the random choices for a crop. They are derived from a key, which is a hash of the seed, the step and
the position of the image in the batch (`training/randomness.py`), so they do not depend on other images. They are made
on the CPU, which therefore knows, without waiting for a GPU, which crops to blur, shift in hue or solarise. Each of
these operations is computed only for the crops that need it. As in torchvision, each crop has its own order of colour
operations. Changes of brightness, contrast and saturation are all blends with another image, so three rounds of
blending can apply them in any order. The hue is shifted before, between or after the rounds.

Crops are processed in chunks. On a CPU, a chunk contains as many crops as fit into the cache; on a GPU, as many as fit
into a memory limit.

One difference from DINOv2 is deliberate. Its `GaussianBlur(p)` blurs with probability 1 - p, so the released weights
were trained with blur on none of the first global crops, 90 % of the second global crops and 50 % of the local crops.
Here `View.blur` is the probability that a crop is blurred, and a run's default settings have these effective values.

Legend: V views per image, B images, n crops, S side of a stored image, o side of a crop. Crops are float [n, 3, o, o]
in 0..1. A box is (top, left, height, width) as fractions of the image's sides. Images are uint8 [B, 3, S, S], squashed
to squares. `aspect` is their width / height before they were squashed. It is needed to give a crop the right aspect
ratio in the original image. Functions with a trailing underscore work in place.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.preprocess import PreprocessSpec
from training.data.boxes import DRAW_BOX, Filter, crop_resize, sample_boxes, window_sides
from training.randomness import SampleRandom

LUMA = (0.2989, 0.587, 0.114)
BLUR_TAPS = 9
BLUR_SIGMA = (0.1, 2.0)
TAPS_FROM_SIDE = 64  # on a CPU, crops of at least this side are blurred tap by tap, and smaller crops by matrices
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # kinds of blend
BLEND_ORDERS = tuple(itertools.permutations(range(3)))
DRAW_LOOK, DRAW_GEOMETRY = DRAW_BOX + 1, DRAW_BOX + 2  # the draws of a crop, by number
CPU_CHUNK, GPU_CHUNK = 2**21, 2**26  # maximum elements of a chunk's crops (or of their windows, if larger)


@dataclass(frozen=True)
class View:
    """The settings for one kind of crop, such as local crops.

    `size` is the side of the crop in pixels. `scale` is the range of the crop's area, as a share of the image's area.
    `blur` and `solarize` are the probabilities that a crop is blurred or solarised. `filter` resizes the crop.
    """

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarize: float = 0.0
    filter: Filter = "bicubic"


@dataclass(frozen=True)
class Jitter:
    """The strengths of the random colour changes, and their probabilities.

    `brightness`, `contrast`, `saturation` and `hue` mean the same as in torchvision's ColorJitter. `white_balance`,
    which DINOv2 does not have, is the strength of random factors, one per channel, that imitate light of another
    colour. `probability` is the probability that a crop gets these five changes; otherwise it gets none of them. `gray`
    is the probability that a crop is converted to gray.
    """

    white_balance: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    probability: float = 0.8
    gray: float = 0.2


@dataclass(frozen=True)
class Geometry:
    """The probabilities that a crop is mirrored or turned. DINOv2 only mirrors crops horizontally.

    `flip` is the probability of a horizontal mirror image, and `vertical_flip` that of a vertical one. `quarter_turns`
    is the probability that the crop is then turned by 90, 180 or 270 degrees, each with the same probability. At 0.75,
    all four orientations are equally frequent.
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0


@dataclass(frozen=True)
class Draws:
    """The random choices for n crops, as tensors on the CPU.

    - `boxes` [n, 4]: top, left, height and width of each crop, as fractions of the image's sides.
    - `flips` bool [n, 2]: True for crops that are mirrored vertically (first column) or horizontally (second column).
    - `transposed` bool [n]: True for crops whose rows and columns are exchanged after mirroring. A quarter turn is a
      mirror image with rows and columns exchanged.
    - `gains` [n, 3]: the white balance factor of each channel, or None if the white balance is not changed.
    - `blends` int [n, 3]: the property that each of three rounds of blending changes: brightness, contrast or
      saturation.
    - `factors` [n, 3]: the strength of the blend in each round. A factor of 1 changes nothing.
    - `hue` [n]: the hue shift as a fraction of a full circle.
    - `hue_round` [n]: the round (0, 1 or 2) before which the hue is shifted. 3 means after the last round, -1 no shift.
    - `gray` and `solarize` bool [n]: True for crops that are converted to gray or solarised.
    - `sigma` [n]: the standard deviation of the blur in pixels. 0 means no blur.
    """

    boxes: Tensor
    flips: Tensor
    transposed: Tensor
    gains: Tensor | None
    blends: Tensor
    factors: Tensor
    hue: Tensor
    hue_round: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor


def _draw_mirrors(flip: Tensor, geometry: Geometry, random: SampleRandom) -> tuple[Tensor, Tensor]:
    """Draw how n crops are mirrored and turned, and return the `flips` and `transposed` of `Draws`.

    `flip` [n] are the uniform random numbers that decide about horizontal mirror images.
    """
    vertical, turned, quarters = random.uniform(DRAW_GEOMETRY, (3,)).unbind(1)
    turns = torch.where(turned < geometry.quarter_turns, 1 + (3 * quarters).long(), 0)  # quarters, counterclockwise
    # A quarter turn counterclockwise is a horizontal mirror image with rows and columns exchanged. A half turn is both
    # mirror images, and three quarter turns are a vertical mirror image with rows and columns exchanged.
    vertical_flips = (vertical < geometry.vertical_flip) ^ (turns >= 2)
    flips = (flip < geometry.flip) ^ ((turns == 1) | (turns == 2))
    return torch.stack((vertical_flips, flips), dim=1), turns % 2 == 1


def draw_views(aspect: Tensor, view: View, jitter: Jitter, geometry: Geometry, random: SampleRandom) -> Draws:
    """Draw the random choices for n crops of the kind `view`.

    `aspect` [n] is the width / height of each crop's image, and `random` is the source of the random numbers.
    """
    flip, jittered, order, hue, gray, blur, sigma, solarize, *rest = random.uniform(DRAW_LOOK, (14,)).unbind(1)
    strengths, gains = torch.stack(rest[:3], dim=1), torch.stack(rest[3:], dim=1)
    chosen = jittered < jitter.probability

    def around(neutral: float, strength: float | Tensor, uniform: Tensor) -> Tensor:
        drawn = neutral - strength + 2 * strength * uniform
        return torch.where(chosen.view(-1, *[1] * (uniform.ndim - 1)), drawn, neutral)

    each = torch.tensor((jitter.brightness, jitter.contrast, jitter.saturation))
    factors = around(1.0, each, strengths).clamp(min=0)
    sequence = (order * (4 * len(BLEND_ORDERS))).long()  # one of the 24 orders of three blends and the hue
    blends = torch.tensor(BLEND_ORDERS)[sequence % len(BLEND_ORDERS)]
    turned = chosen & (jitter.hue > 0)
    flips, transposed = _draw_mirrors(flip, geometry, random)
    return Draws(
        boxes=sample_boxes(aspect, view.scale, random),
        flips=flips,
        transposed=transposed,
        gains=around(1.0, jitter.white_balance, gains) if jitter.white_balance > 0 else None,
        blends=blends,
        factors=factors.gather(1, blends),
        hue=around(0.0, jitter.hue, hue),
        hue_round=torch.where(turned, sequence // len(BLEND_ORDERS), -1),
        gray=gray < jitter.gray,
        sigma=torch.where(blur < view.blur, BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * sigma, 0),
        solarize=solarize < view.solarize,
    )


def _change(chosen: Tensor, crops: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Apply `change` to the selected crops only, and return all crops.

    `crops` [n, ...] may be changed in place. `chosen`, bool [n] on the CPU, is True for the crops to change. `change`
    gets these crops and their entries in each of `parameters` [n, ...].
    """
    n_chosen = int(chosen.sum())
    if n_chosen == 0:
        return crops
    if n_chosen == len(chosen):
        return change(crops, *(p.to(crops.device, non_blocking=True) for p in parameters))
    index = chosen.nonzero()[:, 0]
    device_index = index.to(crops.device, non_blocking=True)
    values = (p[index].to(crops.device, non_blocking=True) for p in parameters)
    return crops.index_copy_(0, device_index, change(crops.index_select(0, device_index), *values))


def grayscale(images: Tensor) -> Tensor:
    """Compute the luma, [n, 1, H, W], of RGB images [n, 3, H, W]."""
    r, g, b = images.chunk(3, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def adjust_white_balance_(images: Tensor, gains: Tensor) -> Tensor:
    """Multiply each channel of `images` [n, 3, H, W] by its gain in `gains` [n, 3], and clip the result to 0..1.

    The images are changed in place and returned.
    """
    return images.mul_(gains[:, :, None, None]).clamp_(0, 1)


def blend_(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Blend each of `images` [n, 3, H, W] with another image, and clip the result to 0..1.

    The result is factor * image + (1 - factor) * other image, so a factor of 1 changes nothing. `kind` selects the
    other image: black for BRIGHTNESS, the mean luma of the image for CONTRAST, and the luma of each pixel for
    SATURATION. `kind` and `factor` [n] are on the CPU. The images are changed in place and returned.
    """
    if bool((factor == 1).all()):
        return images
    rest = (1 - factor) * torch.stack((torch.ones_like(factor), kind == CONTRAST, kind == SATURATION))
    rest[0] = factor
    weights = rest.to(images.device, non_blocking=True)[:, :, None, None, None]  # [3, n, 1, 1, 1]
    if bool((kind == BRIGHTNESS).all()):
        return images.mul_(weights[0]).clamp_(0, 1)
    luma = grayscale(images)
    flat = luma.mean(dim=(1, 2, 3), keepdim=True) * weights[1]
    return images.mul_(weights[0]).add_(luma.mul_(weights[2]).add_(flat)).clamp_(0, 1)


def adjust_hue_(images: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue of each of `images` [n, 3, H, W] in the HSV colour space.

    `turn` [n] is the shift as a fraction of a full circle. The images are changed in place and returned.
    """
    r, g, b = images.chunk(3, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # The hue in turns is the middle of the strongest channel's sector plus a share of the weaker channels' difference.
    # The cases are added with factors 0 and 1, because `torch.where` is several times slower on a CPU.
    red = (r >= value).to(images.dtype)
    green = (g >= value).to(images.dtype).mul_(1 - red)
    blue = (1 - red).sub_(green)
    difference = (g - b).mul_(red).addcmul_(b - r, green).addcmul_(r - g, blue)
    hue = difference.div_(chroma.clamp(min=1e-12).mul_(6)).add_(green, alpha=1 / 3).add_(blue, alpha=2 / 3)
    hue.add_(turn.view(-1, 1, 1, 1))
    # A channel equals the value if the hue is within a sixth of a turn of the channel's own hue (0, 1/3 or 2/3). From
    # there to two sixths it falls by the chroma. The constants are 1/2 minus the own hue, so that the distance is from
    # 1/2, plus a whole turn, because `frac` of a negative number is negative.
    own = _per_channel((1.5, 7 / 6, 5 / 6), hue.device, hue.dtype)
    distance = (hue + own).frac_().sub_(0.5).abs_()  # [n, 3, H, W]
    lost = distance.mul_(6).sub_(1).clamp_(0, 1)
    return torch.addcmul(value, lost, chroma, value=-1, out=images)


def _gaussian_taps(sigma: Tensor) -> Tensor:
    """Return Gaussian kernels [n, 9] with the standard deviations `sigma` [n] in pixels.

    A sigma of 0 gives a kernel that changes nothing.
    """
    offsets = torch.arange(BLUR_TAPS, device=sigma.device) - BLUR_TAPS // 2
    taps = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    return taps / taps.sum(dim=1, keepdim=True)


def blur_weights(sigma: Tensor, side: int) -> Tensor:
    """Return matrices [n, side, side] that blur an axis of `side` pixels with a Gaussian kernel of 9 taps.

    `sigma` [n] is the standard deviation in pixels. Pixels beyond an edge are reflected.
    """
    offsets = torch.arange(BLUR_TAPS, device=sigma.device) - BLUR_TAPS // 2
    source = (torch.arange(side, device=sigma.device)[:, None] + offsets).abs()  # [side, taps]
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    index = source.expand(sigma.shape[0], -1, -1)
    weights = sigma.new_zeros(sigma.shape[0], side, side)
    return weights.scatter_add_(2, index, _gaussian_taps(sigma)[:, None, :].expand_as(index))


def _blur_by_matrices(images: Tensor, sigma: Tensor) -> Tensor:
    weights = blur_weights(sigma, images.shape[-1]).unsqueeze(1)
    return weights @ images @ weights.transpose(-1, -2)


def _blur_by_taps(images: Tensor, sigma: Tensor) -> Tensor:
    half, side = BLUR_TAPS // 2, images.shape[-1]
    taps = _gaussian_taps(sigma)[:, :, None, None, None]
    for axis in (3, 2):
        pad = (half, half, 0, 0) if axis == 3 else (0, 0, half, half)
        padded = torch.nn.functional.pad(images, pad, mode="reflect")
        images = padded.narrow(axis, half, side) * taps[:, half]
        for offset in (o for o in range(BLUR_TAPS) if o != half):
            images.addcmul_(padded.narrow(axis, offset, side), taps[:, offset])
    return images


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of `images` [n, 3, o, o] with a Gaussian kernel of 9 taps, and return the result.

    `sigma` [n] is the standard deviation in pixels. Pixels beyond an edge are reflected. On a GPU, and for small
    images, the blur is computed as two matrix products. For large images on a CPU it is computed tap by tap, which is
    less work.
    """
    by_taps = images.device.type == "cpu" and images.shape[-1] >= TAPS_FROM_SIDE
    return _blur_by_taps(images, sigma) if by_taps else _blur_by_matrices(images, sigma)


def solarize(images: Tensor) -> Tensor:
    """Replace each value x above one half with 1 - x, and return the result. `images` have values in 0..1.

    For values that are multiples of 1/255, the result is the same as that of Pillow's `ImageOps.solarize` with
    threshold 128. The function is continuous, so a small rounding difference in the input stays small.
    """
    return torch.minimum(images, 1 - images)


def _to_gray_(images: Tensor) -> Tensor:
    return images.copy_(grayscale(images).expand_as(images))


def change_colors_(crops: Tensor, draws: Draws, index: Tensor) -> Tensor:
    """Apply white balance, colour jitter and gray to `crops` [n, 3, o, o], and return the result.

    `draws` contains the random choices for all crops, and `index` [n] contains the positions of these crops in `draws`.
    `crops` may be changed in place.
    """
    if draws.gains is not None:
        crops = adjust_white_balance_(crops, draws.gains[index].to(crops.device, non_blocking=True))
    hue, hue_round = draws.hue[index], draws.hue_round[index]
    blends, factors = draws.blends[index], draws.factors[index]
    for turn in range(4):
        crops = _change(hue_round == turn, crops, adjust_hue_, hue)
        if turn < 3:
            crops = blend_(crops, blends[:, turn], factors[:, turn])
    return _change(draws.gray[index], crops, _to_gray_)


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return one constant per channel, [3, 1, 1], on a device.

    The tensor is cached, because each copy to a GPU would make the host wait.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    spec = PreprocessSpec()
    mean, std = (_per_channel(tuple(v), images.device, images.dtype) for v in (spec.mean, spec.std))
    return mean, std


def normalize(images: Tensor, out: Tensor | None = None) -> Tensor:
    """Subtract ImageNet's mean from images [n, 3, H, W] in 0..1, and divide by ImageNet's standard deviation.

    This is the normalisation of `model.preprocess`. The result is written to `out` if it is given, and returned.
    """
    mean, std = _mean_and_std(images)
    return torch.addcmul(-mean / std, images, 1 / std, out=out)


def _transpose(crops: Tensor) -> Tensor:
    return crops.transpose(2, 3).contiguous()


def augmented_views(
    images: Tensor,
    aspect: Tensor,
    view: View,
    n_views: int,
    jitter: Jitter,
    geometry: Geometry,
    random: SampleRandom,
) -> Tensor:
    """Make `n_views` random crops of each image, normalised for the network.

    Args:
        images: B squares of side S, uint8 [B, 3, S, S].
        aspect: width / height of the images before they were squashed, [B] on the CPU.
        view: the kind of crop.
        n_views: number of crops per image.
        jitter: the strengths and probabilities of the colour changes.
        geometry: the probabilities that a crop is mirrored or turned.
        random: the source of the random numbers, on the CPU, with one key per image. The random choices for an image
            depend only on its key.

    Returns:
        float [n_views * B, 3, view.size, view.size]: the first crops of all images, then the second crops, and so on.
    """
    n_images, side, out = len(images), images.shape[-1], view.size
    draws = draw_views(aspect.repeat(n_views), view, jitter, geometry, random.views(n_views))
    on_cpu = images.device.type == "cpu"
    windows = torch.full((len(draws.boxes),), side)
    if on_cpu:
        windows = window_sides(draws.boxes, side, out, view.filter)
    chunk = CPU_CHUNK if on_cpu else GPU_CHUNK
    result = torch.empty(len(windows), 3, out, out, device=images.device)
    for window in sorted(set(windows.tolist())):
        per_chunk = max(1, chunk // (3 * max(out, window) ** 2))
        for index in torch.split((windows == window).nonzero()[:, 0], per_chunk):
            boxes, flips = draws.boxes[index], draws.flips[index]
            crops = crop_resize(images, index % n_images, boxes, out, flips, window, view.filter)
            crops = _change(draws.transposed[index], crops, _transpose)
            crops = change_colors_(crops, draws, index)
            sigma = draws.sigma[index]
            crops = _change(sigma > 0, crops, gaussian_blur, sigma)
            crops = _change(draws.solarize[index], crops, solarize)
            first, last = int(index[0]), int(index[-1])
            if last - first + 1 == len(index):
                normalize(crops, out=result[first : last + 1])
            else:
                result.index_copy_(0, index.to(images.device, non_blocking=True), normalize(crops))
    return result
