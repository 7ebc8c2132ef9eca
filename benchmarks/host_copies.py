"""Measure the copies in host memory around one forward pass on a GPU: 64 images of 224 x 224 in a ViT-S/14.

    python benchmarks/host_copies.py [--repeats 60] [--out FILE]

Each copy is measured into a new array and into one that is used again. The process is set up as the service is
(`model.memory.return_large_blocks`), so large arrays that are freed go back to the system.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.memory import return_large_blocks

IMAGES, PATCHES, WIDTH, SIDE = 64, 256, 384, 224


def milliseconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Call `work` several times, and return the shortest and the median duration in milliseconds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return {"best": round(min(taken), 2), "median": round(statistics.median(taken), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    return_large_blocks()
    rng = np.random.default_rng(0)
    images = [rng.random((3, SIDE, SIDE), np.float32) for _ in range(IMAGES)]
    features = rng.random((IMAGES, PATCHES, WIDTH), np.float32)
    batch, kept = np.empty((IMAGES, 3, SIDE, SIDE), np.float32), np.empty_like(features)
    works: dict[str, Callable[[], object]] = {
        "pixels into a new array": lambda: np.stack(images),
        "pixels into the same array": lambda: np.stack(images, out=batch),
        "features into a new array": lambda: np.copyto(np.empty_like(features), features),
        "features into the same array": lambda: np.copyto(kept, features),
        "mean over the patches": lambda: features.mean(axis=1),
    }
    rows = {name: milliseconds(work, arguments.repeats) for name, work in works.items()}
    for name, row in rows.items():
        print(f"{name:<30}{row['best']:>8} ms {row['median']:>8} ms")
    if arguments.out:
        head = {"benchmark": "host_copies", "images": IMAGES, "repeats": arguments.repeats}
        arguments.out.write_text(json.dumps(head | {"milliseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
