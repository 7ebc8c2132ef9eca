"""Measure the classification of the Grocery Store images, and whether `unknown` has the requested error rate.

    python benchmarks/classify_unknown.py --data GROCERY

GROCERY contains `train/` and `val/`, with one folder per class. The features are those of an artifact, by default the
bundled one. They are kept in a file, so a second run does not compute them again. All results are computed by the
functions that `POST /v1/classify` uses, with the embedded vector store.

Each repetition holds out 20 classes, chosen at random among those of val. Images of these classes should be unknown.
The coverage is the share of the test images of the other classes that are not called unknown. There are three
protocols:

- one source: the train and val images are shuffled. Three quarters are the collection, and the rest is the test set.
- other shops, leave-one-out: train is the collection and val is the test set. The two are from different shops, and
  train contains series of images of the same object, so collection and test set are not exchangeable.
- other shops, held out: as before, but two thirds of the val images are used for the calibration (with the option
  `calibration_filter`), and the last third is the test set.

The script also measures the accuracy of k-NN and of prototypes on val, other scores and class-wise calibration, and the
time that the endpoint adds to a forward pass. It prints the results and writes them to benchmarks/results/.
"""

import argparse
import asyncio
import base64
import datetime
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from model.artifact import Artifact, bundled_artifact, load_artifact
from model.decode import DecodeLimits
from model.engines.choice import load_engine
from service.app import create_app
from service.ingest.embed import embed_files, find_files
from service.ingest.index import vector_tag
from service.retrieval.calibration import Reference, calibrate
from service.retrieval.classify import Classified, classify_by_collection, classify_by_examples
from service.search.embedded import open_embedded
from service.search.filters import In
from service.search.store import Item, VectorStore
from service.settings import load_settings
from service.shared_results import SharedResults
from service.vision.conformal import p_values

ERROR_RATES = (0.10, 0.05, 0.01)
HELD_OUT_CLASSES = 20
KS = (1, 5, 10, 20)
SHOTS = (1, 2, 3, 5, 10)
SERIES = 11
TAG = "benchmark"
HELD_OUT = In(("split",), ("calibration",))
Floats = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Images:
    """The vectors [n, D] of all images, of length 1, with each image's class, split (train or val) and number. Images
    of a class whose numbers are close often show the same object."""

    vectors: Floats
    labels: Floats
    splits: Floats
    numbers: Floats

    @property
    def val_classes(self) -> list[str]:
        return sorted(set(self.labels[self.splits == "val"].tolist()))


def load_images(data: Path, artifact: Artifact, kept: Path) -> Images:
    """Compute the vectors of all images, or read them from a file in the folder `kept`."""
    path = kept / f"{artifact.manifest.name}-{artifact.fingerprint[:8]}.npz"
    if not path.exists():
        files = find_files([data / "train", data / "val"])
        engine = load_engine(artifact, "auto")
        limits = DecodeLimits(max_bytes=20 * 2**20, max_pixels=50_000_000)
        done, vectors, _ = embed_files(files, artifact, engine, pooling="cls", normalize=True, limits=limits)
        kept.mkdir(parents=True, exist_ok=True)
        names = [str(file.relative_to(data)) for file in done]
        np.savez(path, vectors=np.stack(vectors), names=names)
    stored = np.load(path)
    files = [Path(name) for name in stored["names"]]
    labels, splits = (np.array([file.parts[i] for file in files]) for i in (1, 0))
    return Images(stored["vectors"], labels, splits, np.array([int(file.stem.split("_")[-1]) for file in files]))


# Coverage of known images


@dataclass(frozen=True)
class Round:
    """The rows of one repetition: the collection, the held-out calibration items, and the known and unknown test
    images."""

    collection: Floats
    calibration: Floats
    known: Floats
    unknown: Floats


