"""Make images with known objects, images without an object, and features with known objects.

`scene` draws shapes with a texture on a background with another texture and returns the mask of each shape. `composite`
pastes parts of real images on other images. `empty_image` draws an image without an object: blank, a gradient, noise or
a texture. `planted_features` makes the patch features that an ideal model would compute for a scene. Each function
returns the same result for the same seed.

Legend: H, W size of the image; h, w size of the patch grid; N = h * w patches; D features.
"""

from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
EmptyKind = Literal["blank", "gradient", "noise", "texture"]

EMPTY_KINDS: Final[tuple[EmptyKind, ...]] = ("blank", "gradient", "noise", "texture")


class Scene(NamedTuple):
    """An image [H, W, 3] and the masks [H, W] of its objects, which do not overlap."""

    image: Pixels
    masks: list[Mask]

    @property
    def mask(self) -> Mask:
        """The union of all objects."""
        return np.logical_or.reduce(self.masks)


def scene(seed: int, size: tuple[int, int] = (320, 320), objects: int = 1) -> Scene:
    """Draw `objects` shapes that do not touch, each with its own texture, on a textured background."""
    rng = np.random.default_rng(seed)
    hue = rng.random()
    image = _texture(rng, size, _colour(hue, rng), contrast=rng.uniform(4, 20))
    masks = _apart(rng, size, objects)
    for number, mask in enumerate(masks):
        colour = _colour(hue + (number + 1) / (objects + 1) + rng.uniform(-0.05, 0.05), rng)
        image = np.where(mask[:, :, None], _texture(rng, size, colour, contrast=rng.uniform(10, 40)), image)
    return Scene(image.clip(0, 255).astype(np.uint8), masks)


