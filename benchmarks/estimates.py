"""Compare the estimates of three short training runs with what the runs really need.

    OMP_NUM_THREADS=1 python benchmarks/estimates.py --data GROCERY [--runs smoke wide streamed] [--clock cpu]

GROCERY is the folder of the grocery images, with the folders `train` and `val`. The runs use 512 training images and 64
images for k-NN, evenly spread over the classes, so that each run takes less than 90 s on one thread. Each run is
estimated in one process and then trained in another. The runs differ in the network, the crops, the micro-batches and
the way in which images are read. A time is that of the whole run without the import of torch. Memory is the peak of the
process. The ratios are estimated / measured.

Other load on the machine changes the times. With `--clock cpu`, each process uses a single core, and all times, also
those in the trial, are CPU times of the process. They equal the times on an idle core, except for waiting for the disk.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from model.cpus import available_cpus  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.data.listing import list_images  # noqa: E402
from training.data.run_images import ASKED_PHOTOS, KNN_PHOTOS, sample  # noqa: E402
from training.distributed import World, join  # noqa: E402
from training.estimate import (  # noqa: E402
    Plan,
    count_evaluations,
    estimate,
    image_memory,
    in_words,
    steps_of_phases,
)
from training.outcome import GALLERY  # noqa: E402
from training.recipe import load_config  # noqa: E402
from training.release import WHITENING_IMAGES  # noqa: E402
from training.setup import attention_kernel, compute_dtype, make_autocast, make_setup  # noqa: E402
from training.train import train  # noqa: E402
from training.trial import Pieces, trial  # noqa: E402
from training.watch.flops import describe_device  # noqa: E402
from training.watch.monitor import peak_memory_bytes, read_lines  # noqa: E402
from training.wiring import (  # noqa: E402
    cache_side,
    crop_settings,
    image_settings,
    intervals,
    make_schedules,
    step_settings,
)

RESULTS = Path(__file__).parent / "results"
IMAGES = {"train": 512, "val": 64}
RUNS = {  # settings that differ from those of the recipe smoke
    "smoke": ["epochs=8"],
    # a wider network with micro-batches
    "wide": [
        "vit={embed_dim = 384, depth = 6, num_heads = 6, img_size = 112, layerscale_init = 1.0}",
        "global_size=112",
        "local_size=42",
        "batch_size=32",
        "micro_batch=8",
        "n_prototypes=4096",
        "epochs=0.5",
        "eval_every_epochs=0",
        "eval_resize=56",
        "eval_crop=56",
    ],
    # images are decoded during training, and the crops of the last steps are larger
    "streamed": [
        "epochs=4",
        "cache_bytes=0",
        "eval_every_epochs=0",
        "last_phase={share = 0.25, global_size = 84, local_size = 42, micro_batch = 32}",
    ],
}


def copy_images(data: Path, folder: Path) -> None:
    """Copy some of the images in `data` to `folder`."""
    for part, count in IMAGES.items():
        paths = sorted(path for path in (data / part).rglob("*") if path.is_file())
        for number in range(count):
            path = paths[number * len(paths) // count]
            target = folder / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def plan_of(config: TrainConfig, n_images: int, n_evaluated: int, world: World) -> Plan:
    """Return the plan of a run with `n_images` training images and `n_evaluated` images in each evaluation.

    A run without images to evaluate has no measure.
    """
    steps_per_epoch = n_images // config.batch_size
    total = max(1, round(config.epochs * steps_per_epoch))
    every = intervals(config, steps_per_epoch, total)
    _, images = image_settings(config)
    in_memory, image_bytes = image_memory(
        n_images,
        images.side,
        config.batch_size // world.size,
        cache_bytes=images.cache_bytes,
        ahead_steps=images.reading.ahead_steps,
        ahead_bytes=images.reading.ahead_bytes,
    )
    measured = n_evaluated > 0 and config.measure != "none"
    in_the_loop = count_evaluations(total, every.evaluate)
    whitened = 0 if config.whiten is None else (2 if measured else 1) * min(n_images, WHITENING_IMAGES)
    n_sheets = 1 + ((total - 1) // every.sheet if every.sheet else 0)
    return Plan(
        images=n_images,
        epochs=config.epochs,
        phase_steps=steps_of_phases([phase.starts_at for phase in crop_settings(config).phases], total),
        batch_size=config.batch_size,
        n_ranks=world.size,
        on_cpu=world.device.type == "cpu",
        in_memory=in_memory,
        image_bytes=image_bytes,
        log_every=every.log,
        save_every_seconds=every.save_seconds,
        best_saves=in_the_loop - 2 if measured else 0,  # step 0 and the last step are saved anyway
        keep_states=config.keep_states,
        rollback_states=(config.on_collapse == "rollback") + (config.on_measure == "rollback"),
        # the last one, the best one before and after it is whitened, and those for `dinov2 average`
        checkpoints=(3 if measured else 1) + (total // every.checkpoint if every.checkpoint else 0),
        sheets=n_sheets,
        evaluations=in_the_loop + 2 if measured else 1,  # at the end, also those of the last and the best checkpoint
        images_per_evaluation=n_evaluated,
        other_images=n_sheets * min(n_images, GALLERY) + whitened,
    )


def pieces_of(config: TrainConfig, world: World, total: int) -> Pieces:
    """Return the parts of a run of `total` steps that a trial needs."""
    return Pieces(
        make_setup=lambda: make_setup(config, world),
        step_settings=step_settings(config),
        schedules=make_schedules(config, total),
        crops=crop_settings(config),
        total=total,
        side=cache_side(config),
        vit=config.vit_config,
        eval_spec=config.eval_spec,
        workers=config.workers or max(1, available_cpus() // world.on_machine),
        out=config.out,
    )


def estimate_run(config: TrainConfig) -> dict[str, Any]:
    """Estimate a run without starting it, and return the estimate, the costs and the time that the trial took."""
    with join(config.device) as world:
        listing = list_images(image_settings(config)[0], world, Console(stderr=True))
        n_evaluated = len(sample(listing.train, KNN_PHOTOS)) + len(sample(listing.held_out, ASKED_PHOTOS))
        plan = plan_of(config, len(listing.train), n_evaluated, world)
        start = time.perf_counter()
        with attention_kernel(world.device, compute_dtype(make_autocast(config.precision, world.device))):
            costs, free = trial(pieces_of(config, world, plan.steps), listing.train, world)
        seconds = time.perf_counter() - start
    estimated = estimate(plan, costs, free)
    print(*in_words(estimated), sep="\n", file=sys.stderr)
    return {**asdict(estimated), "costs": asdict(costs), "trial_seconds": round(seconds, 1)}


def train_run(config: TrainConfig) -> dict[str, Any]:
    """Train a run in this process, and return what it needed."""
    start = time.perf_counter()
    train(config)
    total = time.perf_counter() - start
    lines = read_lines(config.out / "metrics.jsonl")
    with join(config.device) as world:
        machine, peak = describe_device(world.device), peak_memory_bytes(world.device)
    training = sum(line["seconds"] for line in lines)
    return {
        "machine": machine,
        "total_seconds": total,
        "training_seconds": training,
        "seconds_per_step": training / lines[-1]["step"],
        "memory_bytes": peak,
        "memory_bytes_in_metrics": lines[-1]["peak_memory_bytes"],
        "disk_bytes": sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file()),
    }


def compare(name: str, data: str, clock: str) -> dict[str, Any]:
    """Estimate and train the run `name`, each in its own process, and return both results and their ratios."""

    def child(action: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--data", f"{folder}/images", "--runs", name, "--clock", clock]
        command += ["--do", action, "--out", f"{folder}/{action}"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(printed.splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        copy_images(Path(data), Path(folder, "images"))
        estimated, measured = child("estimate"), child("train")
    shared = [key for key in measured if isinstance(estimated.get(key), int | float)]
    ratios = {key: round(estimated[key] / measured[key], 3) for key in shared}
    print(f"{name}: estimated / measured {ratios}", file=sys.stderr)
    return {"overrides": RUNS[name], "ratios": ratios, "measured": measured, "estimated": estimated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the grocery images")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--do", choices=("compare", "estimate", "train"), default="compare")
    parser.add_argument("--out", type=Path, help="folder of the run; only for estimate and train")
    arguments = parser.parse_args()
    if arguments.do != "compare":
        if arguments.clock == "cpu":
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            time.perf_counter = time.process_time
        config = load_config("smoke", arguments.data, arguments.out, RUNS[arguments.runs[0]])
        print(json.dumps((estimate_run if arguments.do == "estimate" else train_run)(config)))
        return
    command = shlex.join(["python", "benchmarks/estimates.py", *sys.argv[1:]]).replace(arguments.data, "GROCERY")
    report = {
        "benchmark": "estimates",
        "date": datetime.date.today().isoformat(),
        "command": command,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "runs": {name: compare(name, arguments.data, arguments.clock) for name in arguments.runs},
    }
    (RESULTS / f"{report['date']}-estimates.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
