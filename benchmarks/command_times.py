"""Measure how long the cheap commands take.

    python benchmarks/command_times.py [--before FOLDER] [--runs 10]

FOLDER is another version of the repository, for instance a git worktree. The runs of both versions alternate, and each
version has its own vector store, which is empty. For each command, the smallest and the median wall time and the
smallest CPU time are printed, in seconds. On a busy machine, only the CPU times can be compared.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COMMANDS = (
    ("--help",),
    ("models",),
    ("collections", "list"),
    ("collections", "create", "shop", "--originals"),
)


def run(folder: Path, command: tuple[str, ...], data_dir: str) -> tuple[float, float]:
    """Run a command of the version in `folder`. Return its wall time and its CPU time in seconds."""
    place = () if command == ("--help",) else ("--data-dir", data_dir)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONPYCACHEPREFIX": f"{data_dir}/compiled"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has compiled modules
    subprocess.run(
        [sys.executable, "-m", "cli", *command, *place], check=True, cwd=folder, env=environment, capture_output=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder of another version")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    versions = {"before": arguments.before, "now": ROOT} if arguments.before else {"now": ROOT}
    result: dict[str, object] = {
        "benchmark": "command-times",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "runs": arguments.runs,
    }
    with tempfile.TemporaryDirectory() as temporary:
        data_dirs = {name: f"{temporary}/{name}" for name in versions}  # an older version cannot open a newer store
        for name, folder in versions.items():
            run(folder.absolute(), COMMANDS[-1], data_dirs[name])  # creates the store
        for command in COMMANDS:
            for name, folder in versions.items():
                run(folder.absolute(), command, data_dirs[name])  # compiles the modules
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
            for _ in range(arguments.runs):
                for name, folder in versions.items():
                    times[name].append(run(folder.absolute(), command, data_dirs[name]))
            for name, pairs in times.items():
                walls, cpus = zip(*pairs, strict=True)
                row = {"wall_min_s": min(walls), "wall_median_s": statistics.median(walls), "cpu_min_s": min(cpus)}
                row = {key: round(value, 3) for key, value in row.items()}
                result[f"{' '.join(command)} ({name})"] = row
                print(f"{' '.join(command):<42} {name:<7} {row}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-command-times.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
