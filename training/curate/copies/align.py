"""Whether two images show the same pixels: matched keypoints give a map between them, and the aligned pixels decide.

Two different photographs of one object have many matching keypoints, too. They differ in perspective, light and
background, so their aligned pixels agree in some places only. A copy agrees almost everywhere.

Legend: M matched keypoints. A map is an array [2, 3]: a point (x, y) of the first image lies at map @ (x, y, 1) in the
second.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, map_coordinates

from training.curate.copies.keypoints import LUMA, FloatArray, Keypoints, luma, mirrored_descriptors

LARGEST_RATIO: Final = 0.85
"""The largest ratio of the distances to the nearest and the second nearest descriptor at which keypoints match."""
TOLERANCE_PX, SCALE_TOLERANCE, ANGLE_TOLERANCE = 6.0, 1.5, 0.5
"""How far a match may be from the map: pixels, ratio of scales, radians."""
FEWEST_INLIERS: Final = 6
STEP, FINE_STEP, COARSE_STEP = 2, 4, 6  # spacing of the grids on which pixels are compared, and the map is refined
FEWEST_POINTS: Final = 100
COARSE_SIGMA, FINE_SIGMA, PIXEL_SIGMA = 4.0, 1.5, 1.0  # Gaussians: to find the map, to refine it, to compare pixels
MOST_STEPS: Final = 6
LEAST_COARSE: Final = 0.7
"""The smallest correlation of the coarse gray images at which the map is refined."""
LEAST_THUMBNAIL: Final = 0.9
"""The smallest correlation of two thumbnails at which the whole images are compared without keypoints."""
BLOCK: Final = 12
"""The side of the blocks in which pixels are compared, in steps of the grid."""
WORST_BLOCKS: Final = 0.1
"""The similarity is the quantile of this order of the blocks' agreement, so a tenth may differ, such as a caption."""
LEAST_OVERLAP: Final = 0.5
"""The smallest share of the smaller image that the other must show."""
SHEAR_COST: Final = 5.0
"""The factor by which the shear of the map reduces the similarity. A copy may be squashed, but it is not sheared."""
NOISE: Final = 2.0
"""The standard deviation, in gray levels, below which a block is treated as plain."""

Float64 = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complexfloating]


class Alignment(NamedTuple):
    """How two images fit on each other."""

    similarity: float  # the agreement of the aligned pixels, 0 to 1
    overlap: float  # the share of the smaller image that the other shows, 0 to 1
    inliers: int  # matched keypoints that agree with the map; 0 if the map was found without keypoints


NOT_ALIGNED: Final = Alignment(0.0, 0.0, 0)


def align(first: Keypoints, second: Keypoints) -> Alignment:
    """Align two images, and return how well they fit."""
    estimates = [_estimated_map(first, second, mirrored) for mirrored in (False, True)]
    maps = [estimate for estimate in estimates if estimate is not None]
    if not maps and (whole := _whole_map(first, second)) is not None:
        maps = [(whole, 0)]
    best = NOT_ALIGNED
    for guess, inliers in maps:
        refined = _refined(luma(first.rgb), second.rgb, guess)
        if refined is not None:
            similarity, overlap = _compare(first.rgb, second.rgb, refined)
            best = max(best, Alignment(similarity, overlap, inliers))
    return best


def _whole_map(first: Keypoints, second: Keypoints) -> Float64 | None:
    """Return the map between the whole images with the symmetry that fits best, or None if none fits.

    It serves images with too few keypoints, such as a plain object on a plain background. Plain images always fit.
    """
    a, thumbnail = _standardised(first.thumbnail), second.thumbnail
    corners = np.array([[0.0, 1, 0], [0, 0, 1]])  # x and y of the corners at the top left, top right and bottom left
    plain = max(float(first.thumbnail.std()), float(thumbnail.std())) < NOISE
    best, found = LEAST_THUMBNAIL, corners if plain else None
    for transposed in (False, True):
        for rows in (1, -1):
            for columns in (1, -1):
                turned = (thumbnail.T if transposed else thumbnail)[::rows, ::columns]
                score = float((a * _standardised(turned)).mean())
                if score > best:
                    mapped = corners.copy()
                    mapped[0] = mapped[0] if columns == 1 else 1 - mapped[0]
                    mapped[1] = mapped[1] if rows == 1 else 1 - mapped[1]
                    best, found = score, mapped[::-1] if transposed else mapped
    if found is None:
        return None
    (h, w), (height, width) = first.rgb.shape[:2], second.rgb.shape[:2]
    origin, right, down = (found * np.array([[width - 1], [height - 1]])).T
    return np.stack([(right - origin) / (w - 1), (down - origin) / (h - 1), origin], axis=1)


