"""Record short training runs, healthy and collapsing ones, to choose and to check the rule that detects a collapse.

Each case is a recipe, shrunk to run for less than a minute on one CPU core. After each log line, the features of the
student's moving average are measured independently of the sentinels: 10-NN accuracy, RankMe and the spread of class
tokens on held-out images, and the measures that need no classes. Whether and when a run collapsed is decided by these
measurements (`onset`), not by the settings of the case.

    python benchmarks/false_alarms.py --grocery GROCERY --cifar CIFAR10 --folder DIR [--case NAME]... [--seeds-from N]

GROCERY has `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, CIFAR10 has `train/CLASS/*.jpg`. Each case writes DIR/NAME.json,
and a case whose file exists is not repeated. Afterwards all files are joined into
benchmarks/results/2026-11-30-false-alarms.json, the rule of training/watch/collapse.py is applied to the recorded
lines, and a table is printed. The rule was chosen on these runs. `--seeds-from 100 --out FILE` makes runs with other
random numbers, on which it can be checked.
"""

import argparse
import importlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.recorded_runs import QUERY_SCALES, RESULT, correlations, summary
from model.artifact import bundled_artifact
from model.preprocess import PreprocessSpec, preprocess
from training import held_out, wiring
from training import train as loop
from training.data.augment import Geometry, View, augmented_views
from training.data.dataset import squash
from training.ending import RunStopped
from training.evaluate.knn import knn_accuracy, labels_of
from training.evaluate.label_free import QUERY_JITTER, recall_of_own
from training.held_out import HeldOutImages, held_out_loss, read_held_out
from training.randomness import SampleRandom, sample_keys
from training.recipe import load_config
from training.run import Run
from training.spread import rankme_share, token_spread
from training.watch.monitor import read_lines

N_LINES = 20  # log lines of a run
N_CLASSES, PER_CLASS = 30, 20
N_CIFAR, N_CIFAR_HELD_OUT = 1200, 300
NEIGHBOURS = 300  # training images that k-NN searches
FIRST_LINES = {"grocery": "smoke", "cifar": "cifar", "grocery, bundled network": "continue"}
KEPT = ("step", "dino", "koleo", "ibot", "dino_over_ln_k", "teacher_entropy", "rankme_share", "teacher_temp")

SMALL = ["epochs=1e4", "workers=1", "precision=fp32"]
WATCH = ["on_collapse=warn", "on_measure=warn", "on_not_finite=stop", "sentinel_lines=1000", "measure=none"]
NET = ["vit={embed_dim = 48, depth = 2, num_heads = 2, img_size = 42, layerscale_init = 1.0}"]
GROCERY = [*NET, "batch_size=16", "cache_size=64", "global_size=42", "local_size=28", "n_local=2"]
GROCERY += ["n_prototypes=256", "head_hidden_dim=128", "head_bottleneck_dim=32", "eval_resize=48", "eval_crop=42"]
CIFAR = ["vit={embed_dim = 48, depth = 2, num_heads = 2, patch_size = 4, img_size = 32, layerscale_init = 1.0}"]
CIFAR += [
    "batch_size=24",
    "global_size=24",
    "eval_crop=24",
    "eval_resize=24",
    "n_local=2",
    "n_prototypes=256",
    "head_hidden_dim=128",
    "head_bottleneck_dim=32",
]
BUNDLED = ["model=dinov2_vitt14", "vit={depth = 4, img_size = 70, layerscale_init = 1.0}"]
BUNDLED += ["batch_size=8", "cache_size=64", "global_size=42", "local_size=28", "n_local=2"]
BUNDLED += ["head_hidden_dim=128", "head_bottleneck_dim=32", "eval_resize=48", "eval_crop=42"]
DISTILL = [*GROCERY, "shared_head=false", "lr=2e-3", "micro_batch=16", "teacher_model=dinov2_vitt14"]

NO_CENTRE = ["centering=softmax", "center_momentum=0.999999"]
Case = tuple[str, int, list[str]]  # recipe, steps, overrides

