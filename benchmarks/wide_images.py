"""Make wide images with the object at one end, to compare the ways in which an image can be fitted into a square.

    python benchmarks/wide_images.py GROCERY OUT
    dinov2 eval auto --task knn --data OUT              # fit=crop; repeat with fit=pad and fit=squash

Each image is pasted at the left or right end of a white canvas of the same height that is four times as wide as high.
docs/models.md has the results.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of images, at any depth")
    parser.add_argument("out", type=Path, help="folder for the wide images, with the same subfolders")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for path in sorted(arguments.source.rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        canvas = Image.new("RGB", (4 * image.height, image.height), (255, 255, 255))
        canvas.paste(image, (0 if rng.random() < 0.5 else canvas.width - image.width, 0))
        target = arguments.out / path.relative_to(arguments.source)
        target.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(target, quality=92)


if __name__ == "__main__":
    main()
