"""Compare the quality checks of `dinov2 curate` with CleanVision's: verdicts image by image, and time.

    pip install cleanvision
    OPENBLAS_NUM_THREADS=1 python benchmarks/quality_peers.py IMAGES [--edited 300] [--rounds 3] [--seed 0]

The set consists of all images in the folder IMAGES and of edited copies: `--edited` images, drawn with the seed, for
each kind of edit. Edits have a random strength from weak to extreme, so that many images are close to the limits of the
checks. The set is written to a temporary folder.

Both programs read the files, decode them and run all nine checks, first in one process with one thread, and then in as
many processes as the machine has CPUs, which is the default of both. They take turns. Our time contains what the scan
does for the checks: decoding, the measures, the hash of the pixels, the perceptual hash. CPU time, which includes that
of child processes, is compared beside the time on the clock, because it depends less on other work of the machine.

An image agrees if all nine verdicts are equal. The result lists up to 20 images that do not.
"""

import argparse
import contextlib
import datetime
import functools
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanvision import Imagelab, __version__
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.cpus import available_cpus
from model.decode import decode, decode_stored, upright
from model.folder import walk
from training.curate import quality
from training.curate.copies.hashes import perceptual_hash
from training.curate.scan import pixels_digest
from training.curate.table import Images
from training.watch.flops import describe_device

RESULTS = Path(__file__).parent / "results"
CHUNK = 16  # files that a process gets at once
PEER, PEER_PROCESSES = "cleanvision in one process", "cleanvision in its default processes"
OURS, OUR_PROCESSES = "ours in one process", "ours in the same number of processes"
Verdicts = dict[str, np.ndarray]  # name of the check -> [n] bool


def blurred(image: Image.Image, strength: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(strength**2 * max(image.size) / 6))


def darkened(image: Image.Image, strength: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 - strength)


def brightened(image: Image.Image, strength: float) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, "white"), strength**0.3)


def flattened(image: Image.Image, strength: float) -> Image.Image:
    """Reduce the image to few tones, at most 16."""
    return ImageOps.posterize(image, 1 + round(3 * (1 - strength))).convert("L").quantize(16).convert("RGB")


def strip(image: Image.Image, strength: float) -> Image.Image:
    width = max(int(image.width * (1 - 0.9 * strength)), 9)
    return image.crop((0, 0, width, image.height))


def resized(image: Image.Image, strength: float) -> Image.Image:
    factor = 0.1 * 40**strength
    return image.resize((max(int(image.width * factor), 9), max(int(image.height * factor), 9)))


