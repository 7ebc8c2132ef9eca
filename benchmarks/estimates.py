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

from training.config import TrainConfig  # noqa: E402
from training.data.listing import list_images  # noqa: E402
from training.distributed import join  # noqa: E402
from training.estimate import in_words  # noqa: E402
from training.plan import estimated, measure  # noqa: E402
from training.recipe import load_config  # noqa: E402
from training.setup import attention_kernel, compute_dtype, make_autocast  # noqa: E402
from training.train import train  # noqa: E402
from training.watch.flops import describe_device  # noqa: E402
from training.watch.monitor import peak_memory_bytes, read_lines  # noqa: E402
from training.wiring import image_settings  # noqa: E402

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


def estimate_run(config: TrainConfig) -> dict[str, Any]:
    """Estimate a run without starting it, and return the estimate, the costs and the time that the trial took."""
    with join(config.device) as world:
        listing = list_images(image_settings(config)[0], world, Console(quiet=True))
        start = time.perf_counter()
        with attention_kernel(world.device, compute_dtype(make_autocast(config.precision, world.device))):
            costs = measure(config, listing, world)
        seconds = time.perf_counter() - start
        found = estimated(config, listing, world, costs)
    print(*in_words(found), sep="\n", file=sys.stderr)
    return {**asdict(found), "costs": asdict(costs[0]), "trial_seconds": round(seconds, 1)}


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
        overrides = [*RUNS[arguments.runs[0]], "estimate=false"]
        config = load_config("smoke", arguments.data, arguments.out, overrides)
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
