"""Random boxes in images, and crops: the parts of images inside boxes, resized to squares of one size.

DINOv2 resizes crops with Pillow's bicubic filter (`dinov2/data/augmentations.py`). Resizing and mirroring are linear
and act on each axis separately, so a crop is computed by two small matrix products, rows @ image @ columns^T. The
products give the same values as Pillow's `resize` with a box. `tests/training/data/test_boxes.py` compares them.

Two details differ from DINOv2, which first cuts out a box of whole pixels and then resizes it. Here a box may begin
and end within a pixel, and the filter also sees the pixels just outside the box.

On a CPU, a window around each crop is first cut out of the image, because a local crop needs only a small part of its
image.

Legend: B images, n crops, S side of a stored image, W side of the window cut out of it, o side of a crop. A box is
(top, left, height, width) as fractions of the image's sides. Images are uint8 [B, 3, S, S], squashed to squares.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from training.randomness import SampleRandom

Filter = Literal["bicubic", "bilinear"]
"""The filter that resizes crops. DINOv2 uses `bicubic`."""

REACH: dict[Filter, int] = {"bicubic": 2, "bilinear": 1}
"""How far a filter reaches from the centre of an output pixel, in pixels of the larger of the two images."""

CROP_ATTEMPTS = 10
CROP_ASPECT = (3 / 4, 4 / 3)
DRAW_BOX = 0  # the number of the draw of a crop's box, see `SampleRandom.uniform`
WINDOW_STEP = 32  # pixels


def sample_boxes(aspect: Tensor, scale: tuple[float, float], random: SampleRandom) -> Tensor:
    """Draw the boxes of n random crops as in torchvision's RandomResizedCrop.

    Args:
        aspect: width / height of each crop's image, [n].
        scale: range of a box's area, as a share of the image's area. The area is uniform in this range.
        random: the source of the random numbers, with one key per crop.

    Returns:
        [n, 4]: top, left, height and width of each box, as fractions of the image's sides. The log of a box's aspect
        ratio is uniform between log 3/4 and log 4/3. If ten attempts give no box that fits into the image, the box is
        the largest centred one with an aspect ratio in this range.
    """
    # In float64, the way in which exp is vectorised changes neither the choice of the attempt nor the rounded box.
    drawn = random.uniform(DRAW_BOX, (2 * CROP_ATTEMPTS + 2,)).double()
    area, ratio, shift = drawn[:, :CROP_ATTEMPTS], drawn[:, CROP_ATTEMPTS:-2], drawn[:, -2:]
    aspect = aspect.double()
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = (math.log(bound) for bound in CROP_ASPECT)
    ratio = (low + (high - low) * ratio).exp() / aspect[:, None]  # width / height in units of the image's sides
    widths, heights = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    centred = aspect.clamp(*CROP_ASPECT) / aspect  # width / height of the fallback box, in units of the sides
    width = torch.where(any_fits, widths.gather(1, first)[:, 0], centred.clamp(max=1))
    height = torch.where(any_fits, heights.gather(1, first)[:, 0], (1 / centred).clamp(max=1))
    top, left = torch.where(any_fits[:, None], shift, 0.5).unbind(1)
    return torch.stack((top * (1 - height), left * (1 - width), height, width), dim=1).float()


def _bilinear_(distance: Tensor) -> Tensor:
    """Compute a triangle of half width 1 at each distance from its centre. The distances are overwritten."""
    return distance.abs_().neg_().add_(1).clamp_(min=0)


def _bicubic_(distance: Tensor) -> Tensor:
    """Compute twice the bicubic filter of Pillow at each distance from its centre. The distances are overwritten.

    The filter is Keys' cubic with a = -0.5 (IEEE ASSP 29, 1981). With x = |distance|, it is 1.5 x^3 - 2.5 x^2 + 1 up to
    1, and -0.5 x^3 + 2.5 x^2 - 4 x + 2 up to 2. Twice the filter is t^2 (t - 1) + 2 s^2 (1 - 2 s), where t is 2 - x and
    s is 1 - x, or 0 if these are negative. This form needs no choice between cases, which is slow on a CPU.
    """
    outer = distance.abs_().neg_().add_(2).clamp_(min=0)  # t
    inner = (outer - 1).clamp_(min=0)  # s
    square = inner.square()
    result = (outer - 1).mul_(outer).mul_(outer).add_(square, alpha=2)
    return result.addcmul_(square, inner, value=-4)


def resize_weights(start: Tensor, length: Tensor, source: int, out: int, kernel: Filter) -> Tensor:
    """Return n matrices [n, out, source], each of which resamples part of an image axis to `out` pixels.

    The axis has `source` pixels. The part begins at `start` [n] and ends at `start + length`, in pixels. If `length`
    [n] is negative, the part is mirrored. As in Pillow's `resize(..., box=...)`, each row has the weights of the filter
    around the centre of an output pixel. If the part shrinks, the filter is widened by |length| / out. Pixels beyond
    the edge of the image get no weight, and the weights in each row are scaled to sum to one.
    """
    step = length / out  # source pixels per output pixel, [n]
    centres = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * step[:, None]  # [n, out]
    stretch = step.abs().clamp(min=1)[:, None, None]
    pixels = (torch.arange(source, device=start.device) + 0.5) / stretch  # [n, 1, source]
    distance = pixels - centres[:, :, None] / stretch
    weights = _bicubic_(distance) if kernel == "bicubic" else _bilinear_(distance)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _margin(length: Tensor, out: int, kernel: Filter) -> Tensor:
    """Return how far beyond the ends of a part of `length` pixels the filter reaches at most, in pixels."""
    return REACH[kernel] * (length / out).clamp(min=1)


def window_sides(boxes: Tensor, side: int, out: int, kernel: Filter) -> Tensor:
    """Return, for each crop, the side in pixels of a square window that contains all pixels the crop needs, int [n].

    `boxes` [n, 4] are the crops (top, left, height, width) as fractions of the image's sides. `side` is the side of the
    images and `out` the side of the resized crops, both in pixels. The result is rounded up to a multiple of
    `WINDOW_STEP`, so that only a few sizes occur, but is never more than `side`.
    """
    length = boxes[:, 2:] * side
    seen = (length + 2 * _margin(length, out, kernel)).amax(dim=1) + 2
    return ((seen / WINDOW_STEP).ceil().long() * WINDOW_STEP).clamp(max=side)


def crop_resize(
    images: Tensor, numbers: Tensor, boxes: Tensor, out: int, flips: Tensor, window: int, kernel: Filter
) -> Tensor:
    """Cut crops out of images, resize them, and return them as float [n, 3, out, out] in 0..1.

    Args:
        images: squares of side S, uint8 [B, 3, S, S].
        numbers: the number of the image that each crop is cut from, int [n] on the CPU.
        boxes: top, left, height and width of each crop, as fractions of the image's sides, [n, 4] on the CPU.
        out: side of the resized crops, pixels.
        flips: True for crops that are mirrored, bool [n, 2] on the CPU: vertically (the top becomes the bottom), and
            horizontally.
        window: side of the part of the image, around each crop, from which the crop is computed. It is either S (the
            whole image) or at least the largest side that `window_sides` returns for the boxes.
        kernel: the filter that resizes the crops. The bicubic filter makes values beyond those of the image, which are
            clipped to 0..1 as in Pillow's images of bytes.
    """
    side = images.shape[-1]
    start, length = (boxes * side).chunk(2, dim=1)  # each [n, 2]: vertical, horizontal
    if window < side:
        corner = (start - _margin(length, out, kernel)).floor().clamp(0, side - window).long()
        corners = zip(numbers.tolist(), *corner.T.tolist(), strict=True)
        pixels = torch.stack([images[i, :, top : top + window, left : left + window] for i, top, left in corners])
        start = start - corner
    else:
        pixels = images.index_select(0, numbers.to(images.device, non_blocking=True))
    sign = 1 - 2 * flips.float()
    start, length = start + length * (sign < 0), length * sign
    spans = torch.stack((start, length)).flatten(1).to(images.device, non_blocking=True)  # [2, n*2]
    rows, columns = resize_weights(spans[0], spans[1], window, out, kernel).view(-1, 2, out, window).unbind(1)
    # The channels are between height and width, so that each product handles all three channels at once.
    wide = pixels.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(2)  # [n, W, 3*W]
    narrow = ((rows / 255) @ wide).view(-1, out * 3, window) @ columns.transpose(1, 2)  # [n, o*3, o]
    crops = narrow.view(-1, out, 3, out).transpose(1, 2).contiguous()
    return crops.clamp_(0, 1) if kernel == "bicubic" else crops