FROZEN = ["freeze_backbone=0.5"]
FAST = ["momentum=[0.9, 1.0]"]  # a moving average that follows the student within a short run
UNCENTRED = [*NO_CENTRE, "koleo_weight=0"]
CASES: dict[str, Case] = {
    "continue": ("continue", 60, []),
    "smoke": ("smoke", 80, []),
    "cifar": ("cifar", 80, []),
    "smoke, no centring": ("smoke", 80, UNCENTRED),
    "smoke, rate x 100": ("smoke", 80, ["lr=0.4"]),
    "smoke, weight decay x 100": ("smoke", 80, ["weight_decay=[10, 10]", "lr=2e-2"]),
    "continue, rate x 100": ("continue", 40, ["lr=2e-2", "n_prototypes=4096"]),
    "dino": ("dino", 80, []),
    "smoke, rate x 10": ("smoke", 80, ["lr=0.04"]),
    "dino, no centring": ("dino", 80, NO_CENTRE),
    "distill": ("distill", 80, ["n_prototypes=1024"]),
    "continue, frozen for half": ("continue", 40, FROZEN),
    "grocery": ("grocery", 80, []),
    "grocery_continue": ("grocery_continue", 40, []),
    "smoke, no centring, teacher at 0.3": ("smoke", 80, [*UNCENTRED, "teacher_temp=[0.3, 0.3]"]),
    "smoke, no centring, teacher at 0.005": ("smoke", 80, [*UNCENTRED, "teacher_temp=[0.005, 0.005]"]),
    "smoke, teacher at 0.3": ("smoke", 80, ["teacher_temp=[0.3, 0.3]"]),
    "smoke, teacher at 0.3, no KoLeo": ("smoke", 80, ["teacher_temp=[0.3, 0.3]", "koleo_weight=0"]),
    "smoke, teacher at 0.04 to 0.07": ("smoke", 80, ["teacher_temp=[0.04, 0.07]"]),
    "smoke, no KoLeo": ("smoke", 80, ["koleo_weight=0"]),
    "dino, rate x 100": ("dino", 80, ["lr=0.4"]),
    "smoke, batch of 4": ("smoke", 120, ["batch_size=4"]),
    "smoke, 4096 prototypes": ("smoke", 80, ["n_prototypes=4096"]),
    "smoke, 32 prototypes": ("smoke", 80, ["n_prototypes=32"]),
    "smoke, small LayerScale": (
        "smoke",
        80,
        ["vit={embed_dim = 48, depth = 2, num_heads = 2, img_size = 42, layerscale_init = 1e-5}"],
    ),
    "cifar, no centring": ("cifar", 80, UNCENTRED),
    "continue, frozen for 0.9": ("continue", 40, ["freeze_backbone=0.9"]),
    "continue, rate x 1000": ("continue", 40, [*FAST, "lr=0.2", "n_prototypes=1024", "warmup=0.05"]),
    "distill, rate x 100": ("distill", 80, [*FAST, "n_prototypes=1024", "lr=0.2"]),
    "smoke, seed 1": ("smoke", 80, ["seed=1"]),
    "dino, seed 1": ("dino", 80, ["seed=1"]),
    "grocery, no centring": ("grocery", 80, UNCENTRED),
    "continue, 64 prototypes": ("continue", 40, ["n_prototypes=64", "seed=1"]),
    "continue, no centring": ("continue", 40, [*UNCENTRED, *FAST, "lr=4e-3", "n_prototypes=1024"]),
    "smoke, moving centre": ("smoke", 80, ["centering=softmax"]),
    "smoke, no centring, KoLeo": ("smoke", 80, NO_CENTRE),
    "smoke, seed 2, wide": (
        "smoke",
        80,
        ["seed=2", "vit={embed_dim = 96, depth = 3, num_heads = 2, img_size = 42, layerscale_init = 1.0}"],
    ),
    "cifar, seed 1": ("cifar", 80, ["seed=1"]),
    "smoke, low rate": ("smoke", 80, ["lr=1e-4"]),
    "smoke, batch norm": ("smoke", 80, ["centering=batch_norm"]),
    "grocery, seed 1, 64 prototypes": ("grocery", 80, ["seed=1", "n_prototypes=64"]),
    "continue, weight decay x 100": ("continue", 40, [*FAST, "weight_decay=[10, 10]", "lr=2e-2"]),
    "distill, 64 prototypes": ("distill", 80, ["n_prototypes=64", "seed=1"]),
    "grocery_continue, frozen for half": ("grocery_continue", 40, FROZEN),
    "grocery_continue, rate x 100": ("grocery_continue", 40, [*FAST, "lr=0.2"]),
    "smoke, teacher at 0.01": ("smoke", 80, ["teacher_temp=[0.01, 0.01]"]),
    "cifar, rate x 100": ("cifar", 80, ["lr=0.4"]),
}
"""The runs. "rate x 100" and similar names are intentions: `onset` decides from the measured features."""


def settings_of(recipe: str, folder: Path) -> tuple[Path, list[str]]:
    """Return the folder of images for a recipe, and the overrides that shrink the recipe."""
    grocery = folder / "images" / "grocery"
    if recipe == "cifar":
        return folder / "images" / "cifar", CIFAR
    if recipe == "distill":
        return grocery, [*DISTILL, f"teacher={bundled_artifact()}"]
    if recipe == "continue":
        return grocery, [*BUNDLED, f"init={bundled_artifact()}"]
    if recipe == "grocery_continue":
        return grocery, [
            *BUNDLED,
            f"init={bundled_artifact()}",
            "last_phase={share = 0.12, global_size = 56, local_size = 28}",
            "whiten=0.01",
            "n_prototypes=1024",
        ]
    return grocery, GROCERY