def _standardised(thumbnail: npt.NDArray[np.uint8]) -> Float64:
    values = thumbnail.astype(np.float64) - thumbnail.mean()
    return values / max(float(values.std()), NOISE)


def _estimated_map(first: Keypoints, second: Keypoints, mirrored: bool) -> tuple[Float64, int] | None:
    """Return the map with which most matched keypoints agree, and their number, or None if there are too few."""
    if min(len(first.xy), len(second.xy)) < FEWEST_INLIERS:
        return None
    descriptors = mirrored_descriptors(first.descriptors) if mirrored else first.descriptors
    scores = descriptors @ second.descriptors.T
    nearest, rows = scores.argmax(1), np.arange(len(scores))
    score = scores[rows, nearest]
    mutual = scores.argmax(0)[nearest] == rows
    scores[rows, nearest] = -1
    # The squared distance of two descriptors is 2 - 2 * score.
    matched = np.flatnonzero(mutual & (1 - score <= LARGEST_RATIO**2 * (1 - scores.max(1))))
    if len(matched) < FEWEST_INLIERS:
        return None
    sign, other = -1.0 if mirrored else 1.0, nearest[matched]
    start = (first.xy[matched] * (sign, 1)) @ (1, 1j)  # points as complex numbers, after mirroring
    end = second.xy[other] @ (1, 1j)
    angle = np.pi - first.angle[matched] if mirrored else first.angle[matched]
    turn = second.scale[other] / first.scale[matched] * np.exp(1j * (second.angle[other] - angle))
    inside = _agreeing(start, end, turn)
    if len(inside) < FEWEST_INLIERS:
        return None
    return _fitted(start[inside], end[inside], sign), len(inside)


def _agreeing(start: Complex, end: Complex, turn: Complex) -> npt.NDArray[np.int64]:
    """Return the numbers of the largest set of matches that agree on a rotation, a scale and a shift.

    Args:
        start, end: the points [M] of the matches in the two images.
        turn: the rotation and the scale [M] that each match suggests.
    """
    mapped = turn[:, None] * (start - start[:, None]) + end[:, None]  # [suggestion, match]
    relative = turn / turn[:, None]
    agrees = np.abs(mapped - end) < TOLERANCE_PX
    agrees &= np.abs(np.log(np.abs(relative))) < np.log(SCALE_TOLERANCE)
    agrees &= np.abs(np.angle(relative)) < ANGLE_TOLERANCE
    return np.flatnonzero(agrees[agrees.sum(1).argmax()])


def _fitted(start: Complex, end: Complex, sign: float) -> Float64:
    """Return the least-squares similarity transform between points [M], of which `start` was mirrored if sign is -1."""
    centred = start - start.mean()
    turn = (centred.conj() * (end - end.mean())).sum() / max(float((np.abs(centred) ** 2).sum()), 1e-9)
    shift = end.mean() - turn * start.mean()
    return np.array([[sign * turn.real, -turn.imag, shift.real], [sign * turn.imag, turn.real, shift.imag]])