def composite(seed: int, front: Pixels, back: Pixels | None, size: tuple[int, int] = (320, 320)) -> Scene:
    """Paste a part of the image `front`, with the outline of a shape, on `back`, or on a plain colour if `back` is
    None."""
    rng = np.random.default_rng(seed)
    [mask] = _apart(rng, size, 1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
    square = min(front.shape[:2])
    part = Image.fromarray(front[(front.shape[0] - square) // 2 :, (front.shape[1] - square) // 2 :][:square, :square])
    pasted = np.zeros((*size, 3), np.uint8)
    pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = np.asarray(part.resize((width, height)))
    if back is None:
        behind = np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (*size, 3))
    else:
        behind = np.asarray(Image.fromarray(back).resize((size[1], size[0])))
    return Scene(np.where(mask[:, :, None], pasted, behind), [mask])


def empty_image(kind: EmptyKind, seed: int, size: tuple[int, int] = (320, 320)) -> Pixels:
    """Draw an image without an object."""
    rng = np.random.default_rng([seed, EMPTY_KINDS.index(kind)])
    colour = rng.uniform(0, 255, 3)
    if kind == "blank":
        image = np.broadcast_to(colour, (*size, 3))
    elif kind == "gradient":
        image = _gradient(rng, size, colour)
    elif kind == "noise":
        sigma = rng.uniform(3, 90)
        grey = rng.random() < 0.5
        image = colour + rng.normal(0, sigma, (*size, 1 if grey else 3))
    else:
        image = _texture(rng, size, colour, contrast=rng.uniform(10, 60))
    return np.asarray(image).clip(0, 255).astype(np.uint8)


def planted_features(
    masks: list[Mask], grid: tuple[int, int], seed: int, dims: int = 64, noise: float = 0.35
) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Return the features that an ideal model would compute for objects with these masks [H, W].

    Each object and the background have a random direction. The feature of a patch is the mean of the directions in it,
    weighted by area, plus a component that all patches share and random noise of length `noise`.

    Returns:
        float32 [N, D], and the fraction of each patch that the objects cover, float64 [objects, h, w].
    """
    rng = np.random.default_rng(seed)
    shares = np.stack([_area_share(mask, grid) for mask in masks])  # [objects, h, w]
    parts = np.concatenate([1 - shares.sum(0, keepdims=True), shares])  # [1 + objects, h, w]
    directions = rng.normal(size=(len(parts), dims))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    common = rng.normal(size=dims) / np.sqrt(dims)
    wobble = rng.normal(size=(grid[0] * grid[1], dims)) * (noise / np.sqrt(dims))
    return (parts.reshape(len(parts), -1).T @ directions + 0.3 * common + wobble).astype(np.float32), shares


def patch_masks(masks: list[Mask], grid: tuple[int, int]) -> list[Mask]:
    """Return the patches of which each object covers at least half, each bool [h, w]."""
    return [_area_share(mask, grid) >= 0.5 for mask in masks]


def _area_share(mask: Mask, grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    picture = Image.fromarray(mask.astype(np.float32))
    return np.asarray(picture.resize((grid[1], grid[0]), Image.Resampling.BOX), np.float64)


def _apart(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[Mask]:
    """Draw the masks of `count` shapes with a gap of at least a twelfth of the image between them."""
    gap = round(min(size) / 12)
    while True:
        taken = np.zeros(size, bool)
        masks: list[Mask] = []
        for _ in range(40 * count):
            mask = _shape(rng, size, scale=1 if count == 1 else 0.7)
            if not (mask & taken).any():
                masks.append(mask)
                taken |= ndimage.binary_dilation(mask, iterations=gap)
            if len(masks) == count:
                return masks


def _shape(rng: np.random.Generator, size: tuple[int, int], scale: float) -> Mask:
    """Draw one ellipse, rounded box or blob, 0.2 to 0.3 times the short side in radius."""
    short = min(size)
    radius = scale * short * rng.uniform(0.18, 0.3)
    y, x = np.mgrid[: size[0], : size[1]]
    dy = y - rng.uniform(1.2 * radius, size[0] - 1.2 * radius)
    dx = x - rng.uniform(1.2 * radius, size[1] - 1.2 * radius)
    turn = rng.uniform(0, np.pi)
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / (radius * rng.uniform(0.9, 1.15))
    v = (dy * np.cos(turn) - dx * np.sin(turn)) / (radius * rng.uniform(0.75, 1.0))
    kind = rng.integers(3)
    if kind == 0:
        return np.asarray(u**2 + v**2 < 1)
    if kind == 1:
        return np.asarray(u**4 + v**4 < 0.8)
    angle = np.arctan2(v, u)
    return np.asarray(np.hypot(u, v) < 0.9 + 0.12 * np.cos(rng.integers(3, 6) * angle + rng.uniform(0, 6)))


def _colour(hue: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    third = np.array([0, 1, 2]) / 3
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue - third))
    return rng.uniform(60, 120) + wave * rng.uniform(60, 110)


def _texture(
    rng: np.random.Generator, size: tuple[int, int], colour: npt.NDArray[np.float64], contrast: float
) -> npt.NDArray[np.float64]:
    """Draw a texture, float64 [H, W, 3]: filtered noise, stripes or squares. Its elements are at most a tenth of the
    short side, so it has no larger structure."""
    y, x = np.mgrid[: size[0], : size[1]]
    period = min(size) * rng.uniform(0.015, 0.1)
    turn = rng.uniform(0, np.pi)
    along = (x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / period
    across = (y * np.cos(turn) - x * np.sin(turn)) * 2 * np.pi / period
    kind = rng.integers(3)
    if kind == 0:
        field = ndimage.gaussian_filter(rng.normal(size=size), period / 4, mode="wrap")
        field /= field.std()
    elif kind == 1:
        field = np.sin(along)
    else:
        field = np.sign(np.sin(along) * np.sin(across))
    field = field + rng.normal(0, 0.2, size)
    return colour + contrast * field[:, :, None] * rng.uniform(0.6, 1, 3)


def _gradient(
    rng: np.random.Generator, size: tuple[int, int], colour: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Draw a gradient between two colours, linear or from the centre outwards, float64 [H, W, 3]."""
    y, x = np.mgrid[: size[0], : size[1]]
    u, v = x / size[1] - 0.5, y / size[0] - 0.5
    if rng.random() < 0.7:
        turn = rng.uniform(0, 2 * np.pi)
        ramp = 0.5 + u * np.cos(turn) + v * np.sin(turn)
    else:
        ramp = np.hypot(u, v)
    other = rng.uniform(0, 255, 3)
    return colour + (other - colour) * ramp[:, :, None]