def make_images(grocery: Path, cifar: Path, folder: Path) -> None:
    """Write the images of all cases: a sample of both data sets, with a short side of at most 72 pixels."""
    if folder.exists():
        return
    draw = random.Random(0)

    def put(source: Path, to: Path) -> None:
        image = Image.open(source).convert("RGB")
        scale = min(1.0, 72 / min(image.size))
        to.parent.mkdir(parents=True, exist_ok=True)
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
            to.with_suffix(".png"), compress_level=1
        )

    classes = sorted((grocery / "train").iterdir(), key=lambda x: (-len(list(x.iterdir())), x.name))[:N_CLASSES]
    for name in (x.name for x in classes):
        images = draw.sample(sorted((grocery / "train" / name).glob("*.jpg")), PER_CLASS)
        for path in images + sorted((grocery / "val" / name).glob("*.jpg")):
            put(path, folder / "grocery" / path.relative_to(grocery))
    for number, path in enumerate(draw.sample(sorted(cifar.glob("train/*/*.jpg")), N_CIFAR + N_CIFAR_HELD_OUT)):
        part = "train" if number < N_CIFAR else "val"
        put(path, folder / "cifar" / part / path.parent.name / path.name)


class Truth:
    """Measures the backbone of the student's moving average on images that are kept in memory."""

    def __init__(self, run: Run) -> None:
        spec: PreprocessSpec = run.release.eval_spec
        held_out = list(run.data.held_out)
        n_images, width = len(run.data.train_sample), run.release.vit.embed_dim
        train = run.data.train_sample[:: max(1, round(n_images / (200 if width > 128 else NEIGHBOURS)))]
        self.labels, classes = labels_of(train)
        self.asked_labels, _ = labels_of(held_out, classes)
        pictures = [photo.read() for photo in held_out]
        self.train = torch.from_numpy(np.stack([preprocess(photo.read(), spec) for photo in train]))
        self.asked = torch.from_numpy(np.stack([preprocess(picture, spec) for picture in pictures]))
        assert spec.crop
        side = spec.crop
        squares = [squash(picture, 2 * side) for picture in pictures]
        pixels, aspect = torch.from_numpy(np.stack([s for s, _ in squares])), torch.tensor([a for _, a in squares])
        keys = SampleRandom(sample_keys(0, 0, torch.arange(len(pixels))))
        self.queries = {
            name: augmented_views(pixels, aspect, View(side, scale, 0.5), 1, QUERY_JITTER, Geometry(), keys)
            for name, scale in QUERY_SCALES.items()
        }
        images = read_held_out(held_out, run.release.side, run.world, 2 * run.crops.batch_size)
        assert images is not None
        self.held_out: HeldOutImages = images

    @torch.no_grad()
    def measure(self, run: Run, step: int) -> dict[str, float]:
        parts = run.setup.parts
        backbone = parts.ema.backbone

        def features(pixels: torch.Tensor) -> torch.Tensor:
            return torch.cat([backbone.forward_features(x)["x_norm_clstoken"] for x in pixels.split(128)])

        train, asked = features(self.train), features(self.asked)
        if not bool(torch.isfinite(asked).all() and torch.isfinite(train).all()):
            return {"knn": math.nan}
        found = {
            "knn": knn_accuracy(train, self.labels, asked, self.asked_labels, [10])[10],
            "ema_rankme_share": rankme_share(asked),
            "ema_spread": float(token_spread(asked)),
        }
        for name, crops in self.queries.items():
            one, five = recall_of_own(features(crops), asked, (1, 5))
            found |= {f"retrieval_1_{name}": one, f"retrieval_5_{name}": five}
        last = float(run.schedules.teacher_temp[-1])
        arguments = run.step_settings, run.setup, run.crops, self.held_out
        return found | {
            "held_out_loss": held_out_loss(*arguments, last, parts.ema),
            "held_out_loss_student": held_out_loss(*arguments, last, parts.student),
        }


