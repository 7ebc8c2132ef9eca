"""Measure by which views of an evaluation image an edited copy of it becomes a candidate for a leak.

    python benchmarks/leak_candidates.py EVALUATION [--model ARTIFACT] [--pooling cls+mean] [--seed 0] [--out FILE]

EVALUATION is a folder of images. From each, one copy of each kind is made (benchmarks/planted_set.py). For the
embeddings, the rank counts the evaluation images that are nearer to the copy than its source is, by the whole images
and by the nearest of their views. For the hashes, it prints how many copies differ in how many bits, by the image, with
each of its channels, and with the mixtures of two channels too.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import planted_set
from model.artifact import bundled_artifact
from model.decode import decode
from model.pooling import POOLINGS
from training.curate.copies.hashes import perceptual_hash
from training.curate.embedding import Embedder
from training.curate.views import crops, mixture_hashes

BY_EMBEDDING, BY_HASH = ("cropped", "tilted", "mirrored"), "recoloured"
CHANNELS = 3  # of the mixtures, the first are R, G and B


def ranks(copies: np.ndarray, views: np.ndarray) -> dict[str, Any]:
    """Return figures of the ranks of the sources. `copies` are [m, D], and `views` [m, V, D]."""
    scores = np.einsum("nd,mvd->nmv", copies, views).max(axis=2)
    own = scores.diagonal()
    rank = (scores > own[:, None]).sum(axis=1)
    return {
        "lowest_cosine": round(float(own.min()), 3),
        "rank_p99": int(np.percentile(rank, 99)),
        "rank_largest": int(rank.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--model", type=Path, default=bundled_artifact())
    parser.add_argument("--pooling", choices=POOLINGS, default="cls+mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        embed = Embedder(arguments.model, arguments.pooling, Path(folder))
    rng = random.Random(arguments.seed)
    files = sorted(path for path in arguments.evaluation.rglob("*") if path.suffix.lower() in planted_set.SUFFIXES)
    views, bits = [], []
    copies: dict[str, list[np.ndarray]] = {kind: [] for kind in BY_EMBEDDING}
    for path in files:
        pixels = decode(path.read_bytes())
        image = Image.fromarray(pixels)
        views.append(np.stack([embed(pixels), *(embed(crop) for crop in crops(pixels))]))
        for kind in BY_EMBEDDING:
            copies[kind].append(embed(decode(getattr(planted_set, kind)(image, rng).data)))
        recoloured = np.uint64(perceptual_hash(decode(getattr(planted_set, BY_HASH)(image, rng).data)))
        hashes = np.concatenate(([np.uint64(perceptual_hash(pixels))], mixture_hashes(pixels)))
        bits.append(np.bitwise_count(hashes ^ recoloured))
    stacked, different = np.stack(views), np.stack(bits)
    used = {"image": 1, "image and channels": 1 + CHANNELS, "image, channels and mixtures": different.shape[1]}
    result = {
        "images": len(files),
        "pooling": arguments.pooling,
        "seed": arguments.seed,
        "by_embedding": {
            kind: {"image": ranks(np.stack(of), stacked[:, :1]), "image and crops": ranks(np.stack(of), stacked)}
            for kind, of in copies.items()
        },
        "bits_of_recoloured": {name: np.bincount(different[:, :n].min(axis=1)).tolist() for name, n in used.items()},
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
