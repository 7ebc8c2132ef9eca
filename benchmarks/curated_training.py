"""Compare training on a curated planted set with training on the raw one: k-NN at equal numbers of images seen.

    python benchmarks/curated_training.py --data GROCERY --work FOLDER [--jobs 2] [--without-leaks]

GROCERY contains `train/` and `val/`, with one folder per class. The script makes a planted set from them
(benchmarks/planted_set.py), curates it with `dinov2 curate` (val is the evaluation set), and trains a small DINOv2 from
random weights with the recipe `smoke` on each set and for each seed. All runs have the same number of steps and
therefore see the same number of images. About half of the planted set is redundant: of its 2,850 images, 980 repeat 20
images of one class, 240 are copies by single edits, and 240 are leaks of val. Another 90 are faulty.

The accuracy is the mean over k = 1, 5, 10 and 20. The bank always consists of all images of GROCERY/train, unchanged,
so it does not depend on the set. There are four groups of queries:

    val            all val images
    val_leaked     val images of which the raw set contains a copy
    val_not_leaked the other val images
    unused         train images from which nothing in the planted set was made; their neighbours in the sequence in
                   which the class was taken, ten on each side, are left out of the bank

With --without-leaks, three more runs train on the raw set without the leaks of val. They separate the effect of the
leaks from that of everything else. A part of the work that is done is not repeated, so the script can be interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.all_features import extract_features
from benchmarks.planted_set import Sizes, plant
from model.checkpoint import load_checkpoint
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.dataset import find_images
from training.evaluate.knn import TEMPERATURE, labels_of
from training.recipe import load_config

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "2026-12-01-curated-training.json"
COMMAND = "python benchmarks/curated_training.py --data GROCERY --work FOLDER"
RECIPE, BATCH_SIZE, STEPS = "smoke", 64, 450
SIZES = Sizes(images=1300, each=30, leaks=30, repeated=20)
SEEDS = (0, 1, 2)
KS = (1, 5, 10, 20)
GAP = 10
POOLINGS = ("cls", "cls+mean")


@dataclass(frozen=True)
class Arm:
    """A training set: the value of `--data`, further settings, and the number of its readable images."""

    name: str
    data: Path
    settings: tuple[str, ...]
    n_images: int


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_command(arguments: Sequence[str], log: Path) -> None:
    """Run a `dinov2` command with its output in a file.

    Raises:
        RuntimeError: the command has failed.
    """
    with log.open("w") as file:
        command = [sys.executable, "-m", "cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"dinov2 {arguments[0]} has failed: see {log}")


def make_arms(data: Path, work: Path) -> tuple[list[Arm], dict[str, dict[str, Any]]]:
    """Make the planted set, curate it, and return the training sets and the ground truth."""
    planted = work / "set"
    if not (planted / "truth.json").exists():
        plant(data / "train", planted, data / "val", SIZES, seed=0)
    truth: dict[str, dict[str, Any]] = json.loads((planted / "truth.json").read_text())["files"]
    curate = ["curate", str(planted / "images"), "--out", str(work / "curated")]
    curate += ["--set", f"leaks.evaluation={json.dumps([str(planted / 'evaluation')])}"]
    run_command([*curate, "--set", "write.form=list", "--set", "write.held_out_share=0"], work / "curate.log")
    kinds = {name: entry["kind"] for name, entry in truth.items() if name.startswith("images/")}
    leaks = [str(planted / name) for name, kind in kinds.items() if kind.startswith("leak_")]
    (work / "leaks.txt").write_text("".join(f"{path}\n" for path in leaks))
    readable = sum(kind != "truncated" for kind in kinds.values())
    kept = len((work / "curated" / "train.jsonl").read_text().splitlines())
    return [
        Arm("raw", planted / "images", (), readable),
        Arm("curated", work / "curated", (), kept),
        Arm("raw without leaks", planted / "images", (f"exclude={work / 'leaks.txt'}",), readable - len(leaks)),
    ], truth


def kept_by_kind(work: Path, truth: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Return for each kind how many images the curated set has kept, and how many the raw set has."""
    lines = map(json.loads, (work / "curated" / "manifest.jsonl").read_text().splitlines())
    kept = {"images/" + line["key"].partition("/")[2] for line in lines if line.get("part") is not None}
    counts: dict[str, list[int]] = {}
    for name, entry in truth.items():
        if name.startswith("images/"):
            count = counts.setdefault(entry["kind"], [0, 0])
            count[0] += name in kept
            count[1] += 1
    return dict(sorted(counts.items()))


def train_arm(arm: Arm, seed: int, work: Path) -> Path:
    """Train on a set, and return the checkpoint. A run that has ended is not repeated.

    Raises:
        RuntimeError: the training has failed, or it had another number of steps than `STEPS`.
    """
    out = work / "runs" / f"{arm.name.replace(' ', '-')}-{seed}"
    out.parent.mkdir(exist_ok=True)
    checkpoint, done = out / "checkpoint.safetensors", out.with_suffix(".done")
    if not done.exists():
        settings = [f"seed={seed}", f"epochs={STEPS / (arm.n_images // BATCH_SIZE)}", f"batch_size={BATCH_SIZE}"]
        settings += ["held_out_share=0", "measure=none", "eval_every_epochs=0", "estimate=false", "workers=1"]
        command = ["train", "--data", str(arm.data), "--recipe", RECIPE, "--out", str(out), *settings, *arm.settings]
        run_command(command, out.with_suffix(".log"))
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        if last["step"] != STEPS:
            raise RuntimeError(f"{out}: {last['step']} steps instead of {STEPS}")
        done.touch()
    return checkpoint


