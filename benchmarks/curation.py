"""Measure how well copies, leaks and faulty images of a planted set are found, beside imagededup and CleanVision.

    python benchmarks/planted_set.py IMAGES SET --evaluation FOLDER
    python benchmarks/curation.py SET... [--model ARTIFACT] [--pooling cls+mean] [--neighbours 16] [--jobs 1]
        [--out FILE]

Each SET is a set that `planted_set.py` made. The figures of several sets are pooled. Tools that are not installed are
left out (`pip install imagededup cleanvision`). imagededup's network is not measured, because it downloads its weights;
its four hashes are. All tools measure a set in one process with one thread, and get only the files that can be decoded.

Recall: the share of the copies of a kind that a tool reports together with another image of the same origin.
Precision: the share of the pairs that a tool reports with a copy of that kind in which both have the same origin.
The intervals are those of Clopper and Pearson, two-sided, 95 %.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.planted_set import COPIES, FAULTS
from model.artifact import bundled_artifact
from model.decode import DecodeError, Pixels, decode, decode_stored, upright
from model.pooling import POOLINGS, Pooling
from training.curate.copies.find import CopySettings, find_copies
from training.curate.copies.hashes import perceptual_hash
from training.curate.copies.verify import PairComparison
from training.curate.embedding import Embedder
from training.curate.leaks import find_leaks
from training.curate.neighbours import Pairs
from training.curate.quality import find_issues, measure
from training.curate.scan import pixels_digest
from training.curate.settings import LeaksSection
from training.curate.table import Images
from training.curate.views import Views, crops, mixture_hashes

RESULTS = Path(__file__).parent / "results"
KINDS = ("exact", "repeated", *COPIES)
LISTED = 20
"""The largest number of wrong pairs and of missed copies of a kind that are listed for each set."""
Pair = tuple[str, str]


class PlantedSet:
    """A planted set on disk, and its ground truth."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = json.loads((folder / "truth.json").read_text())["files"]

    def names(self, part: str) -> list[str]:
        return [name for name in self.files if name.startswith(part + "/")]

    def kind(self, name: str) -> str:
        kind: str = self.files[name]["kind"]
        return kind

    def origin(self, name: str) -> str:
        """Return the image that this image was made from, or the image itself."""
        return self.files[name]["of"] or name

    def label(self, name: str) -> str:
        """Return the name of an image with its set, its kind and what it was made from, for lists in the result."""
        entry = self.files[name]
        return f"{self.folder.name}/{name} ({entry['kind']} of {Path(name).parent.name}/{entry['made_from']})"

    def read(self, name: str) -> Pixels:
        return decode((self.folder / name).read_bytes())


@dataclass
class Result:
    """What a tool reports, and the CPU time and the time on the clock that it takes, in seconds."""

    pairs: set[Pair]
    cpu_s: float
    wall_s: float


def timed(work: Callable[[], set[Pair]]) -> Result:
    cpu, wall = time.process_time(), time.perf_counter()
    pairs = work()
    return Result(pairs, time.process_time() - cpu, time.perf_counter() - wall)


# Ours


class Scan:
    """The table of the readable images of a part of the set. `broken` has the names of the others."""

    def __init__(self, planted: PlantedSet, part: str, embed: Embedder) -> None:
        self.names: list[str] = []
        self.broken: list[str] = []
        rows: list[tuple[Any, ...]] = []
        measures: list[dict[str, float]] = []
        for name in sorted(planted.names(part)):
            data = (planted.folder / name).read_bytes()
            try:
                stored = decode_stored(data)
            except DecodeError:
                self.broken.append(name)
                continue
            pixels = np.ascontiguousarray(upright(stored.rgb, stored.orientation))
            size = pixels.shape[1], pixels.shape[0], len(data)
            digests = hashlib.sha256(data).digest(), pixels_digest(pixels)
            rows.append((*digests, perceptual_hash(pixels), *size, embed(pixels)))
            measures.append(measure(pixels, stored.mode))
            self.names.append(name)
        sha, pixels_sha, hashes, width, height, n_bytes, vectors = zip(*rows, strict=True)
        self.images = Images(
            key=self.names,
            sha256=np.frombuffer(b"".join(sha), np.uint8).reshape(-1, 32),
            pixels_sha256=np.frombuffer(b"".join(pixels_sha), np.uint8).reshape(-1, 32),
            phash=np.array(hashes, np.uint64),
            width=np.array(width, np.int32),
            height=np.array(height, np.int32),
            n_bytes=np.array(n_bytes, np.int64),
            label=[None] * len(rows),
            measures={key: np.array([row[key] for row in measures], np.float32) for key in measures[0]},
            embedding=np.stack(vectors).astype(np.float32),
        )


