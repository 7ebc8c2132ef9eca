"""Measure what continuing from a trained backbone gains on a small set of images, by method, set, size and seed.

    python benchmarks/continue_gain.py --cifar CIFAR10/train --grocery GROCERY --checkpoint CHECKPOINT

CHECKPOINT is the checkpoint of a run of the recipe `cifar`.

benchmarks/proxy_sets.py describes the two proxies, their pools of images and the reported figures. Each run trains on a
random part of a proxy's own images, of which a tenth is held out. All runs of a proxy see the same number of images,
because a run's time is nearly proportional to it: `--images`, divided by the cost of one image. The methods are

- `new`: the settings of `training/scale.py`.
- `old`: the former fixed shares, rates and prototypes of the recipe `continue`. A batch has at most 256 images.
- `scratch`: training from random weights, with the settings of the recipe `cifar` and small batches.

Freezing the backbone gives the figures of the start. For each run, the result has the start, the end and the best
checkpoint. The best one has the highest leave-one-out k-NN accuracy on the run's own images among the start, a few
checkpoints and, for `new`, three mixes of the start and the end (WiSE-FT, arXiv 2109.01903). `best_unlabelled` is
chosen without labels, by the retrieval of each held-out image from another view of it. `drift` is 1 - the mean cosine
between class tokens of the start and of the checkpoint.

Each run is stored in a file in --work as soon as it ends. Runs whose file exists are skipped, so the command can be
interrupted and repeated. The result of all runs so far is written to benchmarks/results/.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.proxy_sets import Proxy, cifar_proxy, class_tokens, grocery_proxy, reported
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.crops import make_crops, make_micros
from training.data.dataset import batch_indices
from training.distributed import World
from training.evaluate.own_images import own_accuracy, view_likelihood
from training.scale import TRAINING_SHARE, continue_settings
from training.setup import attention_kernel, compute_dtype, make_setup
from training.step import Setup, train_step
from training.wiring import crop_settings, make_schedules, step_settings

RESULTS = Path(__file__).parent / "results" / "2026-11-30-continue-gain.json"
ALONE = World(0, 1, torch.device("cpu"))
COMMAND = "python benchmarks/continue_gain.py --cifar CIFAR10/train --grocery GROCERY --checkpoint CHECKPOINT"
Method = Literal["new", "old", "scratch"]
METHODS: tuple[Method, ...] = ("new", "old", "scratch")
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the final weights in a mix of the start and the end
MARKS: dict[Method, int] = {"new": 4, "old": 2, "scratch": 1}  # checkpoints of a run
WARM = {"warmup": 0.05, "teacher_temp": (0.02, 0.04), "teacher_temp_warmup": 0.5}
OLD: dict[str, Any] = {
    "n_prototypes": 16384,
    "freeze_backbone": 0.1,
    "freeze_last_layer": 0.02,
    "lr": 2e-4,
    "warmup": 0.2,
    "layer_decay": 0.8,
    "weight_decay": (0.04, 0.2),
    "momentum": (0.996, 1.0),
    "drop_path": 0.1,
}


def mix(initial: Mapping[str, Tensor], final: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return `(1 - share) * initial + share * final` for each tensor of two state dicts."""
    return {name: torch.lerp(initial[name], end, share) for name, end in final.items()}


def method_settings(method: Method, n_images: int, proxy: Proxy, seen: int) -> dict[str, Any]:
    """Return the settings of a method for `n_images` training images and a run that sees `seen` images."""
    width = TrainConfig(data="-", out=Path("-"), **proxy.settings).vit_config.embed_dim
    new = continue_settings(n_images, width, hours=seen / 3600 / TRAINING_SHARE, images_per_s=1.0)
    if method == "new":
        return {"init": proxy.init, **new.as_overrides()}
    if method == "old":
        return {"init": proxy.init, "batch_size": min(256, n_images), **OLD}
    rates = {"lr": 4e-3, "layer_decay": 1.0, "patch_embed_lr_mult": 1.0, "momentum": (0.99, 1.0)}
    return {
        "batch_size": new.batch_size,
        "n_prototypes": new.n_prototypes,
        "weight_decay": (0.04, 0.2),
        **rates,
        **WARM,
    }