def one_source(images: Images, rng: np.random.Generator) -> Round:
    is_known = _known(images, rng)
    shuffled = rng.permutation(np.flatnonzero(is_known))
    cut = 3 * len(shuffled) // 4
    return Round(shuffled[:cut], shuffled[:0], shuffled[cut:], np.flatnonzero(~is_known))


def other_shops(images: Images, rng: np.random.Generator, *, held_out: bool) -> Round:
    is_known, is_val = _known(images, rng), images.splits == "val"
    val = rng.permutation(np.flatnonzero(is_known & is_val))
    cut = 2 * len(val) // 3 if held_out else 0
    return Round(np.flatnonzero(is_known & ~is_val), val[:cut], val[cut:], np.flatnonzero(~is_known & is_val))


def _known(images: Images, rng: np.random.Generator) -> Floats:
    chosen = rng.choice(images.val_classes, HELD_OUT_CLASSES, replace=False)
    return ~np.isin(images.labels, chosen)


async def collection_of(store: VectorStore, images: Images, rows: Round) -> None:
    """Replace the collection `c`."""
    if any(info.name == "c" for info in await store.collections()):
        await store.drop("c")
    for split, numbers in (("reference", rows.collection), ("calibration", rows.calibration)):
        items = [
            Item(f"{split}{n}", images.vectors[n], {"class": str(images.labels[n]), "split": split}) for n in numbers
        ]
        if items:
            await store.upsert("c", items, tag=TAG)


async def measure_coverage(
    store: VectorStore, images: Images, make: Callable[[], Round], repeats: int, k: int
) -> dict[str, Any]:
    """Return the mean coverage for each error rate, with its standard error, the AUROC and the closed-set accuracy."""
    coverages: dict[float, list[float]] = {rate: [] for rate in ERROR_RATES}
    found: dict[float, list[float]] = {rate: [] for rate in ERROR_RATES}
    aurocs, accuracies, items = [], [], []
    for _ in range(repeats):
        rows = make()
        await collection_of(store, images, rows)
        reference = Reference(("class",), k, held_out=HELD_OUT if len(rows.calibration) else None)
        answer = await _classified(store, images.vectors[np.concatenate([rows.known, rows.unknown])], reference)
        p = np.array([verdict.p_value for verdict in answer.verdicts])
        kth = np.array([(verdict.neighbours or ())[-1].score for verdict in answer.verdicts])
        count = len(rows.known)
        for rate in ERROR_RATES:
            coverages[rate].append(float(np.mean(p[:count] > rate)))
            found[rate].append(float(np.mean(p[count:] <= rate)))
        aurocs.append(auroc(kth[:count], kth[count:]))
        best = [verdict.scores[0].label for verdict in answer.verdicts[:count]]
        accuracies.append(float(np.mean(np.array(best) == images.labels[rows.known])))
        items.append(len(answer.calibration.scores))
    return {
        "repeats": repeats,
        "k": k,
        "calibration_items": round(statistics.mean(items)),
        "known_tests": count,
        "unknown_tests": len(rows.unknown),
        "coverage": {f"{1 - rate:.2f}": _mean(coverages[rate]) for rate in ERROR_RATES},
        "coverage_standard_error": {f"{1 - rate:.2f}": _error(coverages[rate]) for rate in ERROR_RATES},
        "unknown_found": {f"{1 - rate:.2f}": _mean(found[rate]) for rate in ERROR_RATES},
        "auroc": _mean(aurocs),
        "closed_set_accuracy": _mean(accuracies),
    }


async def _classified(store: VectorStore, vectors: Floats, reference: Reference) -> Classified:
    return await classify_by_collection(store, SharedResults(), await store.info("c"), vectors, reference, 0.05)


def auroc(known: Floats, unknown: Floats) -> float:
    """Return the probability that a known image has a higher score than an unknown one. Equal scores count half."""
    ordered = np.sort(unknown)
    lower, not_higher = (np.searchsorted(ordered, known, side=side) for side in ("left", "right"))
    return float(np.mean((lower + not_higher) / 2) / len(unknown))


