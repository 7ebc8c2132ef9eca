"""Fit the constants of service/vision/object_score.py, and measure how often objects are found in images without
objects.

    python benchmarks/object_score.py GROCERY --out benchmarks/results/2026-11-30-object-score.json

GROCERY is the folder of grocery images. Positive examples are the first parts that are separated in these images, and
the parts of generated scenes that match an object (intersection over union above 0.5). Negative examples are all parts
that are separated in generated images without an object, and parts of scenes that match no object (below 0.2). The
parts come from cuts and from LOST. The test uses different seeds and images from the fit.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.vision_scenes import EMPTY_KINDS, Pixels, composite, empty_image, patch_masks, scene
from service.features.patches import unit_rows
from service.features.pipeline import View
from service.vision.cut import first_object
from service.vision.local import Vision, open_vision
from service.vision.lost import next_object, several_lost
from service.vision.multi import several_cuts
from service.vision.object_score import BIAS, MIN_SCORE, WEIGHTS, Measurements, measure

Mask = npt.NDArray[np.bool_]
Features = npt.NDArray[np.float32]

_SIZE = 224
_PARTS_PER_IMAGE = 4
_PENALTY = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grocery", type=Path, help="folder of images that show objects, at any depth")
    parser.add_argument("--model", default="auto", help="artifact folder or name of a model")
    parser.add_argument("--count", type=int, default=50, help="images of each kind in the fit and in the test")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    vision = open_vision(arguments.model)
    paths = sorted(arguments.grocery.rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // (3 * arguments.count))]
    weights, bias = fit(*examples(vision, paths[0::3], arguments.count))
    print("fitted: ", np.round(weights, 2).tolist(), round(bias, 2))
    print("in code:", list(WEIGHTS), BIAS)
    rates = found_rates(vision, paths[1::3], paths[2::3], arguments.count)
    result = {
        "command": f"python benchmarks/object_score.py GROCERY --count {arguments.count}",
        "model": vision.artifact.name,
        "min_score": MIN_SCORE,
        "fitted": {"weights": np.round(weights, 3).tolist(), "bias": round(bias, 3)},
        "in_code": {"weights": list(WEIGHTS), "bias": BIAS},
        "share_of_images_with_an_object": rates,
    }
    print(json.dumps(result["share_of_images_with_an_object"], indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def features_of(vision: Vision, image: Pixels) -> tuple[dict[str, Features], tuple[int, int]]:
    """Return the features of the patches of an image, scaled to length 1, and the size of the grid. "keys" are those of
    the last block. The other features imitate those of other models."""
    last, prefix = vision.model.config.depth - 1, 1 + vision.model.config.num_register_tokens
    view = View((f"keys.{last}", f"keys.{last - 1}"), vision.model.spec(_SIZE))
    analysed = vision.analyse(encoded(image), view)
    keys = unit_rows(analysed.outputs[f"keys.{last}"][prefix:])
    common = np.random.default_rng(0).normal(size=keys.shape[1])
    features = {
        "keys": keys,
        "keys of the block before": unit_rows(analysed.outputs[f"keys.{last - 1}"][prefix:]),
        "final patch features": unit_rows(analysed.patches),
        "keys with a common component": unit_rows(keys + common / np.linalg.norm(common)),
    }
    return features, analysed.grid


def keys_of(vision: Vision, image: Pixels) -> tuple[Features, tuple[int, int]]:
    """Return the keys of the last block for the patches of an image, scaled to length 1, and the size of the grid."""
    features, grid = features_of(vision, image)
    return features["keys"], grid


def examples(
    vision: Vision, paths: list[Path], count: int
) -> tuple[list[Measurements], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the measurements of separated parts, 1 for each part that is an object and 0 for the others, and the
    weights of the parts."""
    rows: list[tuple[Measurements, int, float]] = []
    for kind in EMPTY_KINDS:
        for seed in range(count):
            for order, (_, measured) in enumerate(_parts(*keys_of(vision, empty_image(kind, seed)))):
                rows.append((measured, 0, 1.0 if order % _PARTS_PER_IMAGE == 0 else 0.3))
    for seed in range(count):
        for objects in (1, 3):
            drawn = scene(seed + 1000 * objects, objects=objects)
            features, grid = keys_of(vision, drawn.image)
            truths = patch_masks(drawn.masks, grid)
            for mask, measured in _parts(features, grid):
                overlap = max(iou(mask, truth) for truth in truths)
                if overlap > 0.5 or overlap < 0.2:
                    rows.append((measured, int(overlap > 0.5), 1.0 if overlap > 0.5 else 0.5))
    for path in paths[:count]:
        for order, (_, measured) in enumerate(_parts(*keys_of(vision, opened(path)))):
            if order % _PARTS_PER_IMAGE == 0:
                rows.append((measured, 1, 0.5))
    measurements, is_object, weight = zip(*rows, strict=True)
    return list(measurements), np.asarray(is_object, np.float64), np.asarray(weight, np.float64)


