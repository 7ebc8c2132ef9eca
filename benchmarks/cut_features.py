"""Compare features and link thresholds for the normalised cut of service/vision/cut.py, on images with known objects.

    OMP_NUM_THREADS=1 python benchmarks/cut_features.py GROCERY --out benchmarks/results/2026-11-30-cut-features.json

GROCERY is a folder of images. Parts of them are pasted on a plain colour. The result is the mean intersection over
union, counted in patches, of the first part that is cut out and the object that overlaps it most. With shift 1, the
same vector of length 1 is added to all features, which also have length 1. Most cosines are then high, as in many large
models.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.object_score import encoded, iou, opened
from benchmarks.vision_scenes import Scene, composite, patch_masks, scene
from service.features.patches import unit_rows
from service.features.pipeline import View
from service.vision.cut import first_object
from service.vision.local import Vision, open_vision

_FEATURES = ("keys", "queries", "patches")
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grocery", type=Path, help="folder of images, at any depth")
    parser.add_argument("--model", default="auto", help="artifact folder or name of a model")
    parser.add_argument("--count", type=int, default=40, help="images of each kind")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    vision = open_vision(arguments.model, threads=1)
    paths = sorted(arguments.grocery.rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // arguments.count)]
    makers: dict[str, Callable[[int], Scene]] = {
        "1 object": lambda seed: scene(seed),
        "3 objects": lambda seed: scene(500 + seed, objects=3),
        "plain colour": lambda seed: composite(seed, opened(paths[seed % len(paths)]), None),
    }
    overlaps: dict[str, dict[str, list[float]]] = {}
    for kind, make in makers.items():
        for seed in range(arguments.count):
            for label, overlap in compared(vision, make(seed)).items():
                overlaps.setdefault(label, {}).setdefault(kind, []).append(overlap)
    means = {label: {kind: round(float(np.mean(v)), 3) for kind, v in each.items()} for label, each in overlaps.items()}
    for label, each in means.items():
        print(f"{label:40} {each}")
    if arguments.out:
        command = f"python benchmarks/cut_features.py GROCERY --count {arguments.count}"
        result = {"command": command, "model": vision.artifact.name, "mean_iou": means}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def compared(vision: Vision, drawn: Scene) -> dict[str, float]:
    """Return the overlap of the first part that is cut out with the object that it matches best, for each feature,
    shift and threshold."""
    last, prefix = vision.model.config.depth - 1, 1 + vision.model.config.num_register_tokens
    view = View((f"keys.{last}", f"queries.{last}"), vision.model.spec(224))
    analysed = vision.analyse(encoded(drawn.image), view)
    truths = patch_masks(drawn.masks, analysed.grid)
    found: dict[str, float] = {}
    for name in _FEATURES:
        rows = unit_rows(analysed.patches if name == "patches" else analysed.outputs[f"{name}.{last}"][prefix:])
        for shift in (0, 1):
            common = np.random.default_rng(0).normal(size=rows.shape[1])
            shifted = unit_rows(rows + shift * common / np.linalg.norm(common))
            for threshold in _THRESHOLDS:
                cut = first_object(shifted, analysed.grid, threshold=threshold)
                overlap = 0.0 if cut is None else max(iou(cut.mask, truth) for truth in truths)
                found[f"{name}, shift {shift}, threshold {threshold or 'computed'}"] = overlap
    return found


if __name__ == "__main__":
    main()
