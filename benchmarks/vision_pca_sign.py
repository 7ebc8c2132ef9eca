"""Compare rules that choose the sign of a principal component of an image's patch features.

    python benchmarks/vision_pca_sign.py --data GROCERY [--date 2026-11-30]

GROCERY contains `val/` with one folder per class. The features are those of the bundled artifact. A rule is good if the
sign stays the same when the image changes slightly, and if similar components of two images of one class get the same
sign. The script counts how often the sign changes:

- image and changed image: the image is compared with itself after noise of 1 % on the features, after JPEG compression
  with quality 60, and after 2 % of each side are cut off. Components whose cosine is at most 0.9 are left out, because
  they are not the same component.
- pairs: all pairs of images of one class, for components whose cosine is at least 0.6.

The results are averages over the first three components. The script prints a table, and as the last line the result as
JSON, which is also written to benchmarks/results/.
"""

import argparse
import datetime
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from model.artifact import bundled_artifact, load_artifact
from model.engines import onnxruntime_engine
from model.engines.protocol import OpenRequest
from model.preprocess import preprocess
from service.vision.pca import reference_direction

Array = npt.NDArray[np.float64]
Rule = Callable[[Array, Array, Array], float]
"""A function of the patches [N, D], the component [D] and the coordinates [N]. The component gets the sign of its
result."""

COMPONENTS = 3
RANDOM_DIRECTIONS = 12


def border_lean(coordinates: Array) -> float:
    side = round(len(coordinates) ** 0.5)  # the artifact crops squares
    grid = coordinates.reshape(side, side)
    inner = grid[1:-1, 1:-1]
    return float(inner.mean() - (grid.sum() - inner.sum()) / (grid.size - inner.size))


def rules(width: int) -> dict[str, Rule]:
    def along(direction: Array) -> Rule:
        return lambda patches, component, coordinates: float(component @ direction)

    fixed = {
        "fixed direction (chosen)": along(reference_direction(width)),
        "sum of the loadings": along(np.ones(width)),
        "sum of the cubed loadings": lambda x, v, p: float((v**3).sum()),
        "largest loading (scikit-learn)": lambda x, v, p: float(v[np.abs(v).argmax()]),
        "mean feature": lambda x, v, p: float(x.mean(axis=0) @ v),
        "skewness of the coordinates": lambda x, v, p: float((p**3).sum()),
        "signed squares (Bro et al. 2008)": lambda x, v, p: float((np.abs(p) * p).sum()),
        "largest coordinate": lambda x, v, p: float(p[np.abs(p).argmax()]),
        "border below inner patches": lambda x, v, p: border_lean(p),
    }
    rng = np.random.default_rng(0)
    return fixed | {f"random direction {i}": along(rng.normal(size=width)) for i in range(RANDOM_DIRECTIONS)}


class Components:
    """The components [3, D] of one image's patches [N, D], and each rule's signs, -1 or 1."""

    def __init__(self, patches: Array, candidates: dict[str, Rule]) -> None:
        centred = patches - patches.mean(axis=0)
        self.vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1].T[:COMPONENTS]
        self.signs = {
            name: [1 if rule(patches, vector, centred @ vector) >= 0 else -1 for vector in self.vectors]
            for name, rule in candidates.items()
        }


def changes(pairs: list[tuple[Components, Components]], rule: str, least: float) -> float:
    """Return the share of component pairs with an absolute cosine above `least` that the rule orients differently."""
    flips = []
    for a, b in pairs:
        cosines = np.sum(a.vectors * b.vectors, axis=1)
        products = np.multiply(a.signs[rule], b.signs[rule]) * cosines
        flips.extend(products[np.abs(cosines) > least] < 0)
    return float(np.mean(flips))


def changed_images(image: Image.Image) -> dict[str, Image.Image]:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    width, height = image.size
    box = (round(width * 0.02), round(height * 0.02), round(width * 0.98), round(height * 0.98))
    return {"image": image, "JPEG 60": Image.open(buffer).convert("RGB"), "cut 2 %": image.crop(box)}


def measure(data: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Return the number of images, and the shares of changed signs by rule and by kind of pair."""
    artifact = load_artifact(bundled_artifact())
    engine = onnxruntime_engine.open(OpenRequest(artifact, "onnxruntime", "fp32", threads=2))
    candidates = rules(artifact.manifest.config.embed_dim)
    rng = np.random.default_rng(0)
    kinds: dict[str, list[tuple[Components, Components]]] = {}
    by_class: dict[str, list[Components]] = {}
    files = sorted((data / "val").glob("*/*.jpg"))
    for file in files:
        images = changed_images(Image.open(file).convert("RGB"))
        pixels = [preprocess(np.asarray(image), artifact.manifest.preprocess) for image in images.values()]
        patches = dict(zip(images, engine.run(np.stack(pixels)).patches.astype(np.float64), strict=True))
        patches["noise 1 %"] = patches["image"] * (1 + 0.01 * rng.normal(size=patches["image"].shape))
        made = {name: Components(rows, candidates) for name, rows in patches.items()}
        for name in ("noise 1 %", "JPEG 60", "cut 2 %"):
            kinds.setdefault(name, []).append((made["image"], made[name]))
        by_class.setdefault(file.parent.name, []).append(made["image"])
    kinds["pairs of a class"] = [pair for group in by_class.values() for pair in itertools.combinations(group, 2)]
    shares = {
        rule: {kind: changes(pairs, rule, 0.6 if "class" in kind else 0.9) for kind, pairs in kinds.items()}
        for rule in candidates
    }
    drawn = [shares.pop(f"random direction {i}") for i in range(RANDOM_DIRECTIONS)]
    shares[f"random direction, mean of {RANDOM_DIRECTIONS}"] = {
        kind: float(np.mean([row[kind] for row in drawn])) for kind in kinds
    }
    return len(files), shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--date", default=datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    arguments = parser.parse_args()
    images, shares = measure(arguments.data)
    table = Table("rule", *next(iter(shares.values())), title=f"signs that change, {images} images")
    for rule, row in shares.items():
        table.add_row(rule, *(f"{100 * share:.1f} %" for share in row.values()))
    Console().print(table)
    rounded = {rule: {kind: round(share, 4) for kind, share in row.items()} for rule, row in shares.items()}
    result = json.dumps({"benchmark": "vision-pca-sign", "date": arguments.date, "images": images, "changed": rounded})
    path = Path(__file__).parent / "results" / f"{arguments.date}-vision-pca-sign.json"
    path.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
