"""Trains a segmentation head and depth heads on 24 generated scenes with the bundled model, and prints their metrics.

    python benchmarks/train_heads.py [--out FILE.json]

A scene is a floor that comes nearer towards the lower edge, and a box that stands on it. Five scenes are held out. The
depth head is trained with two largest depths: that of the scenes, and 1.5 times as much.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

from training.evaluate.backbone import load_backbone  # noqa: E402
from training.heads import FitSettings, FittedHead, fit_depth, fit_segmentation  # noqa: E402

SCENES, HEIGHT, WIDTH = 24, 96, 128
FAR_M, NEAR_M = 6.0, 2.0


def make_scenes(folder: Path) -> None:
    """Write images, masks (0 floor, 1 box) and depth maps."""
    rng = np.random.default_rng(0)
    down = np.arange(HEIGHT)[:, None] / HEIGHT
    floor = FAR_M - (FAR_M - NEAR_M) * down
    for kind in ("images", "masks", "depth"):
        (folder / kind).mkdir()
    for number in range(SCENES):
        metres = np.broadcast_to(floor, (HEIGHT, WIDTH)).copy()
        pixels = np.broadcast_to((40 + 120 * down)[..., None], (HEIGHT, WIDTH, 3)).copy()
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        left, top = rng.integers(5, 80), rng.integers(20, 50)
        box = slice(top, top + 35), slice(left, left + 40)
        metres[box], pixels[box], mask[box] = floor[top + 35, 0], (220, 180, 40), 1
        pixels += rng.integers(0, 20, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        Image.fromarray((1000 * metres).astype(np.uint16)).save(folder / "depth" / f"{number}.png")


def measure(fit: Callable[[], FittedHead]) -> dict[str, Any]:
    """Fit a head, and return its metrics and the CPU time in seconds."""
    started = time.process_time()
    metrics = fit().description.metrics
    return {**metrics, "cpu_s": round(time.process_time() - started, 1)}


def main() -> None:
    """Train the heads, print their metrics, and write a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    backbone = load_backbone("auto")

    def quiet(what: str, total: int) -> Callable[[int], object]:
        return lambda count: None

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_scenes(folder)
        settings = FitSettings(resize=112)
        exact = FitSettings(resize=112, max_depth=FAR_M)
        rows = {
            "segmentation": measure(lambda: fit_segmentation("a", backbone, folder, settings, quiet)),
            "depth, max_depth 1.5 times the largest": measure(
                lambda: fit_depth("a", backbone, folder, settings, quiet)
            ),
            "depth, max_depth the largest": measure(lambda: fit_depth("a", backbone, folder, exact, quiet)),
        }
    text = json.dumps({"model": backbone.name, "scenes": SCENES, "heads": rows}, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