def _parts(features: Features, grid: tuple[int, int]) -> Iterator[tuple[Mask, Measurements]]:
    """Yield the parts that repeated cuts and repeated LOST separate, with their measurements."""
    for method in ("cut", "lost"):
        remaining = np.ones(grid, bool)
        for _ in range(_PARTS_PER_IMAGE):
            if method == "cut":
                cut = first_object(features, grid, among=remaining)
                mask = None if cut is None else cut.mask
            else:
                mask = next_object(features, grid, remaining)
            measured = None if mask is None else measure(features, mask, remaining)
            if mask is None or measured is None:
                break
            yield mask, measured
            remaining &= ~mask


def fit(
    measurements: list[Measurements], is_object: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], float]:
    """Fit a logistic function with a small penalty. Objects and the other parts have the same total weight, so the
    score is a probability if objects and other parts are equally frequent."""
    from scipy.optimize import minimize

    values = np.asarray(measurements)
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    scaled = np.column_stack([(values - mean) / deviation, np.ones(len(values))])
    balanced = weight * np.where(is_object > 0, 0.5 / weight[is_object > 0].sum(), 0.5 / weight[is_object == 0].sum())
    signs = 2 * is_object - 1

    def loss(parameters: npt.NDArray[np.float64]) -> float:
        errors = np.logaddexp(0, -signs * (scaled @ parameters))
        return float(balanced @ errors + _PENALTY / 2 * np.square(parameters[:-1]).sum())

    found = minimize(loss, np.zeros(scaled.shape[1])).x
    weights = found[:-1] / deviation
    return weights, float(found[-1] - weights @ mean)


def found_rates(
    vision: Vision, grocery: list[Path], backgrounds: list[Path], count: int
) -> dict[str, dict[str, float]]:
    """Return the share of the images of each kind in which repeated cuts and LOST find an object, by method and
    features."""
    images: dict[str, list[Pixels]] = {
        kind: [empty_image(kind, 10_000 + seed) for seed in range(count)] for kind in EMPTY_KINDS
    }
    images["scenes, 1 object"] = [scene(20_000 + seed).image for seed in range(count)]
    images["scenes, 3 objects"] = [scene(30_000 + seed, objects=3).image for seed in range(count)]
    images["parts of images on a plain colour"] = [
        composite(seed, opened(path), None).image for seed, path in enumerate(backgrounds[:count])
    ]
    images["grocery"] = [opened(path) for path in grocery[:count]]
    rates: dict[str, dict[str, float]] = {}
    for kind, pictures in images.items():
        found: dict[str, list[bool]] = {}
        for image in pictures:
            features, grid = features_of(vision, image)
            objects = several_lost(features["keys"], grid, max_objects=10, min_score=MIN_SCORE)
            found.setdefault("LOST, keys", []).append(bool(objects))
            for name, rows in features.items():
                objects = several_cuts(rows, grid, max_objects=10, min_score=MIN_SCORE)
                found.setdefault(f"cut, {name}", []).append(bool(objects))
        for label, each in found.items():
            rates.setdefault(label, {})[kind] = round(float(np.mean(each)), 4)
    for rate in rates.values():
        rate["all images without an object"] = round(float(np.mean([rate[kind] for kind in EMPTY_KINDS])), 4)
    return rates


def iou(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def opened(path: Path) -> Pixels:
    return np.asarray(Image.open(path).convert("RGB"))


def encoded(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