def _mean(values: Sequence[float]) -> float:
    return round(statistics.mean(values), 4)


def _error(values: Sequence[float]) -> float:
    return round(statistics.stdev(values) / len(values) ** 0.5, 4)


# Accuracy, and other ways to score


async def knn_accuracy(store: VectorStore, images: Images) -> dict[str, float]:
    """Return the accuracy of k-NN on val, with the train images as neighbours."""
    train, val = (np.flatnonzero(images.splits == split) for split in ("train", "val"))
    await collection_of(store, images, Round(train, val[:0], val, val[:0]))
    accuracies = {}
    for k in KS:
        answer = await _classified(store, images.vectors[val], Reference(("class",), k))
        best = np.array([verdict.scores[0].label for verdict in answer.verdicts])
        accuracies[str(k)] = round(float(np.mean(best == images.labels[val])), 4)
    return accuracies


def few_shot(images: Images, rng: np.random.Generator, repeats: int) -> dict[str, dict[str, float]]:
    """Return the accuracy on val of prototypes and of the nearest example, and the coverage at 95 % of the val images
    and of other train images. The classes are those of val, and the examples are random train images."""
    results = {}
    for shots in SHOTS:
        runs = []
        for _ in range(repeats):
            chosen, rest = [], []
            for name in images.val_classes:
                rows = rng.permutation(np.flatnonzero((images.labels == name) & (images.splits == "train")))
                chosen += rows[:shots].tolist()
                rest += rows[shots : shots + 5].tolist()
            val = np.flatnonzero(images.splits == "val")
            examples, names = images.vectors[chosen], images.labels[chosen].tolist()
            answers = [classify_by_examples(examples, names, images.vectors[rows], 0.05) for rows in (val, rest)]
            best = [np.array([verdict.scores[0].label for verdict in answer.verdicts]) for answer in answers]
            nearest = images.labels[chosen][(images.vectors[val] @ examples.T).argmax(axis=1)]
            known = [np.mean([not verdict.unknown for verdict in answer.verdicts]) for answer in answers]
            runs.append(
                (
                    np.mean(best[0] == images.labels[val]),
                    np.mean(nearest == images.labels[val]),
                    np.mean(best[1] == images.labels[rest]),
                    *known,
                )
            )
        keys = ("prototypes_val", "nearest_example_val", "prototypes_train", "coverage_95_val", "coverage_95_train")
        results[str(shots)] = {key: _mean([float(run[i]) for run in runs]) for i, key in enumerate(keys)}
    return results


def other_scores(images: Images, make: Callable[[], Round], repeats: int, k: int) -> dict[str, dict[str, float]]:
    """Return the AUROC and, with leave-one-out, the coverage at 95 % of several scores with the same neighbours: the
    similarity to the k-th neighbour (the one that the service uses), the mean similarity of k neighbours, the
    similarity to the first, the best class's share of the votes, and the similarity to the k-th neighbour ranked among
    the items with the same predicted class. The last entry compares each item only with items of other classes, of
    other splits, or with a number that differs by at least `SERIES`.
    """
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        rows = make()
        collection = rows.collection
        reference, labels = images.vectors[collection], images.labels[collection]
        within = reference @ reference.T
        np.fill_diagonal(within, -2)
        calibration, of_items = _scores(within, labels, k)
        tests = [_scores(images.vectors[numbers] @ reference.T, labels, k) for numbers in (rows.known, rows.unknown)]
        for name, scores in calibration.items():
            known, unknown = (p_values(np.sort(scores), test[0][name]) for test in tests)
            area = auroc(tests[0][0][name], tests[1][0][name])
            runs.setdefault(name, []).append((area, float(np.mean(known > 0.05))))
        known, unknown = (_class_wise(calibration["k-th"], of_items, *test) for test in tests)
        runs.setdefault("k-th, class-wise", []).append((auroc(known, unknown), float(np.mean(known > 0.05))))
        within[_same_series(images, collection)] = -2
        known = p_values(np.sort(_scores(within, labels, k)[0]["k-th"]), tests[0][0]["k-th"])
        runs.setdefault("k-th, series left out", []).append((runs["k-th"][-1][0], float(np.mean(known > 0.05))))
    return {
        name: {key: _mean([value[i] for value in values]) for i, key in enumerate(("auroc", "coverage_95"))}
        for name, values in runs.items()
    }


