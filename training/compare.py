"""Compare DINO with DINOv2: two training runs that differ only in the settings that the constant `DINO` lists.

Both runs use the same recipe, images, network, crops, schedules, seed and number of steps. The network that both runs
start from is evaluated too, as the baseline. All three networks get the same evaluation: k-NN, logistic regression and
robustness of the features. The speed, the peak memory and the stability of the loss are reported for each run as well.

The stability of the loss is described by two numbers:

- The standard deviation of the changes of the DINO loss between consecutive lines in the last half of metrics.jsonl. It
  is divided by ln K, where K is the number of prototypes, because a network that has learned nothing has the loss ln K.
  A steady fall of the loss shifts the mean of the changes but not their standard deviation. The standard deviation also
  does not depend on the level of the loss, which differs between the runs because their targets differ in sharpness.
  The first half of the lines is not used, because every loss falls fast at first.
- The number of jumps. A jump is a line, anywhere in the file, in which the loss is not finite or has risen by more than
  `JUMP` times ln K since the previous line.

Both runs use the same crops at the same steps, so the crops cause the same variation in both losses.

Each run trains in its own process, because the system measures peak memory over the whole life of a process. On Linux a
child process inherits its parent's peak, so the evaluation starts only after both runs have trained.

    out/dino, out/dinov2   the folders of the two runs; an interrupted run is resumed
    out/compare.json       all results
    out/compare.html       a page with a table of the results and the curves of both runs
"""

import json
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from model.checkpoint import load_checkpoint
from model.files import write_text
from model.pooling import Pooling
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.dataset import Photo, photos_of, split_source
from training.data.listing import INDEX
from training.data.run_images import KNN_PHOTOS
from training.data.sources import open_source
from training.distributed import join
from training.ending import Interrupted, RunStopped
from training.evaluate.features import compute_features
from training.evaluate.knn import knn_accuracy, labels_of, neighbours_for, with_labels
from training.evaluate.logistic import C_GRID, evaluate_logistic
from training.evaluate.meaning import NoMeaning, check_classification
from training.evaluate.robustness import robustness
from training.outcome import CHECKPOINT
from training.pages.compare_page import NETWORKS, RUNS, page, print_table
from training.pages.report import points_of, values_of
from training.provenance import code_revision
from training.recipe import load_config
from training.setup import make_network
from training.watch.flops import describe_device
from training.watch.monitor import EVENTS, METRICS, read_lines
from training.watch.sentinels import rankme_share

DINO: dict[str, object] = {
    "centering": "softmax",
    "ibot_weight": 0.0,
    "koleo_weight": 0.0,
    "mask_probability": 0.0,
}
"""The settings in which DINO (arXiv 2104.14294) differs from DINOv2: a moving centre, no iBOT, no KoLeo, no masks."""

WATCHED: dict[str, object] = {"log_every": 5, "on_collapse": "warn", "on_measure": "warn"}
"""Defaults of both runs: frequent log lines, and checks that only warn, so that a collapse shows in the results."""

JSON_FILE, HTML_FILE = "compare.json", "compare.html"
KS = (10, 20)
KNN_POOLINGS: tuple[Pooling, ...] = ("cls", "mean")
CS = C_GRID[::4]  # 12 values from 1e-6 to 1e5: neighbours in the full grid differ by a few images
ROBUSTNESS_PHOTOS = 2000  # recall@1 falls as the number of images grows, so the number is fixed and reported
JUMP = 0.05  # as a share of ln K
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from training.__main__ import main; sys.exit(main())"
Runner = Callable[[Sequence[str]], None]


