"""Measure what the cache of squashed images and the filter of crops cost, and how close the crops are to Meta's.

    python benchmarks/crop_cost.py --data IMAGES [--seeds 2] [--epochs 4]

IMAGES is a folder with `train/` and `val/`. Without `--seeds`, no networks are trained. Everything runs on one CPU
core. Times are CPU times, so that other programs on the machine hardly change them.

- Crops: CPU time of all crops of one image, without colour changes, from squares of several sides, with both filters.
- Cache: memory and decoding time of one image for several sides of the squares, for the images in IMAGES and for a
  JPEG of 4000 x 3000 pixels.
- Fidelity: Meta's code cuts a box of whole pixels out of the full image and resizes it with Pillow's bicubic filter.
  The table has the mean absolute difference between the crops, in levels of 0 to 255, and their detail: the mean
  absolute Laplacian, divided by that of Meta's crops. It covers the images in IMAGES and made images of 1500 x 1000
  pixels, whose spectrum falls as that of natural images (amplitude 1 / frequency). The row `full image` resizes boxes
  in the full image instead of a square, so it shows the difference that remains because our boxes are not rounded.
- k-NN: the recipe `smoke` for a few epochs with several caches and filters. The accuracy is that of 10-NN on the class
  tokens of `val/`.

The script prints tables and writes the result to benchmarks/results/.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from model.decode import Pixels
from training.data.augment import Geometry, Jitter, View, augmented_views
from training.data.boxes import Filter, crop_resize, resize_weights, sample_boxes, window_sides
from training.data.crops import least_cache_side
from training.data.dataset import decode, decode_square, find_images, squash
from training.randomness import SampleRandom, sample_keys
from training.watch.flops import describe_device

FILTERS: tuple[Filter, ...] = ("bilinear", "bicubic")
PRESETS = {  # two global crops and some local crops per image; the number of images; the sides of the caches
    "smoke": ((View(56, (0.3, 1.0)), 2), (View(28, (0.1, 0.4)), 4), 64, (112, 160)),
    "vits14": ((View(224, (0.32, 1.0)), 2), (View(98, (0.05, 0.32)), 8), 8, (160, 256, 624)),
}
SIDES = (112, 160, 256, 624)
DECODED, COMPARED, MADE = 200, 20, 4  # numbers of images
BOXES = 4  # boxes per image and view
RUNS: tuple[tuple[int, Filter], ...] = ((112, "bilinear"), (160, "bicubic"))  # cache and filter of the trained networks
NO_COLOURS = Jitter(probability=0.0, gray=0.0)


def crop_times(rounds: int) -> list[dict[str, Any]]:
    """Return the CPU time in ms per image of all crops, for each preset, cache and filter. The filters take turns."""
    rows = []
    for preset, (*views, n, sides) in PRESETS.items():
        for side in sides:
            images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
            seconds: dict[Filter, list[float]] = {kernel: [] for kernel in FILTERS}
            for number in range(rounds + 1):
                random = SampleRandom(sample_keys(0, number, torch.arange(n)))
                for kernel in FILTERS:
                    start = time.process_time()
                    for kind, (view, count) in enumerate(views):
                        chosen = replace(view, filter=kernel)
                        augmented_views(images, torch.ones(n), chosen, count, NO_COLOURS, Geometry(), random.fork(kind))
                    if number:  # the first round warms up
                        seconds[kernel].append(time.process_time() - start)
            ms = {kernel: round(1000 * float(np.median(taken)) / n, 2) for kernel, taken in seconds.items()}
            rows.append({"crops": preset, "images": n, "side": side, "ms_per_image": ms})
            print(f"crops {preset:<8}{side:>5} px: " + ", ".join(f"{k} {v:.2f} ms/image" for k, v in ms.items()))
    return rows


def cache_costs(files: dict[str, Sequence[bytes]]) -> list[dict[str, Any]]:
    """Return the memory and the CPU time for decoding of one image, for each side of the squares."""
    rows = []
    for side in SIDES:
        decode_ms = {}
        for name, images in files.items():
            start = time.process_time()
            for data in images:
                decode_square(data, side)
            decode_ms[name] = round(1000 * (time.process_time() - start) / len(images), 2)
        rows.append({"side": side, "kilobytes": round(3 * side**2 / 1000, 1), "decode_ms": decode_ms})
        print(f"cache {side:>5} px: {rows[-1]['kilobytes']:.1f} kB, decoding in ms: {decode_ms}")
    return rows


def made_image(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Return an image of noise whose amplitude is 1 / frequency, uint8 [height, width, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    values = np.fft.irfft2(noise, (height, width))
    levels = (128 + 45 * values / values.std()).clip(0, 255).transpose(1, 2, 0)
    return np.asarray(levels, np.uint8)


def metas_crop(image: Pixels, box: Tensor, size: int) -> npt.NDArray[np.float32]:
    """Return a crop as Meta's code makes it, in levels of 0 to 255: a box of whole pixels, resized by Pillow."""
    height, width = image.shape[:2]
    top, left, h, w = (box * torch.tensor([height, width, height, width])).round().int().tolist()
    crop = Image.fromarray(image).crop((left, top, left + w, top + h))
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def detail(crop: npt.NDArray[np.float32]) -> float:
    """Return the mean absolute Laplacian of a crop [size, size, 3]."""
    middle = crop[1:-1, 1:-1]
    around = crop[:-2, 1:-1] + crop[2:, 1:-1] + crop[1:-1, :-2] + crop[1:-1, 2:]
    return float(np.abs(around - 4 * middle).mean())


