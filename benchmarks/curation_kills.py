"""Kill a curation of real images in each stage, let its disk become full in each stage, and compare the datasets.

    python benchmarks/curation_kills.py IMAGES EVALUATION [--folder DIR] [--images 60] [--each 5] [--disks]

IMAGES and EVALUATION contain one folder per class. A planted set (`planted_set.py`) is made from them, and curated with
all stages in four ways. All must give the same files, and no stage may be done twice:

    one worker   the reference
    two workers
    kills        SIGKILL in the middle of each stage, each time followed by the same command
    disks        (with --disks, needs root) the dataset is on a tmpfs that becomes full in each stage, and is then
                 enlarged; then a complete dataset is written anew on a full disk, which must not change it; then only
                 the working folder is on a tmpfs, which begins too small and grows

The last line is the result as JSON, which is also written to benchmarks/results/. The exit status is 1 if a check
fails.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK: Final = ".curate"
MIB: Final = 2**20

POINTS: Final = {
    "scan": ("training.curate.scan.write_bytes", 2),
    "quality": ("training.curate.quality_stage.find_issues", 1),
    "examples": ("training.curate.embedding_stages.learn_score", 1),
    "copies": ("training.curate.pair_cache.PairStore.add", 2),
    "leaks": ("training.curate.copy_stages.find_leaks", 1),
    "sensitive": ("training.curate.embedding_stages.learn_score", 1),
    "retrieve": ("training.curate.embedding_stages.retrieve_by_sample", 1),
    "balance": ("training.curate.embedding_stages.balance", 1),
    "write": ("training.curate.write.write_shard", 2),
    "report": ("training.curate.write_stage.write_report", 1),
    "certificate": ("training.curate.write_stage.write_certificate", 1),
}
"""Where each stage is interrupted: a function, and the number of its call within the stage, counted from 1. The report
and the certificate are files of the stage `write`."""
LAST: Final = "write"
IN_STAGE: Final = {"report": LAST, "certificate": LAST}


@contextmanager
def interrupted(point: str, act: Callable[[], object]) -> Iterator[None]:
    """Within the block, call `act` in the middle of a stage of curations in this process. See `POINTS`."""
    from training.curate import run

    where, call = POINTS[point]
    stage, calls = "scan", 0
    original = resolve_name(where)
    run_stage, write_dataset = run.run_stage, run.write_dataset

    def staged(of: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        @wraps(of)
        def wrapped(*args: Any) -> Any:
            nonlocal stage
            stage = name_of(*args)
            return of(*args)

        return wrapped

    @wraps(original)
    def trapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += stage == IN_STAGE.get(point, point)
        if calls == call:
            calls += 1  # once
            act()
        return original(*args, **kwargs)

    with ExitStack() as patches:
        for target, value in (
            (where, trapped),
            ("training.curate.run.run_stage", staged(run_stage, lambda of, task: of.name)),
            ("training.curate.run.write_dataset", staged(write_dataset, lambda task, track: LAST)),
        ):
            patches.enter_context(patch(target, value))
        yield


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def files_of(out: Path) -> dict[str, bytes]:
    """Return the files of a dataset by name, without those in the working folder."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def done_stages(out: Path) -> list[str]:
    """Return the names of the stages that have been done, from the log."""
    log = out / WORK / "log.jsonl"
    return [json.loads(line)["stage"] for line in log.read_text().splitlines()] if log.exists() else []


