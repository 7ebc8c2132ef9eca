"""Compare the measures without classes with k-NN, for the bundled network with more and more noise on its weights.

Noise makes the features worse by a known amount, without training. A measure that can replace k-NN must fall with it.

    python benchmarks/label_free.py --data GROCERY

GROCERY has `train/CLASS/*.jpg` and `val/CLASS/*.jpg`. The result is written to
benchmarks/results/2026-11-30-label-free.json.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.artifact import bundled_artifact
from model.config import config_for
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.evaluate.features import compute_features
from training.evaluate.knn import knn_accuracy, labels_of
from training.evaluate.label_free import query_crops, query_features, recall_of_own
from training.setup import initial_weights
from training.spread import rankme_share, token_spread

RESULT = Path(__file__).parent / "results" / "2026-11-30-label-free.json"
VIT = replace(config_for("dinov2_vitt14"), depth=4, img_size=70, layerscale_init=1.0)
SPEC = PreprocessSpec(resize=80, crop=70, patch_size=14)
SCALES = {"50 to 90 %": (0.5, 0.9), "30 to 60 %": (0.3, 0.6), "10 to 30 %": (0.1, 0.3)}
NOISE = (0.0, 0.2, 0.4, 0.7, 1.0, 1.5)  # standard deviation, in standard deviations of each weight matrix


def noisy(level: float) -> DinoVisionTransformer:
    """Return the bundled network with Gaussian noise on its weight matrices."""
    draw = torch.Generator().manual_seed(round(100 * level))
    weights = initial_weights(str(bundled_artifact()), "dinov2_vitt14", VIT)
    network = DinoVisionTransformer(VIT)
    network.load_state_dict(
        {
            name: value + level * value.std() * torch.randn(value.shape, generator=draw)
            if value.ndim > 1 and value.numel() > value.shape[-1]
            else value
            for name, value in weights.items()
        }
    )
    return network.eval()


def measure(level: float, train: list[Path], val: list[Path]) -> dict[str, float]:
    """Return all measures of the network with noise of a level."""
    network = noisy(level)
    train_labels, classes = labels_of(train)
    val_labels, _ = labels_of(val, classes)
    known, asked = (compute_features(network, paths, SPEC).pooled("cls") for paths in (train, val))
    found = {
        "noise": level,
        "knn": knn_accuracy(known, train_labels, asked, val_labels, [10])[10],
        "rankme_share": rankme_share(asked),
        "spread": float(token_spread(asked)),
    }
    crops = query_crops(SPEC)
    for name, scale in SCALES.items():
        queries = query_features(network, val, replace(crops, view=replace(crops.view, scale=scale)))
        one, five = recall_of_own(queries, asked, (1, 5))
        found |= {f"retrieval, {name}": (one + five) / 2, f"first, {name}": one, f"first five, {name}": five}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=400, help="number of training images that k-NN searches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train = sorted(given.data.glob("train/*/*.jpg"))
    train = train[:: max(1, len(train) // given.train)]
    rows = []
    for level in NOISE:
        rows.append(measure(level, train, sorted(given.data.glob("val/*/*.jpg"))))
        print(rows[-1], flush=True)
    knn = [row["knn"] for row in rows]
    follows = {
        name: round(float(spearmanr([row[name] for row in rows], knn).statistic), 2)
        for name in rows[0]
        if name not in ("noise", "knn")
    }
    print(follows)
    RESULT.write_text(json.dumps({"benchmark": "label_free", "rows": rows, "correlation_with_knn": follows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