def our_crop(image: Pixels, square: Tensor, box: Tensor, size: int, kernel: Filter) -> npt.NDArray[np.float32]:
    """Return a crop from the square, or from the full image if the square is empty, in levels of 0 to 255."""
    side = square.shape[-1]
    if side:
        still, window = torch.zeros(1, 2, dtype=torch.bool), int(window_sides(box[None], side, size, kernel))
        crop = crop_resize(square, torch.tensor([0]), box[None], size, still, window, kernel)[0]
    else:
        start, length = (box * torch.tensor(image.shape[:2] * 2)).chunk(2)
        rows, columns = (resize_weights(start[[i]], length[[i]], image.shape[i], size, kernel)[0] for i in range(2))
        crop = torch.einsum("hi,ijc,wj->chw", rows, torch.from_numpy(image) / 255, columns).clamp(0, 1)
    return np.asarray(255 * crop.permute(1, 2, 0).numpy(), np.float32)


def fidelity(name: str, images: Sequence[Pixels]) -> list[dict[str, Any]]:
    """Compare crops from caches of several sides, and from the full image, with Meta's crops of the same boxes."""
    rows = []
    views = [view for view, _ in PRESETS["vits14"][:2]]
    caches: list[tuple[int | None, Filter]] = [(side, kernel) for side in SIDES for kernel in FILTERS]
    for side, kernel in [*caches, (None, "bicubic")]:
        squares = [torch.from_numpy(squash(i, side)[0])[None] if side else torch.empty(0) for i in images]
        for view in views:
            differences, details = [], []
            for number, (image, square) in enumerate(zip(images, squares, strict=True)):
                aspect = torch.full((BOXES,), image.shape[1] / image.shape[0])
                random = SampleRandom(sample_keys(1, number, torch.arange(BOXES)))
                for box in sample_boxes(aspect, view.scale, random):
                    ours = our_crop(image, square, box, view.size, kernel)
                    theirs = metas_crop(image, box, view.size)
                    differences.append(float(np.abs(ours - theirs).mean()))
                    details.append(detail(ours) / detail(theirs))
            difference, share = float(np.mean(differences)), float(np.mean(details))
            figures = {"difference": round(difference, 2), "detail": round(share, 3)}
            rows.append({"images": name, "side": side, "filter": kernel, "size": view.size, **figures})
            origin = f"cache {side} px" if side else "full image"
            print(
                f"{name}, {origin}, {kernel}, crops of {view.size} px: differ by {difference:.2f} levels, "
                f"detail {share:.0%} of Meta's"
            )
    return rows


def train(data: Path, side: int, kernel: Filter, seed: int, epochs: int) -> dict[str, Any]:
    """Train the recipe `smoke` in a process of its own, and return its 10-NN accuracy and CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = [f"cache_size={side}", f"crop_filter={kernel}", f"seed={seed}", f"epochs={epochs}"]
        command = [sys.executable, "-m", "training", "--data", str(data), "--recipe", "smoke", "--out", str(out)]
        before = os.times()
        subprocess.run(
            [*command, *settings, "eval_every_epochs=0"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        accuracy = json.loads((out / "knn.json").read_text())
    row = {"side": side, "filter": kernel, "seed": seed, "epochs": epochs, "cpu_s": round(seconds, 1), "knn": accuracy}
    print(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images with train/ and val/")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the measurement of crops")
    parser.add_argument("--seeds", type=int, default=0, help="number of networks to train for each cache and filter")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in find_images(arguments.data)]
    files = files[:: max(1, len(files) // DECODED)]
    rng = np.random.default_rng(0)
    own = [decode(data) for data in files[:: max(1, len(files) // COMPARED)]]
    made = [made_image(rng, 1000, 1500) for _ in range(MADE)]
    large = io.BytesIO()
    Image.fromarray(made_image(rng, 3000, 4000)).save(large, "JPEG", quality=90)
    result = {
        "benchmark": "crop-cost",
        "date": date.today().isoformat(),
        "machine": describe_device(torch.device("cpu")),
        "images": {"from": arguments.data.name, "decoded": len(files), "compared": len(own), "made": len(made)},
        "least_cache_side": {
            name: least_cache_side([view for view, _ in views]) for name, (*views, _, _) in PRESETS.items()
        },
        "crops": crop_times(arguments.rounds),
        "cache": cache_costs({arguments.data.name: files, "4000 x 3000": [large.getvalue()] * 5}),
        "fidelity": fidelity(arguments.data.name, own) + fidelity("made", made),
        "training": [
            train(arguments.data, side, kernel, seed, arguments.epochs)
            for seed in range(arguments.seeds)
            for side, kernel in RUNS
        ],
    }
    target = Path(__file__).parent / "results" / f"{result['date']}-crop-cost.json"
    target.write_text(json.dumps(result) + "\n")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