class Counted:
    """A comparison that counts its pairs."""

    def __init__(self, compare: PairComparison) -> None:
        self._compare, self.pairs = compare, 0

    def __call__(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.pairs += len(first)
        return self._compare(first, second)


def our_copies(planted: PlantedSet, scan: Scan, settings: CopySettings) -> tuple[Result, int]:
    """Return the dropped images with the images that are kept for them, and the number of pairs compared."""

    def read(index: int) -> Pixels:
        return planted.read(scan.names[index])

    compare = Counted(PairComparison(read))

    def work() -> set[Pair]:
        drops = find_copies(scan.images, read, settings, compare=compare)
        return {(scan.names[drop.index], scan.names[drop.because]) for drop in drops if drop.because is not None}

    return timed(work), compare.pairs


def our_leaks(
    planted: PlantedSet, scan: Scan, evaluation: Scan, embed: Embedder, settings: CopySettings
) -> tuple[Result, list[Pair]]:
    """Return the pairs of an image and an evaluation image that were verified as copies, and the dropped images.

    The candidates are those of `dinov2 curate`. The pairs do not contain identical images, which need no verification.
    """
    defaults = LeaksSection.model_validate({})
    compare = PairComparison(
        lambda index: planted.read(scan.names[index]), lambda index: planted.read(evaluation.names[index])
    )
    dropped: list[Pair] = []
    pairs: set[Pair] = set()

    def verify(candidates: Pairs) -> npt.NDArray[np.bool_]:
        copies = compare(candidates.query, candidates.vector) >= min(settings.threshold, defaults.threshold)
        for image, number in zip(candidates.query[copies].tolist(), candidates.vector[copies].tolist(), strict=True):
            pairs.add((scan.names[image], evaluation.names[number]))
        return copies

    def work() -> set[Pair]:
        pixels = [planted.read(name) for name in evaluation.names]
        embedding = np.stack([np.stack([embed(crop) for crop in crops(image)]) for image in pixels])
        whole = Views.only_whole(evaluation.images)
        found = find_leaks(
            scan.images,
            evaluation.images,
            Views(
                np.concatenate((whole.embedding, embedding), axis=1),
                np.concatenate((whole.phash, np.stack([mixture_hashes(image) for image in pixels])), axis=1),
            ),
            verify,
            threshold=defaults.similarity,
            k=defaults.candidates,
            hash_bits=defaults.hash_bits,
        )
        dropped.extend((scan.names[drop.index], drop.reason) for drop in found.drops)
        return pairs

    return timed(work), dropped


# Others


def imagededup_copies(planted: PlantedSet, names: list[str]) -> dict[str, Result]:
    """Return the pairs that each of imagededup's hashes reports at its default threshold."""
    for module, name in (("imagededup.methods.cnn", "CNN"), ("imagededup.utils.models", "CustomModel")):
        stub = types.ModuleType(module)  # they need torchvision and weights from the internet
        setattr(stub, name, None)
        sys.modules.setdefault(module, stub)
    try:
        from imagededup.methods import AHash, DHash, PHash, WHash
    except ImportError as error:
        print(f"imagededup is left out: {error}")
        return {}

    def pairs(method: Any) -> set[Pair]:
        encodings = {name: method.encode_image(image_file=planted.folder / name) for name in names}
        found = method.find_duplicates(
            encoding_map={name: code for name, code in encodings.items() if code}, num_dist_workers=0
        )
        return {(name, other) for name, others in found.items() for other in others}

    methods = [method(verbose=False) for method in (PHash, DHash, WHash, AHash)]
    return {f"imagededup {type(method).__name__}": timed(partial(pairs, method)) for method in methods}


def cleanvision_issues(planted: PlantedSet, names: list[str]) -> tuple[Result, dict[str, set[str]]] | None:
    """Return the pairs of duplicates that CleanVision reports, and the images with each other issue."""
    try:
        from cleanvision import Imagelab
    except ImportError as error:
        print(f"CleanVision is left out: {error}")
        return None
    lab = Imagelab(filepaths=[str(planted.folder / name) for name in names])

    def work() -> set[Pair]:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            lab.find_issues(n_jobs=1, verbose=False)
        groups = [group for kind in ("exact_duplicates", "near_duplicates") for group in lab.info[kind]["sets"]]
        relative = [[Path(path).relative_to(planted.folder).as_posix() for path in group] for group in groups]
        return {(a, b) for group in relative for a in group for b in group if a != b}

    result = timed(work)
    issues: dict[str, set[str]] = {}
    for column in (column for column in lab.issues.columns if column.endswith("_issue")):
        flagged = lab.issues.index[lab.issues[column]]
        issues[column.removeprefix("is_").removesuffix("_issue")] = {
            Path(path).relative_to(planted.folder).as_posix() for path in flagged
        }
    return result, issues


# Scores


def copy_scores(planted: PlantedSet, result: Result, names: list[str]) -> dict[str, Any]:
    """Return the numbers of copies and pairs of each kind, and over all pairs, from which `ratios` follow."""
    partners: dict[str, set[str]] = defaultdict(set)
    for first, second in result.pairs:
        partners[first].add(second)
        partners[second].add(first)
    scores: dict[str, Any] = {}
    for kind in KINDS:
        copies = [name for name in names if planted.kind(name) == kind]
        pairs = [(name, other) for name in copies for other in partners[name]]
        right = [pair for pair in pairs if planted.origin(pair[0]) == planted.origin(pair[1])]
        found = {name for name, _ in right}
        scores[kind] = {
            "copies": len(copies),
            "found": len(found),
            "pairs": len(pairs),
            "right": len(right),
            "missed": [planted.label(name) for name in copies if name not in found][:LISTED],
        }
    unordered = {tuple(sorted(pair)) for pair in result.pairs}
    wrong = [pair for pair in unordered if planted.origin(pair[0]) != planted.origin(pair[1])]
    scores["all"] = {
        "pairs": len(unordered),
        "right": len(unordered) - len(wrong),
        "wrong": [[planted.label(name) for name in pair] for pair in sorted(wrong)[:LISTED]],
        "cpu_s": result.cpu_s,
        "wall_s": result.wall_s,
    }
    return scores


def leak_scores(planted: PlantedSet, result: Result, dropped: list[Pair], names: list[str]) -> dict[str, Any]:
    """Return how many leaks of each kind there are and were not found, and the images that were taken for leaks.

    A dropped image is right if it is a leak.
    """
    found = {name for name, _ in dropped}
    leaks = [name for name in names if planted.kind(name).startswith("leak_")]
    kinds = sorted({planted.kind(name) for name in leaks})
    wrong_pairs = sorted(pair for pair in result.pairs if planted.origin(pair[0]) != pair[1])
    return {
        "leaks": len(leaks),
        "left": {kind: sum(planted.kind(name) == kind and name not in found for name in leaks) for kind in kinds},
        "missed": [planted.label(name) for name in leaks if name not in found],
        "wrong": [[planted.label(name), why] for name, why in dropped if name not in set(leaks)],
        "wrong_pairs": [[planted.label(name) for name in pair] for pair in wrong_pairs],
        "cpu_s": result.cpu_s,
        "wall_s": result.wall_s,
    }


def fault_scores(planted: PlantedSet, issues: dict[str, set[str]], names: list[str]) -> dict[str, Any]:
    """Return how many blurred and dark images were found, and how many originals have the issue, too."""
    issue_of = dict(zip(FAULTS, ("blurry", "dark"), strict=True))
    return {
        kind: {
            "images": sum(planted.kind(name) == kind for name in names),
            "found": sum(planted.kind(name) == kind for name in issues.get(issue, ())),
            "originals": sum(planted.kind(name) == "original" for name in issues.get(issue, ())),
        }
        for kind, issue in issue_of.items()
    }


def report(folder: Path, model: Path, pooling: Pooling, settings: CopySettings) -> dict[str, Any]:
    """Run all tools on a set, and return their figures."""
    planted = PlantedSet(folder)
    with tempfile.TemporaryDirectory() as cache:
        embed = Embedder(model, pooling, Path(cache))
    start = time.process_time()
    scan = Scan(planted, "images", embed)
    scan_s = time.process_time() - start
    evaluation = Scan(planted, "evaluation", embed) if planted.names("evaluation") else None
    truncated = [name for name in planted.names("images") if planted.kind(name) == "truncated"]
    copies, compared = our_copies(planted, scan, settings)
    flags = find_issues(scan.images)
    issues = {issue: {scan.names[image] for image in np.flatnonzero(of).tolist()} for issue, of in flags.items()}
    figures: dict[str, Any] = {
        "images": len(planted.names("images")),
        "scan_cpu_s": scan_s,
        "pairs_compared": compared,
        "truncated": {"images": len(truncated), "found": len(set(truncated) & set(scan.broken))},
        "other_broken": sorted(set(scan.broken) - set(truncated)),
        "copies": {"ours": copy_scores(planted, copies, scan.names)},
        "faults": {"ours": fault_scores(planted, issues, scan.names)},
    }
    if evaluation is not None:
        figures["leaks"] = leak_scores(planted, *our_leaks(planted, scan, evaluation, embed, settings), scan.names)
    for name, result in imagededup_copies(planted, scan.names).items():
        figures["copies"][name] = copy_scores(planted, result, scan.names)
    if (peer := cleanvision_issues(planted, scan.names)) is not None:
        figures["copies"]["CleanVision"] = copy_scores(planted, peer[0], scan.names)
        figures["faults"]["CleanVision"] = fault_scores(planted, peer[1], scan.names)
    return figures


# The result


def pooled(values: list[Any]) -> Any:
    """Return the sums of numbers, the joined lists, and dictionaries of these, of the figures of several sets."""
    if isinstance(values[0], dict):
        return {key: pooled([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    total = sum(values)
    return total if isinstance(total, int) else round(total, 2)


def with_ratios(scores: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a tool for each kind with recall and precision and their intervals."""
    full: dict[str, Any] = {}
    for kind, of in scores.items():
        full[kind] = dict(of)
        for name, part, whole in (("recall", "found", "copies"), ("precision", "right", "pairs")):
            if of.get(whole):
                interval = binomtest(of[part], of[whole]).proportion_ci(method="exact")
                full[kind][name] = of[part] / of[whole]
                full[kind][f"{name}_95"] = [round(interval.low, 4), round(interval.high, 4)]
    return full


def show(figures: dict[str, Any]) -> None:
    """Print the table of recall and precision per kind and tool."""
    for tool, scores in figures["copies"].items():
        cells = [
            f"{kind} {_ratio(scores[kind], 'recall')}, {_ratio(scores[kind], 'precision')}"
            for kind in KINDS
            if scores[kind]["copies"]
        ]
        whole = scores["all"]
        print(f"{tool} (recall, precision): {'; '.join(cells)}; all pairs {_ratio(whole, 'precision')}; ", end="")
        print(f"{whole['cpu_s']} s CPU")
    for part in ("leaks", "truncated", "faults"):
        if part in figures:
            print(part, json.dumps(figures[part]))


def _ratio(scores: dict[str, Any], name: str) -> str:
    return f"{scores[name]:.3f} (from {scores[name + '_95'][0]:.3f})" if name in scores else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, nargs="+", metavar="SET", help="folder of a planted set")
    parser.add_argument("--model", type=Path, default=bundled_artifact(), help="folder of an artifact")
    parser.add_argument("--pooling", default="cls+mean", choices=POOLINGS)
    parser.add_argument("--neighbours", type=int, default=CopySettings().neighbours)
    parser.add_argument("--jobs", type=int, default=1, help="number of sets that are measured at the same time")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{datetime.date.today()}-curation.json")
    given = parser.parse_args()
    settings = CopySettings(neighbours=given.neighbours)
    measure_set = partial(report, model=given.model, pooling=given.pooling, settings=settings)
    with ProcessPoolExecutor(given.jobs) as processes:
        figures = pooled(list(processes.map(measure_set, given.sets)))
    figures["copies"] = {tool: with_ratios(scores) for tool, scores in figures["copies"].items()}
    show(figures)
    sets = [json.loads((folder / "truth.json").read_text()) for folder in given.sets]
    sizes = [{key: value for key, value in truth.items() if key != "files"} for truth in sets]
    result = {"pooling": given.pooling, **vars(settings), "sets": sizes, **figures}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