def remembered(make_crops: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement for `make_crops` that makes the crops of a held-out batch only once in a run."""
    made: dict[int, Any] = {}

    def make(settings: Any, images: Any, aspect: Any, number: int, *rest: Any) -> Any:
        if number not in made:
            made[number] = make_crops(settings, images, aspect, number, *rest)
        return made[number]

    return make


class Recorded(Exception):
    """Ends a run after its last log line, because its results are not needed."""


def recording(log_line: Callable[..., Any], lines: list[dict[str, float]]) -> Callable[..., Any]:
    """Return a replacement for the loop's `log_line` that also measures the features, and appends to `lines`."""
    truth: list[Truth] = []

    def record(run: Run, step: int, terms: dict[str, torch.Tensor], cls_tokens: torch.Tensor) -> Any:
        verdict = log_line(run, step, terms, cls_tokens)
        if not truth:
            truth.append(Truth(run))
        line = {
            "step": step,
            "token_spread": float(token_spread(cls_tokens)),
            "lr_backbone": float(run.schedules.lr["backbone"][step - 1]),
            **truth[0].measure(run, step),
        }
        lines.append(line)
        if step == run.total:
            raise Recorded
        return verdict

    return record


def record_case(name: str, folder: Path, seeds_from: int) -> None:
    """Run a case, and write its lines to a file. `seeds_from` is added to the seed of the case."""
    recipe, steps, overrides = CASES[name]
    data, shrunk = settings_of(recipe, folder)
    out = folder / "runs" / slug(name)
    seed = seeds_from + next((int(v.split("=")[1]) for v in overrides if v.startswith("seed=")), 0)
    values = [*SMALL, *WATCH, *shrunk, *overrides, f"seed={seed}"]
    batch = next(int(v.split("=")[1]) for v in reversed(values) if v.startswith("batch_size"))
    n_images = N_CIFAR if recipe == "cifar" else N_CLASSES * PER_CLASS
    config = load_config(
        recipe, data, out, [*values, f"log_every={steps // N_LINES}", f"epochs={steps / (n_images // batch)}"]
    )
    extra: list[dict[str, float]] = []
    wiring.make_sinks = lambda *_: []  # type: ignore[assignment,attr-defined]
    held_out.make_crops = remembered(held_out.make_crops)  # type: ignore[attr-defined]
    loop.log_line = recording(loop.log_line, extra)  # type: ignore[attr-defined]
    begin, ended = time.process_time(), ""
    try:
        loop.train(config, Console(quiet=True))
    except Recorded:
        ended = "finished"
    except RunStopped as stopped:
        ended = str(stopped)
    logged = {line["step"]: line for line in read_lines(out / "metrics.jsonl")}
    lines = [{k: logged[x["step"]].get(k) for k in KEPT} | x for x in extra]
    columns = {key: [_short(line.get(key)) for line in lines] for key in dict.fromkeys(k for x in lines for k in x)}
    record = {
        "recipe": recipe,
        "settings": overrides,
        "steps": steps,
        "ended": ended,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "n_prototypes": config.n_prototypes,
        "lines": columns,
    }
    (folder / f"{slug(name)}.json").write_text(json.dumps(record))


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def join(folder: Path) -> dict[str, Any]:
    """Return the records of all cases that have run, by name."""
    found = {}
    for name, (recipe, _, _) in CASES.items():
        path = folder / f"{slug(name)}.json"
        if path.exists():
            record = json.loads(path.read_text())
            images = "cifar" if recipe == "cifar" else "grocery"
            wide = recipe in ("continue", "grocery_continue")
            record["images"] = f"{images}, bundled network" if wide else images
            record["n_held_out"] = N_CIFAR_HELD_OUT if images == "cifar" else 126
            record["lines"] = {key.replace("backbone_lr", "lr_backbone"): v for key, v in record["lines"].items()}
            found[name] = record
    for record in found.values():
        # Runs with the same network and seed start from the same weights. A high rate changes them before the first
        # line.
        same = "vit=" not in str(record["settings"]) and "seed=" not in str(record["settings"])
        reference = found.get(FIRST_LINES[record["images"]])
        record["untrained"] = {}
        if same and reference is not None:
            record["untrained"] = {key: reference["lines"][key][0] for key in ("ema_rankme_share", "ema_spread")}
    return found


def report(records: dict[str, Any], path: Path) -> None:
    """Write the results to the file `path`, and print a table."""
    table, follow = summary(records), correlations(records)
    result = {"benchmark": "false_alarms", "table": table, "correlation_with_knn": follow, "runs": records}
    path.write_text(json.dumps(result).replace('}}, "', '}},\n"').replace('}, {"run"', '},\n{"run"') + "\n")
    for line in table:
        print(*(f"{line[key]!s:<32}" for key in line))
    for column, values in follow.items():
        print(column, values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grocery", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--seeds-from", type=int, default=0, help="added to the seeds of all cases")
    parser.add_argument("--out", type=Path, default=RESULT, help="file for the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # the optimizer imports it, and importing takes longer than a run

    make_images(given.grocery, given.cifar, given.folder / "images")
    names = given.case or list(CASES)
    for name in names:
        if (given.folder / f"{slug(name)}.json").exists():
            continue
        if (child := os.fork()) == 0:  # a process of its own, but torch is imported only once
            try:
                record_case(name, given.folder, given.seeds_from)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert (given.folder / f"{slug(name)}.json").exists(), name
    if not given.case:
        report(join(given.folder), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