class Measures:
    """The figures of a backbone that choose a checkpoint of one run. They see only the run's own images."""

    def __init__(
        self, proxy: Proxy, config: TrainConfig, held: Tensor, train: Tensor, start: dict[str, Tensor]
    ) -> None:
        self.inputs = proxy.own.inputs[torch.cat((held, train))]
        self.labels = proxy.own.labels[torch.cat((held, train))]
        crops = crop_settings(config)
        positions = torch.arange(len(held)) % config.batch_size
        own, phase = proxy.own, crops.phases[0]
        views = make_crops(crops, own.squares[held], own.aspect[held], 10**6, positions, phase, ALONE.device)
        self.views = views.globals_
        self.model = DinoVisionTransformer(config.vit_config).eval()
        self.model.load_state_dict(start)
        self.start = class_tokens(self.model, self.inputs)

    def of(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return the figures of a backbone."""
        self.model.load_state_dict(weights)
        tokens = class_tokens(self.model, self.inputs)
        own, views = own_accuracy(tokens, self.labels), view_likelihood(*class_tokens(self.model, self.views).chunk(2))
        drift = 1 - float(F.cosine_similarity(tokens, self.start).mean())
        return {"own": round(own, 4), "views": round(views, 4), "drift": round(drift, 4)}


def train(config: TrainConfig, setup: Setup, proxy: Proxy, train_images: Tensor, total: int) -> Iterator[int]:
    """Train for `total` steps, and yield the number of steps done after each."""
    schedules, crops, settings = make_schedules(config, total), crop_settings(config), step_settings(config)
    squares, aspect = proxy.own.squares[train_images], proxy.own.aspect[train_images]
    for step in range(total):
        rows = batch_indices(len(squares), config.batch_size, step, config.seed)
        micros = make_micros(crops, ALONE, squares[rows], aspect[rows], step, total)
        train_step(settings, setup, schedules, micros, step, 1.0, False)
        yield step + 1


def measure_run(proxy: Proxy, method: Method, size: int, seed: int, seen: int) -> dict[str, Any]:
    """Train once, and return the figures of the start, the checkpoints and the mixes."""
    order = torch.randperm(len(proxy.own.labels), generator=torch.Generator().manual_seed(1000 + seed))[:size]
    held, train_images = order[: size // 10], order[size // 10 :]
    given = method_settings(method, len(train_images), proxy, seen)
    config = TrainConfig(data="-", out=Path("-"), **{"seed": seed, **proxy.settings, **given})
    setup = make_setup(config, ALONE)
    total = max(1, round(seen / config.batch_size))
    with attention_kernel(ALONE.device, compute_dtype(setup.autocast)):
        ema = setup.parts.ema.backbone
        weights = {"start": {name: value.clone() for name, value in ema.state_dict().items()}}
        measures = Measures(proxy, config, held, train_images, weights["start"])
        seconds, began = 0.0, time.perf_counter()
        marks = {round(total * (number + 1) / MARKS[method]) for number in range(MARKS[method])}
        for step in train(config, setup, proxy, train_images, total):
            if step in marks:
                seconds += time.perf_counter() - began
                name = "end" if step == total else f"step {step}"
                weights[name] = {key: value.clone() for key, value in ema.state_dict().items()}
                began = time.perf_counter()
        for share in SHARES[:-1] if method == "new" else ():
            weights[f"mix {share:g}"] = mix(weights["start"], weights["end"], share)
        figures = {name: measures.of(state) for name, state in weights.items()}
        chosen = {"start", "end", *best_names(figures).values()}
        for name in chosen:
            measures.model.load_state_dict(weights[name])
            figures[name] |= reported(measures.model, proxy)
    return {
        "set": proxy.name,
        "size": size,
        "seed": seed,
        "method": method,
        "steps": total,
        "train_seconds": round(seconds, 1),
        "settings": given | {"init": Path(given["init"]).name if "init" in given else None},
        "figures": {name: {key: round(value, 4) for key, value in one.items()} for name, one in figures.items()},
    }


def best_names(figures: dict[str, dict[str, float]]) -> dict[str, str]:
    """Return the names of the checkpoints that are chosen with and without labels."""
    return {
        "best": max(figures, key=lambda name: figures[name]["own"]),
        "best_unlabelled": max(figures, key=lambda name: figures[name]["views"]),
    }


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the start, the end and the best checkpoints of a run, with the names of the latter."""
    figures = run["figures"]
    chosen = {"start": "start", "end": "end", **best_names(figures)}
    facts = {key: run[key] for key in ("set", "size", "seed", "method", "steps", "train_seconds", "settings")}
    named = {f"{key}_is": name for key, name in chosen.items() if key.startswith("best")}
    return facts | named | {key: figures[name] for key, name in chosen.items()}


def gains(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean and the lowest change from the start, in percentage points, by method, figure and checkpoint."""
    table: dict[str, Any] = {}
    for method in METHODS:
        of_method = [run for run in runs if run["method"] == method]
        for figure in ("knn_10", "knn_mean", "far_10", "far_mean"):
            for name in ("end", "best", "best_unlabelled"):
                for group in sorted({run["set"] for run in of_method}):
                    own = [run for run in of_method if run["set"] == group and figure in run["start"]]
                    changes = [100 * (run[name][figure] - run["start"][figure]) for run in own]
                    if changes:
                        value = {"mean": sum(changes) / len(changes), "lowest": min(changes), "runs": len(changes)}
                        table[f"{group}, {method}, {figure}, {name}"] = {k: round(v, 2) for k, v in value.items()}
    return table


def write_results(work: Path, out: Path) -> None:
    """Write the summary of all runs in `work` to `out`."""
    runs = [summary(json.loads(path.read_text())) for path in sorted(work.glob("*.json"))]
    result = {"benchmark": "continue-gain", "date": datetime.date.today().isoformat(), "command": COMMAND}
    lines = ",\n".join("  " + json.dumps(run) for run in runs)
    head = json.dumps(result | {"gains": gains(runs)}, indent=1)[:-2]
    out.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with one folder of CIFAR-10 images per class")
    parser.add_argument("--grocery", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a run of the recipe cifar")
    parser.add_argument("--sets", nargs="+", default=["cifar", "grocery"], choices=["cifar", "grocery"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[300, 1000, 2640])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=8000, help="images that a run sees, with repetitions")
    parser.add_argument("--work", type=Path, default=Path("runs/continue_gain"), help="folder for the runs' files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    proxies = {"cifar": lambda: cifar_proxy(arguments.cifar)}
    proxies["grocery"] = lambda: grocery_proxy(arguments.grocery, arguments.checkpoint)
    loaded = {name: proxies[name]() for name in arguments.sets}
    for seed in arguments.seeds:
        for method in arguments.methods:
            for size in arguments.sizes:
                for name, proxy in loaded.items():
                    path = arguments.work / f"{name}-{size}-{seed}-{method}-{arguments.images}.json"
                    if not path.exists():
                        run = measure_run(proxy, method, size, seed, round(arguments.images / proxy.cost))
                        path.write_text(json.dumps(run))
                        start, end = run["figures"]["start"], run["figures"]["end"]
                        print(f"{path.stem}: {run['train_seconds']} s, {start} -> {end}", flush=True)
                        write_results(arguments.work, arguments.out)
    write_results(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