def _class_wise(calibration: Floats, of_items: Floats, scores: dict[str, Floats], predicted: Floats) -> Floats:
    """Return the p-value of each image among the items with the same predicted class."""
    known = {label: np.sort(calibration[of_items == label]) for label in set(predicted.tolist())}
    pairs = zip(scores["k-th"], predicted.tolist(), strict=True)
    return np.array([p_values(known[label], [value])[0] for value, label in pairs])


def _same_series(images: Images, rows: Floats) -> Floats:
    """Return for each pair of images whether they are less than `SERIES` images apart, bool [n, n]."""
    same = [values[rows][:, None] == values[rows] for values in (images.labels, images.splits)]
    numbers = images.numbers[rows]
    return same[0] & same[1] & (np.abs(numbers[:, None] - numbers) < SERIES)


def _scores(similarities: Floats, labels: Floats, k: int) -> tuple[dict[str, Floats], Floats]:
    """Return several scores of each row (keyed by score), and the predicted class of each row."""
    nearest = np.argsort(-similarities, axis=1)[:, :k]
    values = np.take_along_axis(similarities, nearest, axis=1)
    weights = np.exp((values - values[:, :1]) / 0.07)
    predicted, shares = [], []
    for row, weight in zip(labels[nearest], weights, strict=True):
        votes = {label: weight[row == label].sum() for label in dict.fromkeys(row)}
        best = max(votes, key=lambda label: votes[label])
        predicted.append(best)
        shares.append(votes[best] / weight.sum())
    found = {"k-th": values[:, -1], "mean": values.mean(axis=1), "first": values[:, 0], "share": np.array(shares)}
    return found, np.array(predicted)


# Latency


async def latency(artifact: Artifact, images: Images, requests: int) -> dict[str, Any]:
    """Return the median time of requests with one new image: an embedding, and a classification by the train images.
    The two kinds of request alternate, and the vector cache is off. Also measure the first calibration of this
    collection, and of one with 100,000 vectors, which are vectors of images with noise added."""
    engine = load_engine(artifact, "auto")
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(load_settings({"data_dir": Path(folder), "cache_bytes": 0}), artifact, engine)
        async with app.router.lifespan_context(app):
            store = app.state.service.store
            tag = vector_tag(artifact, engine, "cls")
            train = np.flatnonzero(images.splits == "train")
            await store.upsert(
                "shop", [Item(str(n), images.vectors[n], {"class": str(images.labels[n])}) for n in train], tag=tag
            )
            first = {"2,640 items": await _seconds(store, "shop")}
            rng = np.random.default_rng(0)
            for start in range(0, 100_000, 5000):
                rows = images.vectors[rng.integers(0, len(images.vectors), 5000)]
                rows = rows + rng.normal(size=rows.shape) / rows.shape[1] ** 0.5 / 2
                await store.upsert(
                    "large", [Item(f"{start + n}", row, {"class": n % 9}) for n, row in enumerate(rows)], tag=tag
                )
            await store.settle("large")
            first["100,000 items"] = await _seconds(store, "large")
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                times = await _alternate(client, requests)
    medians = {name: round(statistics.median(values) * 1e3, 2) for name, values in times.items()}
    load = round(os.getloadavg()[0], 1)
    return {"latency": {"median_ms": medians, "first_calibration_s": first, "load_average": load}}