def compare(
    data: str, out: Path, *, base: str = "smoke", overrides: Sequence[str] = (), console: Console | None = None,
    run: Runner | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train one network with DINO and one with DINOv2, evaluate both, and print a table of the results.

    The network that both runs start from is evaluated too. The results are written to compare.json and compare.html in
    the folder `out`.

    Args:
        data: a folder of images, tar shards or a dataset on disk, as for training.
        out: the folder for both runs and the results. Interrupted runs in this folder are resumed.
        base: the recipe of both runs.
        overrides: `key=value` settings for both runs.
        console: the console on which messages and the table are printed. The default is the terminal.
        run: a function that trains one run, given the arguments of `python -m training`. The default is `run_apart`,
            which trains in another process.

    Returns:
        the content of compare.json.

    Raises:
        ValueError: a recipe or setting is unknown, an override sets a setting in which the two runs must differ, the
            recipe has a frozen teacher, or there are not enough images.
        OSError: the images or `out` cannot be reached.
        RunStopped: a training run failed. Its process has printed the error.
        Interrupted: SIGTERM or Ctrl-C stopped a training run. The same command resumes the run.
    """
    console, run = console or Console(), run or run_apart
    commands = {name: arguments(name, data, out, base, overrides) for name in RUNS}
    configs = {name: config_of(command) for name, command in commands.items()}
    check_fair(configs["dinov2"], overrides)
    out.mkdir(parents=True, exist_ok=True)
    train_images, held_out = photos_to_judge(configs["dinov2"], out / INDEX)
    for name, command in commands.items():
        console.print(f"training {RUNS[name]} in {configs[name].out}", markup=False)
        run(command)
    results = measure(configs, train_images, held_out, console)
    write_text(out / JSON_FILE, json.dumps(results, indent=1) + "\n")
    write_text(out / HTML_FILE, page(results, out))
    print_table(results, console)
    console.print(f"{out / HTML_FILE}, {out / JSON_FILE}", markup=False)
    return results


def arguments(name: str, data: str, out: Path, base: str, overrides: Sequence[str]) -> list[str]:
    """Return the arguments with which `python -m training` trains the run `name`, which is `dino` or `dinov2`.

    Later settings override earlier settings, so the settings that distinguish DINO from DINOv2 come last.
    """
    changes = DINO if name == "dino" else {}
    settings = [f"{key}={json.dumps(value)}" for key, value in WATCHED.items()]
    settings += [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
    return ["--data", data, "--recipe", base, "--out", str(out / name), *settings]


def config_of(command: Sequence[str]) -> TrainConfig:
    """Load the settings of a run from `command`, the arguments that the function `arguments` returned.

    Raises:
        ValueError: the recipe, a setting or a value is not allowed.
        OSError: the recipe's file cannot be read.
    """
    _, data, _, base, _, out, *settings = command
    return load_config(base, data, Path(out), settings)


def check_fair(config: TrainConfig, overrides: Sequence[str]) -> None:
    """Check that `config` and `overrides` allow a fair comparison of a DINO run and a DINOv2 run.

    Raises:
        ValueError: an override sets one of the settings in the constant `DINO`, in which the two runs must differ, or
            the recipe has a frozen teacher.
    """
    conflicting = sorted({override.partition("=")[0] for override in overrides} & DINO.keys())
    if conflicting:
        raise ValueError(f"{', '.join(conflicting)}: DINO and DINOv2 differ in this, so it cannot be set for both")
    if config.teacher is not None:
        raise ValueError(
            f"recipe {config.recipe} has a frozen teacher: in DINO and DINOv2 the teacher is the student's average"
        )


def photos_to_judge(config: TrainConfig, index: Path) -> tuple[list[Photo], list[Photo]]:
    """Return two lists: a sample of the training images, which k-NN searches, and all held-out images.

    The images are divided into training and held-out images in the same way as in the training runs.

    Raises:
        ValueError: there are no images, or fewer than two images are held out.
    """
    train, held_out = split_source(open_source(config.data[0], index), config.held_out_share, config.seed)
    if len(held_out) < 2:
        raise ValueError(
            f"{config.data[0]}: {len(held_out)} images are held out; a comparison needs two (held_out_share)"
        )
    train_images = photos_of(train)
    return train_images[:: math.ceil(len(train_images) / KNN_PHOTOS)], photos_of(held_out)


def run_apart(command: Sequence[str]) -> None:
    """Run `python -m training` with the arguments `command` in another process, and wait until it ends.

    The process prints to the same terminal. If SIGTERM or Ctrl-C arrives, it is forwarded to the process, which saves
    its state and exits.

    Raises:
        Interrupted: SIGTERM or Ctrl-C stopped the process.
        RunStopped: the process failed.
    """
    root = str(Path(__file__).parents[1])
    program = [sys.executable, "-c", START, root, *command]
    with subprocess.Popen(program) as process, handed_on(process):  # noqa: S603 - our own code, no shell
        status = process.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        if status in (128 + number, -number):  # -number: the signal came before the run had installed its handler
            raise Interrupted(f"stopped by {number.name}; run the same command again to resume", number)
    if status:
        raise RunStopped(f"the training run ended with status {status}; see its output above")


@contextmanager
def handed_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Forward each SIGTERM and SIGINT (Ctrl-C) that arrives inside the block to `process`."""

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def measure(
    configs: Mapping[str, TrainConfig], train_images: Sequence[Photo], held_out: Sequence[Photo], console: Console
) -> dict[str, Any]:
    """Evaluate the initial network and both trained networks, and return the content of compare.json.

    The content includes what `run_figures` returns for each of the two runs.
    """
    config = configs["dinov2"]
    labels = {photo.label for photo in train_images} - {None}
    classes = len(labels)
    has_classes = classes > 1 and any(photo.label in labels for photo in held_out)
    results: dict[str, dict[str, Any]] = {}
    with join(config.device) as world:
        for name, title in NETWORKS.items():
            console.print(f"evaluating {title}", markup=False)
            backbone = trained(configs[name]) if name in RUNS else make_network(config).backbone
            results[name] = judge(
                backbone.eval().to(world.device), train_images, held_out, config.eval_spec, has_classes
            )
        for name in RUNS:
            results[name]["run"] = run_figures(configs[name])
        hardware = describe_device(world.device)
    _, _, facts = load_checkpoint(config.out / CHECKPOINT)
    return {
        "base": config.recipe,
        "settings": config.model_dump(mode="json", exclude={"data", "out", "init", "teacher", "wandb"}),
        "changes": DINO,
        "data": Path(config.data[0]).name,
        "data_sha256": facts["data_sha256"],
        "photos": facts["photos"],
        "held_out": len(held_out),
        "classes": classes,
        "steps": facts["steps"],
        "photos_seen": facts["steps"] * config.batch_size,
        "hardware": hardware,
        "torch": torch.__version__,
        "revision": code_revision(),
        "networks": results,
    }


def trained(config: TrainConfig) -> DinoVisionTransformer:
    """Load the backbone from the last checkpoint of a finished run."""
    weights, vit_config, _ = load_checkpoint(config.out / CHECKPOINT)
    backbone = DinoVisionTransformer(vit_config)
    backbone.load_state_dict(weights)
    return backbone


def judge(
    backbone: DinoVisionTransformer,
    train_images: Sequence[Photo],
    held_out: Sequence[Photo],
    spec: PreprocessSpec,
    has_classes: bool,
) -> dict[str, Any]:
    """Evaluate one network on the held-out images.

    Returns:
        a dictionary with `robustness` (see training/evaluate/robustness.py) and `rankme_share` (the effective rank of
        the class tokens, as a share of the largest possible rank). If `has_classes` is True, it also contains `knn`
        (the k-NN accuracy for each pooling and each k) and `logistic` (the accuracy of logistic regression, and the
        value of C, its inverse penalty strength). Images without a label are left out of these two. If every network
        would have the same accuracy, the entry is missing, and `left_out` is the reason.
    """
    test = compute_features(backbone, held_out, spec)
    stride = math.ceil(len(held_out) / ROBUSTNESS_PHOTOS)
    results: dict[str, Any] = {
        "robustness": robustness(backbone, held_out[::stride], spec),
        "rankme_share": rankme_share(test.pooled("cls")),
    }
    if not has_classes:
        return results
    train_images, _ = with_labels(train_images, "train")
    train = compute_features(backbone, train_images, spec)
    train_labels, classes = labels_of([train_images[i] for i in train.kept.tolist()])
    read = [held_out[i] for i in test.kept.tolist()]
    rows = [row for row, photo in enumerate(read) if photo.label is not None]
    test_labels, _ = labels_of([read[row] for row in rows], classes)
    pairs = {pooling: (train.pooled(pooling), test.pooled(pooling)[rows]) for pooling in KNN_POOLINGS}
    try:
        check_classification(train_labels, test_labels, val="the held-out part")
        ks, _ = neighbours_for(KS, len(train_labels))
        results["knn"] = {
            pooling: {str(k): share for k, share in knn_accuracy(a, train_labels, b, test_labels, ks).items()}
            for pooling, (a, b) in pairs.items()
        }
        report = evaluate_logistic(pairs["cls"][0], train_labels, pairs["cls"][1], test_labels, c_grid=CS)
        results["logistic"] = {"accuracy": report.accuracy, "c": report.c}
    except NoMeaning as reason:  # an error would lose the other results of two finished runs
        results["left_out"] = str(reason)
    return results


def run_figures(config: TrainConfig) -> dict[str, Any]:
    """Read a run's loss, speed, peak memory and events from its log files, and return them as a dictionary."""
    lines = read_lines(config.out / METRICS)
    speeds, memory = values_of(lines, "images_per_s"), values_of(lines, "peak_memory_bytes")
    loss = values_of(lines, "dino_over_ln_k")
    return {
        "stability": stability([value for _, value in points_of(lines, "dino_over_ln_k")]),
        "dino_over_ln_k": loss[-1] if loss else None,
        "images_per_s": statistics.median(speeds) if speeds else None,
        "seconds": round(sum(values_of(lines, "seconds")), 1),
        "peak_memory_bytes": max(memory, default=None),
        "lines": len(lines),
        "events": [f"{line.get('kind')}: {line.get('message')}" for line in read_lines(config.out / EVENTS)],
    }


def stability(loss: Sequence[float | None]) -> dict[str, Any]:
    """Measure the stability of a loss, as defined at the top of this file.

    Args:
        loss: the DINO loss in each line of metrics.jsonl, divided by ln K for K prototypes. A loss that was not finite
            is given as None.

    Returns:
        a dictionary with two entries. `change_std` is the standard deviation of the changes in the last half of `loss`,
        or None if that half has fewer than three finite values. `jumps` is the number of jumps.
    """

    def changes(values: Sequence[float | None]) -> list[float]:
        finite = [value for value in values if value is not None]
        return [b - a for a, b in pairwise(finite)]

    last = changes(loss[len(loss) // 2 :])
    jumps = sum(value is None for value in loss) + sum(change > JUMP for change in changes(loss))
    return {"change_std": statistics.stdev(last) if len(last) > 1 else None, "jumps": jumps}
