"""Measure duplicates, leaks and balance of curation on synthetic embeddings.

    python benchmarks/curation_scale.py [--vectors 100000 1000000] [--folder DIR]

The N vectors are unit vectors of 384 dimensions around N/100 motifs. The frequency of a motif falls off with its rank,
and the variance of the principal components falls off as 1/rank, as in image features. 5 % of the vectors are copies of
others (similarity 0.95 to 0.99). The evaluation set has N/100 vectors, and 1 % of the N vectors are copies of them.

    duplicates  find the 16 nearest others of each vector with the lists of `neighbours_above`, as the search for copies
                does. The comparison of patches, which then decides about these pairs, is not measured
    exact       (up to 100,000 vectors) the same by comparing all pairs, and the share that the lists have found
    leaks       find the copies of evaluation vectors among all pairs; write the certificate and verify it. A threshold
                on the similarity stands in for the comparison of patches, because there are no images
    balance     keep a quarter of the vectors by hierarchical k-means

Each part runs in a new process. The peak memory includes the pages of the mapped vectors. The script prints a table and
how time grows with N. The last line is the result as JSON, which is also written to benchmarks/results/.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from model.cpus import available_cpus
from training.curate.balance import balance
from training.curate.certificate import make_certificate, verify_certificate, write_certificate
from training.curate.leaks import find_leaks
from training.curate.neighbours import neighbours_above
from training.curate.table import Images
from training.curate.views import Views

RESULTS = Path(__file__).parent / "results"
D, SPREAD, CHUNK = 384, 0.5, 50_000
K = 16  # candidates of an image, for duplicates and for leaks
SIMILAR, COPY = 0.5, 0.94  # similarities from which a pair is a candidate for a leak, and from which it is a copy
COPIES, LEAKS = 0.05, 0.01
RECALL_UP_TO = 100_000
Row = dict[str, Any]


# ---- data


def make_data(folder: Path, n: int) -> None:
    """Write vectors.npy [n, D] and evaluation.npy [n / 100, D], and their true motifs and copies, to `folder`."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(D))
    scale = (scale / np.linalg.norm(scale)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    n_motifs = n // 100
    centres = rng.standard_normal((n_motifs, D), np.float32) * scale
    frequency = 1 / np.sqrt(1 + np.arange(n_motifs))
    motifs = rng.choice(n_motifs, n, p=frequency / frequency.sum())

    def sample(which: np.ndarray) -> np.ndarray:
        points = (centres[which] + SPREAD * rng.standard_normal((len(which), D), np.float32) * scale) @ rotation
        return points / np.linalg.norm(points, axis=1, keepdims=True)

    def edited(originals: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(originals.shape, np.float32)
        noise *= rng.uniform(0.14, 0.32, (len(noise), 1)).astype(np.float32) / D**0.5
        copies = originals + noise
        return copies / np.linalg.norm(copies, axis=1, keepdims=True)

    evaluation = sample(rng.choice(n_motifs, max(1, n // 100)))
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (n, D))
    for begin in range(0, n, CHUNK):
        vectors[begin : begin + CHUNK] = sample(motifs[begin : begin + CHUNK])
    chosen = rng.permutation(n)
    copies, originals, leaks = np.split(
        chosen[: round((2 * COPIES + LEAKS) * n)], [round(COPIES * n), round(2 * COPIES * n)]
    )
    copied = rng.integers(len(evaluation), size=len(leaks))
    vectors[copies], vectors[leaks] = edited(vectors[originals]), edited(evaluation[copied])
    motifs[copies] = motifs[originals]
    vectors.flush()
    np.save(folder / "evaluation.npy", evaluation)
    np.savez(folder / "truth.npz", motifs=motifs, copies=copies, originals=originals, leaks=leaks, copied=copied)


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, Any]:
    vectors = np.asarray(np.load(folder / "vectors.npy", mmap_mode="r"))  # a memmap is slow to index
    return vectors, np.load(folder / "evaluation.npy"), np.load(folder / "truth.npz")


def table(embedding: np.ndarray, name: str) -> Images:
    """Return a table whose other columns are random."""
    n = len(embedding)
    rng = np.random.default_rng(list(name.encode()))
    digests = rng.integers(256, size=(n, 32), dtype=np.uint8)
    ones = np.ones(n, np.int32)
    return Images(
        key=[f"{name}/{i:09}" for i in range(n)],
        sha256=digests,
        pixels_sha256=digests,
        phash=rng.integers(2**64, size=n, dtype=np.uint64),
        width=ones,
        height=ones,
        n_bytes=ones.astype(np.int64),
        label=[None] * n,
        measures={},
        embedding=embedding,
    )


def hashed(images: Images, rows: np.ndarray) -> SimpleNamespace:
    """Return what a certificate needs of these images. A copy of their embeddings would take another 1.5 GB."""
    return SimpleNamespace(key=[images.key[row] for row in rows], sha256=images.sha256[rows])


# ---- parts


def duplicates(folder: Path) -> Row:
    vectors, _, truth = load(folder)
    pairs = neighbours_above(vectors, vectors, -1, K, leave_one_out=True, exact=False)
    codes = pairs.query * len(vectors) + pairs.vector
    np.savez(folder / "pairs.npz", codes=codes)
    planted = np.isin(truth["copies"] * len(vectors) + truth["originals"], codes)
    return {"pairs": len(codes), "planted_recall": float(planted.mean())}


def exact(folder: Path) -> Row:
    vectors, _, _ = load(folder)
    pairs = neighbours_above(vectors, vectors, -1, K, leave_one_out=True, exact=True)
    by_lists = np.isin(pairs.query * len(vectors) + pairs.vector, np.load(folder / "pairs.npz")["codes"])
    bands = {}
    for low, high in ((-1, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        band = (pairs.score >= low) & (pairs.score < high)
        bands[f"from {low}"] = [int(band.sum()), float(by_lists[band].mean()) if band.any() else 1.0]
    return {"pairs": len(by_lists), "recall": float(by_lists.mean()), "pairs_and_recall_by_score": bands}


def leaks(folder: Path) -> Row:
    vectors, evaluation_vectors, truth = load(folder)
    images, evaluation = table(vectors, "image"), table(evaluation_vectors, "evaluation")
    views = Views.only_whole(evaluation)
    found = find_leaks(images, evaluation, views, lambda pairs: pairs.score >= COPY, threshold=SIMILAR, k=K)
    dropped = np.array([drop.index for drop in found.drops])
    kept, removed = (hashed(images, rows) for rows in (np.setdiff1d(np.arange(len(images)), dropped), dropped))
    certificate = make_certificate(
        kept, evaluation, found, removed=removed, model="synthetic", threshold=COPY, settings={}
    )
    write_certificate(folder / "certificate.json", certificate)
    verify_certificate(folder / "certificate.json", kept, evaluation=evaluation)
    planted = np.isin(truth["leaks"], dropped)
    return {
        "leaks": len(dropped),
        "planted_recall": float(planted.mean()),
        "certificate_mib": (folder / "certificate.json").stat().st_size / 2**20,
    }


def balanced(folder: Path) -> Row:
    vectors, _, truth = load(folder)
    kept = balance(vectors, len(vectors) // 4)
    n_motifs = len(vectors) // 100
    counts = [np.bincount(motifs, minlength=n_motifs) for motifs in (truth["motifs"], truth["motifs"][kept])]
    frequent = np.argsort(-counts[0])[: n_motifs // 10]
    return {
        "kept": len(kept),
        "share_of_the_tenth_that_was_most_frequent": [float(c[frequent].sum() / c.sum()) for c in counts],
        "motifs_without_an_image": [int((c == 0).sum()) for c in counts],
    }


PARTS: dict[str, Callable[[Path], Row]] = {
    "duplicates": duplicates,
    "exact": exact,
    "leaks": leaks,
    "balance": balanced,
}


def measured(part: str, folder: Path) -> Row:
    """Run a part in this process, and return its result with the time, the CPU time and the peak memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = PARTS[part](folder)
    return {
        "part": part,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **result,
    }


def fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, which then exits and frees its memory. Return the result of the function."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def run(folder: Path, n: int, parts: list[str]) -> list[Row]:
    fresh(make_data, folder, n)
    rows = []
    for part in parts:
        if part == "exact" and n > RECALL_UP_TO:
            continue
        row = {"vectors": n, **fresh(measured, part, folder)}
        figures = f"{row['seconds']:8.1f} s {row['cpu_seconds']:8.1f} CPU s {row['peak_gib']:6.2f} GiB"
        extra = dict(list(row.items())[5:])
        print(f"{n:>9,} {part:<10} {figures}   {json.dumps(extra)}", flush=True)
        rows.append(row)
    return rows


def print_scaling(rows: list[Row]) -> None:
    """Print by which power of N the CPU time grows between two sizes, and the sums of each size."""
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        for small, large in pairwise(mine):
            factor, ratio = large["vectors"] / small["vectors"], large["cpu_seconds"] / small["cpu_seconds"]
            print(
                f"{part}: {factor:g} times the vectors take {ratio:.1f} times the CPU time, N^{log(ratio, factor):.2f}"
            )
    for n in dict.fromkeys(row["vectors"] for row in rows):
        mine = [row for row in rows if row["vectors"] == n and row["part"] != "exact"]
        minutes, cpu = (sum(row[key] for row in mine) / 60 for key in ("seconds", "cpu_seconds"))
        peak = max(row["peak_gib"] for row in mine)
        print(f"{n:,} vectors: {minutes:.1f} minutes, {cpu:.1f} CPU minutes, at most {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="for the data; by default, a temporary folder")
    arguments = parser.parse_args()
    load_average = os.getloadavg()[0]
    rows: list[Row] = []
    for n in sorted(arguments.vectors):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += run(Path(folder), n, arguments.parts)
    print_scaling(rows)
    result = {
        "benchmark": "curation_scale",
        "date": datetime.date.today().isoformat(),
        "cpus": available_cpus(),
        "load_average_at_the_start": load_average,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-curation-scale.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