# A disk that becomes full


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """Mount a tmpfs of a size on a folder for the duration of the block.

    Raises:
        OSError: it cannot be mounted, for instance because this is not root.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def set_size(folder: Path, n_bytes: int) -> None:
    """Change the size of a tmpfs that is mounted on a folder."""
    _mount("-o", f"remount,size={n_bytes}", str(folder))


def fill_up(folder: Path) -> None:
    """Shrink a tmpfs to the bytes that are used."""
    set_size(folder, shutil.disk_usage(folder).used)


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"mount {' '.join(arguments)}: {error.stderr.strip()}") from error


# Runs of the command


@dataclass(frozen=True)
class Run:
    """A run of the command: its exit status, what it has printed, and its time in seconds."""

    status: int
    printed: str
    wall_s: float
    cpu_s: float

    @property
    def error(self) -> str:
        """The line that begins with `error:`, without this word."""
        return next((line[7:] for line in self.printed.splitlines() if line.startswith("error: ")), "")


def run_command(arguments: Sequence[str], point: str = "", act: str = "") -> Run:
    """Run `dinov2` with arguments in a new process.

    If a point is given, the action `act` is done there: `kill`, or the folder of a tmpfs that becomes full.
    """
    begin, before = time.monotonic(), os.times()
    process = [sys.executable, __file__, "--child", point, act, *arguments]
    done = subprocess.run(process, capture_output=True, text=True, cwd=ROOT)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(done.returncode, done.stdout + done.stderr, time.monotonic() - begin, cpu)


def _child(point: str, act: str, arguments: Sequence[str]) -> None:
    import cli

    with ExitStack() as stack:
        if point:
            stack.enter_context(interrupted(point, kill_this_process if act == "kill" else lambda: fill_up(Path(act))))
        cli.app(list(arguments))


# The checks


def make_set(folder: Path, images: Path, evaluation: Path, count: int, each: int) -> list[str]:
    """Make the planted set, and return the arguments that curate it with all stages, without `--out`."""
    from benchmarks.planted_set import Sizes, blurred, images_of, plant

    few = folder / "few"
    for path in images_of(evaluation)[:: max(1, len(images_of(evaluation)) // 40)]:
        (few / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, few / path.parent.name / path.name)
    plant(images, folder / "set", few, Sizes(count, each, each), seed=1)
    paths = images_of(images)
    classes = sorted({path.parent.name for path in paths})
    _make_examples(folder, paths, classes, blurred)
    settings = {
        "leaks.evaluation": folder / "set" / "evaluation",
        "examples.good": folder / "good",
        "examples.bad": folder / "bad",
        "sensitive.examples": folder / "sensitive",
        "sensitive.harmless": folder / "good",
        "retrieve.seeds": folder / "seeds",
        "retrieve.k": 8,
        "balance.size": count // 2,
        "write.shard_images": 16,
        "write.held_out_share": 0.2,
    }
    return [str(folder / "set" / "images"), *(f"--set={name}={value}" for name, value in settings.items())]


def _make_examples(folder: Path, paths: Sequence[Path], classes: Sequence[str], blurred: Callable[..., Any]) -> None:
    """Write the example images: blurred ones as bad quality, those of the first class as sensitive content."""
    import random

    from PIL import Image

    others = [path for path in paths if path.parent.name != classes[0]]
    groups = {
        "good": others[5 :: len(others) // 15],
        "bad": others[11 :: len(others) // 15],
        "sensitive": [path for path in paths if path.parent.name == classes[0]][:15],
        "seeds": others[17 :: len(others) // 20],
    }
    for name, members in groups.items():
        (folder / name).mkdir()
        for number, path in enumerate(members):
            target = folder / name / f"{number:02d}.jpg"
            if name == "bad":
                with Image.open(path) as image:
                    target.write_bytes(blurred(image.convert("RGB"), random.Random(number)).data)
            else:
                shutil.copy(path, target)


def check_kills(command: Sequence[str], out: Path) -> dict[str, Any]:
    """Kill a curation in each stage, and continue it each time."""
    kills = {}
    for point in POINTS:
        killed = run_command([*command, f"--out={out}"], point, "kill")
        stages = done_stages(out)
        kills[point] = {"status": killed.status, "done": len(stages), "wall_s": round(killed.wall_s, 1)}
        print(f"kill in {point}: status {killed.status}, {len(stages)} stages done", flush=True)
        if killed.status != -signal.SIGKILL or IN_STAGE.get(point, point) in stages:
            kills[point]["printed"] = killed.printed[-2000:]
    end = run_command([*command, f"--out={out}"])
    is_right = end.status == 0 and all("printed" not in kill for kill in kills.values())
    return {"kills": kills, "status": end.status, "right": is_right}


def check_full_disks(command: Sequence[str], folder: Path, n_bytes: int) -> dict[str, Any]:
    """Let the disk of a curation become full in each stage, and continue it each time on a larger one.

    `n_bytes` is a size that is enough for the dataset and the working folder.
    """
    out, errors, is_right = folder / "disk", {}, True
    with small_disk(out, n_bytes):
        for point in POINTS:
            full = run_command([*command, f"--out={out}"], point, str(out))
            set_size(out, n_bytes)
            errors[point] = {"status": full.status, "error": full.error}
            is_clear = full.status == 2 and str(out) in full.error and "pace and" in full.error
            is_right &= is_clear and IN_STAGE.get(point, point) not in done_stages(out)
            print(f"full in {point}: status {full.status}, {full.error}", flush=True)
        end = run_command([*command, f"--out={out}"])
        result, stages = files_of(out), done_stages(out)
        anew = run_command([*command, f"--out={out}", "--set=write.held_out_share=0.4"], "report", str(out))
        is_unchanged = anew.status == 2 and files_of(out) == result
    return {
        "full_in_each_stage": errors,
        "status": end.status,
        "right": is_right and end.status == 0,
        "older_dataset_unchanged": is_unchanged,
        "files": result,
        "stages": stages,
    }


def check_small_work_folder(command: Sequence[str], folder: Path, n_bytes: int) -> dict[str, Any]:
    """Curate with a working folder that has its own disk, which begins with 1/32 of `n_bytes` and grows."""
    out, tries, size = folder / "work", list[dict[str, Any]](), n_bytes // 32
    with small_disk(out / WORK, size):
        while True:
            run = run_command([*command, f"--out={out}"])
            stages = done_stages(out)
            tries.append({"mib": round(size / MIB, 2), "status": run.status, "error": run.error, "done": len(stages)})
            print(f"working folder of {size / MIB:.2f} MiB: status {run.status}, {run.error}", flush=True)
            if run.status == 0 or size > 2 * n_bytes:
                break
            size = int(size * 1.5)
            set_size(out / WORK, size)
        result = files_of(out)
    is_clear = all(entry["status"] == 2 and str(out / WORK) in entry["error"] for entry in tries[:-1])
    right = tries[-1]["status"] == 0 and is_clear
    return {"tries": tries, "right": right, "files": result, "stages": stages}


def compared(result: dict[str, Any], whole: dict[str, bytes], stages: Sequence[str]) -> dict[str, Any]:
    """Add to a result whether its files and its stages are those of the reference."""
    files, done = result.pop("files"), result.pop("stages")
    return {**result, "same_files": files == whole, "no_stage_twice": sorted(done) == sorted(stages)}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, with one folder per class")
    parser.add_argument("evaluation", type=Path, help="folder of evaluation images; about 40 of them are used")
    parser.add_argument("--folder", type=Path, help="for the data; by default, a temporary folder")
    parser.add_argument("--images", dest="count", type=int, default=60, help="number of originals")
    parser.add_argument("--each", type=int, default=5, help="number of copies, faults and leaks of each kind")
    parser.add_argument("--disks", action="store_true", help="also let disks become full; needs root")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        result = report(Path(name), given)
        text = json.dumps(result, indent=1).replace(name, "FOLDER")
    (RESULTS / f"{result['date']}-curation-kills.json").write_text(text + "\n")
    print(json.dumps(json.loads(text)))
    sys.exit(0 if result["all_right"] else 1)


def report(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run all checks in a folder, and return the result."""
    command = ["curate", *make_set(folder, given.images, given.evaluation, given.count, given.each)]
    outs = {number: folder / f"workers{number}" for number in (1, 2)}
    runs = {n: run_command([*command, f"--out={out}", f"--workers={n}"]) for n, out in outs.items()}
    for run in runs.values():
        print(run.printed if run.status else f"{run.wall_s:.0f} s, {run.cpu_s:.0f} s of CPU time", flush=True)
    whole, stages = files_of(outs[1]), done_stages(outs[1])
    n_images = re.search(r"scan of images: ([\d,]+) images", runs[1].printed)
    kills = check_kills(command, folder / "kills")
    kills |= {"files": files_of(folder / "kills"), "stages": done_stages(folder / "kills")}
    result = {
        "benchmark": "curation_kills",
        "command": "python benchmarks/curation_kills.py IMAGES EVALUATION --disks",
        "date": datetime.date.today().isoformat(),
        "images": n_images[1] if n_images else None,
        "stages": stages,
        "files": {name: len(content) for name, content in sorted(whole.items())},
        "workers": {
            str(n): {"status": run.status, "wall_s": round(run.wall_s, 1), "cpu_s": round(run.cpu_s, 1)}
            for n, run in runs.items()
        },
        "one_worker_and_two_same_files": files_of(outs[2]) == whole,
        "kills": compared(kills, whole, stages),
    }
    checks = [result["kills"]]
    if given.disks:
        used = sum(path.stat().st_blocks * 512 for path in outs[1].rglob("*") if path.is_file())
        for name, check in (("disks", check_full_disks), ("working_folder", check_small_work_folder)):
            result[name] = compared(check(command, folder, 4 * used), whole, stages)
            checks.append(result[name])
    is_right = all(check["right"] and check["same_files"] and check["no_stage_twice"] for check in checks)
    is_right &= result["one_worker_and_two_same_files"] and all(run.status == 0 for run in runs.values())
    result["all_right"] = is_right and result.get("disks", {}).get("older_dataset_unchanged", True)
    return result


if __name__ == "__main__":
    main()