async def _seconds(store: VectorStore, name: str) -> float:
    info = await store.info(name)
    started = time.perf_counter()
    await calibrate(store, info, Reference(("class",), 10))
    return round(time.perf_counter() - started, 2)


async def _alternate(client: httpx.AsyncClient, requests: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)

    def image() -> str:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (280, 280, 3), dtype=np.uint8)).save(buffer, "BMP")
        return base64.b64encode(buffer.getvalue()).decode()

    def ask(path: str, body: dict[str, Any]) -> Callable[[], Awaitable[httpx.Response]]:
        return lambda: client.post(path, json=body)

    times: dict[str, list[float]] = {}
    for turn in range(requests + 5):
        for name, send in {
            "embedding": ask("/v1/embeddings", {"input": image()}),
            "classify, 2,640 items": ask("/v1/classify", {"images": image(), "collection": "shop", "label": "class"}),
            "classify, 100,000 items": ask(
                "/v1/classify", {"images": image(), "collection": "large", "label": "class"}
            ),
        }.items():
            started = time.perf_counter()
            answer = await send()
            assert answer.status_code == 200, answer.text
            if turn >= 5:
                times.setdefault(name, []).append(time.perf_counter() - started)
    return times


async def measure(images: Images, artifact: Artifact, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(arguments.seed)
    protocols: dict[str, tuple[Callable[[], Round], int]] = {
        "one source": (lambda: one_source(images, rng), arguments.repeats),
        "other shops, leave-one-out": (lambda: other_shops(images, rng, held_out=False), arguments.repeats),
        "other shops, held out": (lambda: other_shops(images, rng, held_out=True), 5 * arguments.repeats),
    }
    with tempfile.TemporaryDirectory() as folder:
        store = await open_embedded(Path(folder), threads=1)
        coverage = {
            name: await measure_coverage(store, images, make, repeats, arguments.k)
            for name, (make, repeats) in protocols.items()
        }
        knn = await knn_accuracy(store, images)
        await store.close()
    return {
        "coverage": coverage,
        "knn_accuracy_val": knn,
        "few_shot": few_shot(images, rng, arguments.repeats // 2),
        **compare_scores(images, arguments),
        **await latency(artifact, images, arguments.requests),
    }


def compare_scores(images: Images, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(arguments.seed)
    makers: dict[str, Callable[[], Round]] = {
        "one source": lambda: one_source(images, rng),
        "other shops, leave-one-out": lambda: other_shops(images, rng, held_out=False),
    }
    scores = {name: other_scores(images, make, arguments.repeats // 2, arguments.k) for name, make in makers.items()}
    return {"other_scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--artifact", type=Path, default=bundled_artifact(), help="artifact; default: the bundled one")
    parser.add_argument(
        "--features",
        type=Path,
        default=Path(tempfile.gettempdir()) / "classify_unknown",
        help="folder for the features",
    )
    parser.add_argument("--only", choices=("scores", "latency"), help="replace this part of today's results")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    artifact = load_artifact(arguments.artifact)
    images = load_images(arguments.data, artifact, arguments.features)
    today = datetime.date.today().isoformat()
    path = arguments.results / f"{today}-classify-unknown.json"
    command = shlex.join(["python", "benchmarks/classify_unknown.py", *sys.argv[1:]])
    if arguments.only is not None:
        results = json.loads(path.read_text())
        results[f"command_of_{arguments.only}"] = command
        results |= (
            asyncio.run(latency(artifact, images, arguments.requests))
            if arguments.only == "latency"
            else (compare_scores(images, arguments))
        )
        path.write_text(json.dumps(results, indent=1) + "\n")
        return
    results = {
        "benchmark": "classify-unknown",
        "date": today,
        "command": command,
        "model": artifact.manifest.name,
        "fingerprint": artifact.fingerprint,
        "images": {split: int(np.sum(images.splits == split)) for split in ("train", "val")},
        **asyncio.run(measure(images, artifact, arguments)),
    }
    text = json.dumps(results, indent=1)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