def _on_grid(image: FloatArray, step: int) -> FloatArray:
    return image[step // 2 :: step, step // 2 :: step]


def _grid_of(image: npt.NDArray[np.generic], step: int) -> Float64:
    """Return the points [3, h, w] of a grid on an image of H x W pixels, as (x, y, 1)."""
    height, width = image.shape[:2]
    y, x = np.mgrid[step // 2 : height : step, step // 2 : width : step].astype(np.float64)
    return np.stack([x, y, np.ones_like(x)])


def _inside(points: Float64, image: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    height, width = image.shape[:2]
    x, y = points
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _sample(image: FloatArray, points: Float64) -> FloatArray:
    return map_coordinates(image, points[::-1], order=1, mode="nearest", output=np.float32)


def _mixture(gray: npt.NDArray[np.floating], channels: npt.NDArray[np.floating]) -> Float64:
    """Return the weights [4] of the three channels [3, pixels] and of 1 that come closest to gray levels [pixels]."""
    columns = np.concatenate([channels, np.ones((1, channels.shape[1]))]).astype(np.float64)
    normal = columns @ columns.T
    normal[np.arange(3), np.arange(3)] += 1e-3 * np.trace(normal[:3, :3])
    return np.linalg.solve(normal, columns @ gray).astype(np.float64)


def _refined(first: FloatArray, other: npt.NDArray[np.uint8], guess: Float64) -> Float64 | None:
    """Return the affine map near `guess` that makes a gray image and an RGB image agree best.

    The channels of the RGB image are mixed to the gray image that is most like the first at `guess`. The method is that
    of Lucas and Kanade, with a gain and an offset between the gray levels. Return None if the coarse images do not
    agree.
    """
    points = np.tensordot(guess, _grid_of(first, COARSE_STEP), 1)
    valid = _inside(points, other)
    if valid.sum() < FEWEST_POINTS:
        return None
    channels = [_sample(channel, points[:, valid]) for channel in _smooth_channels(other, COARSE_SIGMA)]
    gray = _on_grid(gaussian_filter(first, COARSE_SIGMA, truncate=3.0), COARSE_STEP)
    second = (other @ _mixture(gray[valid], np.stack(channels))[:3]).astype(np.float32)
    return _aligned(first, second, guess)


def _aligned(first: FloatArray, second: FloatArray, guess: Float64) -> Float64 | None:
    """Refine a map between two gray images (see `_refined`)."""
    found, reach = guess, np.array([first.shape[1] / 2, first.shape[0] / 2, 1.0])
    for sigma, spacing in ((COARSE_SIGMA, COARSE_STEP), (FINE_SIGMA, FINE_STEP)):
        grid = _grid_of(first, spacing)
        target = _on_grid(gaussian_filter(first, sigma, truncate=3.0), spacing)
        smooth = gaussian_filter(second, sigma, truncate=3.0)
        slope_y, slope_x = np.gradient(smooth)
        for step in range(MOST_STEPS + 1):
            points = np.tensordot(found, grid, 1)
            valid = _inside(points, second)
            if valid.sum() < FEWEST_POINTS:
                return None
            here, at = grid[:, valid], points[:, valid]
            values = _sample(smooth, at).astype(np.float64)
            if step == MOST_STEPS:
                break
            gx, gy = _sample(slope_x, at).astype(np.float64), _sample(slope_y, at).astype(np.float64)
            change = _solved(np.concatenate([gx * here, gy * here]), values, target[valid])
            found = found + change
            if np.abs(change @ reach).max() < 0.02:
                break
        if sigma == COARSE_SIGMA and _correlation(values, target[valid]) < LEAST_COARSE:
            return None
    return found


def _solved(jacobian: Float64, values: Float64, target: FloatArray) -> Float64:
    """Return the change [2, 3] of the map with which `values` [pixels] come closest to `target`, up to gain and offset.

    `jacobian` [6, pixels] says how the values change with the map.
    """
    columns = np.concatenate([jacobian, values[None], np.ones((1, len(values)))])
    scale = np.abs(columns).max(1, keepdims=True) + 1e-9
    columns = columns / scale
    normal = columns @ columns.T
    normal[np.diag_indices_from(normal)] += 1e-6 * np.trace(normal)
    solution: Float64 = np.linalg.solve(normal, columns @ (target - values)) / scale[:, 0]
    return solution[:6].reshape(2, 3) / max(0.2, 1 + float(solution[6]))


def _correlation(a: Float64, b: npt.NDArray[np.floating]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b + NOISE**2) / (np.sqrt((a @ a) * (b @ b)) + NOISE**2))


def _compare(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], found: Float64) -> tuple[float, float]:
    """Return the similarity of the pixels of two RGB images that the map aligns, and the overlap."""
    points = np.tensordot(found, _grid_of(first, STEP), 1)
    valid = _inside(points, second)
    area = abs(float(np.linalg.det(found[:, :2])))
    if not 0.1 < area < 10:
        return 0.0, 0.0
    pixels = first.shape[0] * first.shape[1], second.shape[0] * second.shape[1] / area
    overlap = min(1.0, float(valid.sum()) * STEP**2 / min(pixels))
    if overlap < LEAST_OVERLAP:
        return 0.0, overlap
    a = np.stack([_on_grid(channel, STEP) for channel in _smooth_channels(first, PIXEL_SIGMA)])
    b = np.stack([_sample(channel, points) for channel in _smooth_channels(second, PIXEL_SIGMA)])
    agreement = max(_agreement(a, b, valid), _agreement(b, a, valid))
    return agreement * max(0.0, 1 - SHEAR_COST * _shear(found)), overlap


def _smooth_channels(rgb: npt.NDArray[np.uint8], sigma: float) -> list[FloatArray]:
    return [gaussian_filter(rgb[..., c].astype(np.float32), sigma, truncate=3.0) for c in range(3)]


def _shear(found: Float64) -> float:
    """Return by how much the map differs from a rotation and a change of the aspect ratio, in either order.

    The result is the cosine of the angle between the images of the two axes, or between the axes that they come from.
    """
    linear = found[:, :2]

    def cosine(a: Float64, b: Float64) -> float:
        return abs(float(a @ b)) / max(float(np.linalg.norm(a)) * float(np.linalg.norm(b)), 1e-9)

    return min(cosine(linear[:, 0], linear[:, 1]), cosine(linear[0], linear[1]))


def _agreement(a: FloatArray, b: FloatArray, valid: npt.NDArray[np.bool_]) -> float:
    """Return how well the aligned pixels of two images [3, h, w] agree in the blocks with texture, 0 to 1.

    The gray levels of `a` are compared with the mixture of the channels of `b` that is most like them. Changes of the
    brightness, the contrast, the saturation and the hue are such mixtures, except where they clip levels.
    """
    gray = np.tensordot(LUMA, a, 1)
    weights = _mixture(gray[valid], b[:, valid])
    mixed = np.tensordot(weights[:3], b, 1) + weights[3]
    correlation, weight = _block_agreement(gray, mixed, valid)
    if len(correlation):
        return _weighted_quantile(correlation, weight, WORST_BLOCKS)
    difference = np.abs(a[:, valid].mean(1) - b[:, valid].mean(1)).max()
    return 1.0 if difference <= NOISE else 0.0  # two plain images


def _block_agreement(target: FloatArray, warped: Float64, valid: npt.NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """Return the correlation of the pixels in each block, and the weight of the block: the contrast of its pixels."""
    height, width = (side // BLOCK * BLOCK for side in target.shape)

    def sums(values: npt.NDArray[np.generic]) -> Float64:
        blocks = values[:height, :width].astype(np.float64).reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
        return blocks.sum((1, 3)).ravel()

    a, b = target * valid, warped * valid
    count = sums(valid)
    enough = count >= BLOCK**2 / 2
    count = np.maximum(count, 1)
    mean_a, mean_b = sums(a) / count, sums(b) / count
    var_a, var_b = sums(a * a) / count - mean_a**2, sums(b * b) / count - mean_b**2
    covariance = sums(a * b) / count - mean_a * mean_b
    noise = NOISE**2
    textured = enough & (np.maximum(var_a, var_b) > noise)
    correlation = covariance / np.sqrt(np.maximum(var_a, noise) * np.maximum(var_b, noise))
    weight = np.sqrt(np.maximum(var_a, 0)) + np.sqrt(np.maximum(var_b, 0))
    return correlation[textured], weight[textured]


def _weighted_quantile(values: Float64, weights: Float64, share: float) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(np.clip(values[order][np.searchsorted(total, share * total[-1])], 0, 1))