def plain(image: Image.Image, strength: float) -> Image.Image:
    """Put a small copy of the image on a plain ground."""
    ground = Image.new("RGB", image.size, (int(255 * strength),) * 3)
    ground.paste(image.resize((max(image.width // 6, 1), max(image.height // 6, 1))), (0, 0))
    return ground


EDITS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "blurred": blurred,
    "dark": darkened,
    "bright": brightened,
    "few-tones": flattened,
    "strip": strip,
    "resized": resized,
    "plain": plain,
    "gray": lambda image, strength: ImageEnhance.Contrast(image.convert("L")).enhance(2 * strength),
    "gray-blurred": lambda image, strength: blurred(image.convert("L"), strength),
    "copy": lambda image, strength: image,
}


def write_set(images: list[Path], folder: Path, n_edited: int, seed: int) -> list[Path]:
    """Write the images and the edited copies to a folder, and return their paths, sorted.

    Half of the edited copies are JPEGs, and half are PNGs.
    """
    draw = np.random.default_rng(seed)
    for i, path in enumerate(images):
        (folder / f"original-{i:05d}{path.suffix.lower()}").write_bytes(path.read_bytes())
    for kind, edit in EDITS.items():
        for i in sorted(draw.choice(len(images), min(n_edited, len(images)), replace=False).tolist()):
            edited = edit(Image.fromarray(decode(images[i].read_bytes())), float(draw.random()))
            if draw.random() < 0.5:
                edited.save(folder / f"{kind}-{i:05d}.jpg", quality=int(draw.integers(30, 96)))
            else:
                edited.save(folder / f"{kind}-{i:05d}.png", compress_level=1)
    return sorted(path for path in folder.iterdir())


def their_verdicts(paths: list[Path], processes: int | None = 1) -> Verdicts:
    """Run CleanVision on the files. If `processes` is None, CleanVision chooses the number of processes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        lab = Imagelab(filepaths=[str(path) for path in paths])
        lab.find_issues(n_jobs=processes, verbose=False)
    table = lab.issues.loc[[str(path) for path in paths]]
    return {name: table[f"is_{name}_issue"].to_numpy(bool) for name in quality.ISSUES}


def measured(path: Path) -> tuple[int, int, bytes, int, int, dict[str, float]]:
    """Do what the scan does for the checks of one file."""
    data = path.read_bytes()
    stored = decode_stored(data)
    image = upright(stored.rgb, stored.orientation)
    pixels = np.ascontiguousarray(image)
    height, width = pixels.shape[:2]
    gray = np.asarray(image.convert("L"))
    measures = quality.measure(pixels, stored.mode, image, gray)
    return width, height, pixels_digest(pixels), perceptual_hash(gray), len(data), measures


def our_verdicts(paths: list[Path], processes: int = 1) -> Verdicts:
    """Do what the scan and the quality stage do for the checks."""
    if processes == 1:
        rows = list(map(measured, paths))
    else:
        with multiprocessing.get_context("fork").Pool(processes) as pool:  # as CleanVision starts its processes
            rows = pool.map(measured, paths, CHUNK)
    digests = np.frombuffer(b"".join(row[2] for row in rows), np.uint8).reshape(-1, 32)
    table = Images(
        key=[path.name for path in paths],
        sha256=digests,
        pixels_sha256=digests,
        phash=np.array([row[3] for row in rows], np.uint64),
        width=np.array([row[0] for row in rows], np.int32),
        height=np.array([row[1] for row in rows], np.int32),
        n_bytes=np.array([row[4] for row in rows], np.int64),
        label=[None] * len(rows),
        measures={name: np.array([row[5][name] for row in rows], np.float32) for name in quality.MEASURES},
        embedding=np.zeros((len(rows), 1), np.float32),
    )
    return quality.find_issues(table)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its child processes that have ended."""
    return sum(os.times()[:4])


def timed(check: Callable[[list[Path]], Verdicts], paths: list[Path]) -> tuple[Verdicts, dict[str, float]]:
    cpu, wall = cpu_seconds(), time.perf_counter()
    verdicts = check(paths)
    return verdicts, {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall}


def compare(paths: list[Path], theirs: Verdicts, ours: Verdicts) -> dict[str, Any]:
    """Count equal verdicts per check, and images with nine equal verdicts, per kind of edit and in total."""
    equal = np.stack([theirs[name] == ours[name] for name in quality.ISSUES], axis=1).all(axis=1)
    kinds = np.array([path.name.split("-0")[0] for path in paths])
    return {
        "agreement": float(equal.mean()),
        "per_kind": {kind: [int(equal[kinds == kind].sum()), int((kinds == kind).sum())] for kind in np.unique(kinds)},
        "per_check": {
            name: {
                "cleanvision": int(theirs[name].sum()),
                "ours": int(ours[name].sum()),
                "different": int((theirs[name] != ours[name]).sum()),
            }
            for name in quality.ISSUES
        },
        "different": [
            {"image": paths[i].name, "checks": [name for name in quality.ISSUES if theirs[name][i] != ours[name][i]]}
            for i in np.flatnonzero(~equal)[:20].tolist()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--edited", type=int, default=300, help="edited copies of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    images = [Path(listed.path) for listed in walk(options.images) if listed.is_image]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_set(images, Path(folder), options.edited, options.seed)
        programs: dict[str, Callable[[list[Path]], Verdicts]] = {
            PEER: their_verdicts,
            OURS: our_verdicts,
            PEER_PROCESSES: functools.partial(their_verdicts, processes=None),
            OUR_PROCESSES: functools.partial(our_verdicts, processes=available_cpus()),
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        verdicts: dict[str, Verdicts] = {}
        for _ in range(options.rounds):
            for name, check in programs.items():
                verdicts[name], spent = timed(check, paths)
                times[name].append(spent)
        result = compare(paths, verdicts[PEER], verdicts[OURS])
    for peer, ours in ((PEER, OURS), (PEER_PROCESSES, OUR_PROCESSES), (PEER_PROCESSES, OURS)):
        for unit in ("cpu_s", "wall_s"):
            pairs = zip(times[peer], times[ours], strict=True)
            ratio = statistics.median(their[unit] / our[unit] for their, our in pairs)
            result[f"{peer} / {ours}: {unit}"] = round(ratio, 2)
    result |= {"images": len(paths), "times": times, "cleanvision": __version__, "seed": options.seed}
    result |= {"machine": describe_device(torch.device("cpu")), "date": datetime.datetime.now(datetime.UTC).isoformat()}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
