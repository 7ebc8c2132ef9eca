"""Add 1 % of images to a curated set: compare the dataset with one from scratch, and the cost with that of a full run.

    python benchmarks/curation_added.py IMAGES EVALUATION [--folder DIR] [--images 1000] [--each 30]

A planted set (`planted_set.py`) is made from IMAGES, which contains one folder per class, and leaks of EVALUATION. It
also has two crops of an image that share so little that neither is a copy of the other. It is curated, and then 1 % of
images are added: the image of the two crops, which joins them to one group, a copy of an image that is kept, a leak, a
copy of a new image, and new images, at least two. The time of each of these runs is taken:

    full        the set without the added images
    unchanged   the same command again: what starting the program and listing the images costs
    added       with the added images
    scratch     the same in an empty folder, which must give the same files

The last line is the result as JSON, which is also written to benchmarks/results/. The exit status is 1 if the files
differ, or if the added images cost more than 5 % of the full run without what starting costs.
"""

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.curation_kills import RESULTS, WORK, Run, files_of, run_command
from benchmarks.planted_set import Sizes, images_of, plant

SHARE: Final = 0.05
"""The largest allowed share of the cost of a full run."""
N_OTHERS: Final = 4
"""The number of added images that are not new: the joining image, a leak and two copies."""


def new_images(images: Path, planted: Path) -> list[Path]:
    """Return images of the folder `images` from which nothing in the planted set was made."""
    truth = json.loads((planted / "truth.json").read_text())["files"]
    used = {entry["made_from"] for entry in truth.values()}
    return [path for path in images_of(images) if path.name not in used and min(Image.open(path).size) >= 256]


def crops_of(path: Path) -> tuple[Image.Image, Image.Image]:
    """Return the left 62 % and the right 62 % of an image."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    part = round(0.62 * image.width)
    return image.crop((0, 0, part, image.height)), image.crop((image.width - part, 0, image.width, image.height))


def add_images(pool: Path, new: list[Path], joining: Path, kept: Path, evaluation: Path) -> dict[str, str]:
    """Add images to the folder `pool`. Return what each is, by its name in the folder."""
    folder = pool / "added"
    folder.mkdir()
    added = {"joining.jpg": "image of the two crops"}
    shutil.copy(joining, folder / "joining.jpg")
    for number, path in enumerate(new, 1):
        shutil.copy(path, folder / f"new-{number}.jpg")
        added[f"new-{number}.jpg"] = "new image"
    for name, path, what in (
        ("copy-of-new.jpg", new[0], "re-encoded copy of a new image"),
        ("copy-of-kept.webp", kept, "re-encoded copy of a kept image"),
        ("leak.jpg", evaluation, "re-encoded evaluation image"),
    ):
        with Image.open(path) as image:
            image.convert("RGB").save(folder / name, quality=60)
        added[name] = what
    return {f"1/added/{name}": what for name, what in added.items()}


def entries_of(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def became(entry: dict[str, Any]) -> str:
    return entry.get("part") or f"{entry['stage']}: {entry['reason']}"


def cost(run: Run) -> dict[str, float]:
    return {"wall_s": round(run.wall_s, 2), "cpu_s": round(run.cpu_s, 2)}


def stage_seconds(out: Path, first: int) -> dict[str, float]:
    """Return the seconds that each stage took, from the lines of the log from number `first` on."""
    lines = (out / WORK / "log.jsonl").read_text().splitlines()
    return {entry["stage"]: entry["seconds"] for entry in map(json.loads, lines[first:])}


def report(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Make the set in a folder, run everything, and return the result."""
    planted, out = folder / "set", folder / "out"
    plant(given.images, planted, given.evaluation, Sizes(given.count, given.each, given.each), seed=2)
    pool = planted / "images"
    joining, *new = np.random.default_rng(2).permutation(np.array(new_images(given.images, planted))).tolist()
    for number, crop in enumerate(crops_of(joining)):
        (pool / "crops").mkdir(exist_ok=True)
        crop.save(pool / "crops" / f"{number}.jpg", quality=90)
    settings = [
        "quality.drop=['dark', 'blurry']",  # the two crops have an odd size
        f"leaks.evaluation={planted / 'evaluation'}",
        f"balance.size={given.count // 2}",
        *given.set,
    ]
    command = ["curate", str(pool), *(f"--set={setting}" for setting in settings)]

    def run(to: Path) -> Run:
        done = run_command([*command, f"--out={to}"])
        assert done.status == 0, done.printed
        print(f"{to.name}: {done.wall_s:.1f} s, {done.cpu_s:.1f} s of CPU time", flush=True)
        return done

    runs = {"full": run(out), "unchanged": run(out)}
    before, n_before = entries_of(out), len((out / WORK / "log.jsonl").read_text().splitlines())
    kept = next(key for key, entry in before.items() if entry.get("part") and "/crops/" not in key)
    evaluation = images_of(planted / "evaluation")[0]
    n_new = max(round(0.01 * len(before)) - N_OTHERS, 2)
    added = add_images(pool, new[:n_new], joining, pool / kept.partition("/")[2], evaluation)
    runs["added"] = run(out)
    runs["scratch"] = run(folder / "scratch")
    after, (wall, cpu) = entries_of(out), _shares(runs)
    crops = [f"1/crops/{number}.jpg" for number in range(2)]
    is_same = files_of(out) == files_of(folder / "scratch")
    return {
        "benchmark": "curation_added",
        "command": f"python benchmarks/curation_added.py IMAGES EVALUATION --images {given.count} --each {given.each}",
        "date": datetime.date.today().isoformat(),
        "settings": given.set,
        "images": len(before),
        "added": {key: {"is": what, "became": became(after[key])} for key, what in added.items()},
        "crops": {key: {"before": became(before[key]), "after": became(after[key])} for key in crops},
        "runs": {name: cost(done) for name, done in runs.items()},
        "seconds_of_stages": {"full": stage_seconds(folder / "scratch", 0), "added": stage_seconds(out, n_before)},
        "share_of_a_full_run_without_starting": {"wall": round(wall, 4), "cpu": round(cpu, 4)},
        "same_files": is_same,
        "all_right": is_same and max(wall, cpu) <= SHARE,
    }


def _shares(runs: dict[str, Run]) -> tuple[float, float]:
    """Return the share of the wall time and of the CPU time that the added images took, without what starting costs."""
    start, full, added = runs["unchanged"], runs["full"], runs["added"]
    return (
        (added.wall_s - start.wall_s) / (full.wall_s - start.wall_s),
        (added.cpu_s - start.cpu_s) / (full.cpu_s - start.cpu_s),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, with one folder per class")
    parser.add_argument("evaluation", type=Path, help="folder of evaluation images")
    parser.add_argument("--folder", type=Path, help="for the data; by default, a temporary folder")
    parser.add_argument("--images", dest="count", type=int, default=1000, help="number of originals")
    parser.add_argument("--each", type=int, default=30, help="number of copies, faults and leaks of each kind")
    parser.add_argument("--set", action="append", default=[], help="further setting of the curation, section.key=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        result = report(Path(name), given)
    (RESULTS / f"{result['date']}-curation-added.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(0 if result["all_right"] else 1)


if __name__ == "__main__":
    main()
