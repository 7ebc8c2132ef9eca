"""Measure the precision@1 of product search through the REST service, compared with random weights and colour
histograms.

    python benchmarks/retrieval.py PHOTOS [--model ARTIFACT] [--indexed 1000] [--queries 100] [--seed 0]

PHOTOS contains `train/` and `val/` with one folder per class. Images of `train` are added to a collection over HTTP,
and images of `val` are the queries. A search is correct if the best hit has the class of the query. The same is
measured with an artifact of random weights (same architecture and preprocessing) and with the histograms of
`knn_grocery.py`.
"""

import argparse
import base64
import datetime
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.knn_grocery import hsv_histogram
from benchmarks.serving import random_artifact, running_service
from model.artifact import bundled_artifact, read_manifest

RESULTS = Path(__file__).parent / "results"
BATCH = 32


def photos_of(folder: Path, count: int, seed: int) -> list[Path]:
    """Return the paths of `count` random images below a folder, or of all images if there are fewer."""
    files = sorted(path for path in folder.rglob("*.jpg"))
    if not files:
        raise SystemExit(f"{folder}: contains no .jpg")
    return random.Random(seed).sample(files, min(count, len(files)))


def precision_at_1(artifact: Path, indexed: list[Path], queries: list[Path]) -> dict[str, float]:
    """Index and search images over HTTP. Return the share of correct best hits, the images/s and the searches/s."""
    with tempfile.TemporaryDirectory() as data_dir, running_service(artifact, Path(data_dir)) as url:
        client = httpx.Client(base_url=url, timeout=120)
        start = time.perf_counter()
        for first in range(0, len(indexed), BATCH):
            items = [
                {
                    "id": f"{path.parent.name}/{path.name}",
                    "image": base64.b64encode(path.read_bytes()).decode(),
                    "metadata": {"class": path.parent.name},
                }
                for path in indexed[first : first + BATCH]
            ]
            client.post("/v1/collections/photos/items", json={"items": items}).raise_for_status()
        index_s = time.perf_counter() - start
        right, start = 0, time.perf_counter()
        for path in queries:
            body = {"image": base64.b64encode(path.read_bytes()).decode(), "k": 1}
            answer = client.post("/v1/collections/photos/search", json=body).raise_for_status().json()
            right += answer["data"][0]["metadata"]["class"] == path.parent.name
        search_s = time.perf_counter() - start
    return {
        "precision_at_1": round(right / len(queries), 4),
        "index_images_per_s": round(len(indexed) / index_s, 1),
        "searches_per_s": round(len(queries) / search_s, 1),
    }


def histogram_precision(indexed: list[Path], queries: list[Path]) -> float:
    known, wanted = (torch.stack([hsv_histogram(path) for path in paths]) for paths in (indexed, queries))
    best = (wanted @ known.T).argmax(dim=1).tolist()
    right = [indexed[b].parent.name == query.parent.name for b, query in zip(best, queries, strict=True)]
    return round(sum(right) / len(right), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", type=Path, help="artifact folder; default: the bundled artifact")
    parser.add_argument("--indexed", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    artifact = arguments.model or bundled_artifact()
    indexed = photos_of(arguments.photos / "train", arguments.indexed, arguments.seed)
    queries = photos_of(arguments.photos / "val", arguments.queries, arguments.seed)
    rows: dict[str, object] = {"trained": precision_at_1(artifact, indexed, queries)}
    with tempfile.TemporaryDirectory() as folder:
        manifest = read_manifest(artifact)
        twin = random_artifact(manifest.config, manifest.preprocess, Path(folder), name="random", seed=arguments.seed)
        rows["random_weights"] = precision_at_1(twin.path, indexed, queries)
    rows["hsv_histogram"] = {"precision_at_1": histogram_precision(indexed, queries)}
    for name, row in rows.items():
        print(f"{name:<16} {row}")
    result = {
        "benchmark": "retrieval",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": artifact.name,
        "indexed": len(indexed),
        "queries": len(queries),
        "seed": arguments.seed,
        **rows,
    }
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-retrieval.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