class Queries:
    """The bank and the groups of queries, as positions in the bank or in val."""

    def __init__(self, data: Path, truth: dict[str, dict[str, Any]]) -> None:
        self.train, self.val = find_images(data / "train"), find_images(data / "val")
        self.labels, classes = labels_of(self.train)
        self.val_labels, _ = labels_of(self.val, classes)
        leaked, used = set(), set()  # pairs of class and file name; train and val have files with equal names
        for name, entry in truth.items():
            if entry["kind"].startswith("leak_"):
                leaked.add((Path(name).parent.name, entry["made_from"]))
            elif name.startswith("images/"):
                used.add((Path(name).parent.name, entry["made_from"]))
        is_leaked = torch.tensor([(path.parent.name, path.name) in leaked for path in self.val])
        self.val_groups = {
            "val": torch.ones_like(is_leaked),
            "val_leaked": is_leaked,
            "val_not_leaked": ~is_leaked,
        }
        self.unused = torch.tensor([(path.parent.name, path.name) not in used for path in self.train])

    def accuracies(self, model: DinoVisionTransformer, spec: PreprocessSpec) -> dict[str, dict[str, float]]:
        """Return the accuracy of a backbone by pooling and group."""
        train, val = extract_features(model, self.train, spec), extract_features(model, self.val, spec)
        places = torch.arange(len(self.train))
        near = (self.labels[:, None] == self.labels) & ((places[:, None] - places).abs() <= GAP)
        found: dict[str, dict[str, float]] = {}
        for pooling in POOLINGS:
            right = is_right(train[pooling], self.labels, val[pooling], self.val_labels)
            own = is_right(train[pooling], self.labels, train[pooling], self.labels, near)
            found[pooling] = {name: float(right[group].mean()) for name, group in self.val_groups.items()}
            found[pooling]["unused"] = float(own[self.unused].mean())
        return found


def is_right(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return the share of the values of k in `KS` for which k-NN classifies each query correctly, [queries].

    `hidden` [queries, images] marks the images of the bank that a query does not see.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    if hidden is not None:
        similarity[hidden] = -torch.inf
    values, indices = similarity.topk(max(KS), dim=1)
    weights, votes = (values / TEMPERATURE).exp(), labels[indices]
    right = torch.zeros(len(queries))
    for k in KS:
        sums = torch.zeros(len(queries), int(labels.max()) + 1).scatter_add_(1, votes[:, :k], weights[:, :k])
        right += (sums.argmax(dim=1) == truth).float() / len(KS)
    return right


def summary(runs: dict[str, list[dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Return mean, sample standard deviation and differences from `raw` per seed, in percentage points."""
    found: dict[str, Any] = {}
    for pooling in POOLINGS:
        for group in runs["raw"][0][pooling]:
            values = {arm: np.array([run[pooling][group] for run in of_arm]) * 100 for arm, of_arm in runs.items()}
            found[f"{group}, {pooling}"] = {
                arm: {
                    "mean": round(float(value.mean()), 2),
                    "std": round(float(value.std(ddof=1)), 2),
                    "per_seed": value.round(2).tolist(),
                    "minus_raw": (value - values["raw"]).round(2).tolist(),
                }
                for arm, value in values.items()
            }
    return found


def measure(data: Path, work: Path, jobs: int, without_leaks: bool) -> dict[str, Any]:
    """Do all the work, and return the result."""
    arms, truth = make_arms(data, work)
    arms = arms if without_leaks else arms[:-1]
    with ThreadPoolExecutor(jobs) as threads:
        tasks = [(arm, seed) for seed in SEEDS for arm in arms]
        started = [threads.submit(train_arm, arm, seed, work) for arm, seed in tasks]
        checkpoints = [run.result() for run in started]
    config: TrainConfig = load_config(RECIPE, data, work)
    spec = PreprocessSpec(resize=config.eval_resize, crop=config.eval_crop)
    queries = Queries(data, truth)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    for (arm, _), checkpoint in zip(tasks, checkpoints, strict=True):
        weights, vit, _ = load_checkpoint(checkpoint)
        model = DinoVisionTransformer(vit)
        model.load_state_dict(weights)
        runs.setdefault(arm.name, []).append(queries.accuracies(model, spec))
    for seed in SEEDS:
        torch.manual_seed(seed)
        untrained = queries.accuracies(DinoVisionTransformer(config.vit_config), spec)
        runs.setdefault("random weights", []).append(untrained)
    sizes = {name: int(group.sum()) for name, group in queries.val_groups.items()}
    return {
        "command": COMMAND,
        "recipe": RECIPE,
        "steps": STEPS,
        "images_seen": STEPS * BATCH_SIZE,
        "images": {arm.name: arm.n_images for arm in arms},
        "kept_of_kind": kept_by_kind(work, truth),
        "queries": {**sizes, "unused": int(queries.unused.sum())},
        "bank": len(queries.train),
        "accuracy": summary(runs),
    }


def show(result: dict[str, Any]) -> None:
    """Print the accuracies beside each other."""
    print(f"{result['images_seen']:,} images seen by each run; images of the sets: {result['images']}")
    for group, arms in result["accuracy"].items():
        cells = [f"{arm} {of['mean']:.1f} +- {of['std']:.1f} {of['minus_raw']}" for arm, of in arms.items()]
        print(f"{group}: {'; '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the sets and the runs")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at the same time, one thread each")
    parser.add_argument("--without-leaks", action="store_true", help="train on the raw set without the leaks, too")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    result = measure(given.data.resolve(), given.work.resolve(), given.jobs, given.without_leaks)
    show(result)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
