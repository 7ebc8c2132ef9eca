"""Measure find-region, match, and re-ranking with stored patch features.

    python benchmarks/find_region.py [--items 10000] [--parts find,match,rerank,agreement,scenes,budget]
        [--queries 20] [--images FOLDER]

find    A service in this process finds a region in a collection of `--items` images, whose patch features are stored on
        disk. The features are those of generated scenes, drawn from 240 images. Widths: 192 (the bundled model) and 384
        (a random ViT-S, whose stored features are those of the bundled model in two rotations, side by side).
match   The time of `match` and of one forward pass at 224 pixels, in alternating runs.
rerank  The time of `rerank: patches` at depth 20 if the patch features are computed, stored when the images were added,
        or stored although the vectors were cached before. Widths as above, of which 384 has random weights. To measure
        another version, name its folder in PYTHONPATH.
agreement  How the scores and orders of stored patch features differ from those of float32, on the images of a folder.
scenes  The mean IoU of masks and the rank of the right image, on generated scenes, with and without debias.
budget  The share of entries that repeated scans find if not all entries fit. Random ones or the oldest are evicted.

Set OMP_NUM_THREADS=1, because the service compares images in several threads. CPU times are those of this process.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serving import random_artifact
from model.artifact import Artifact, bundled_artifact, load_artifact
from model.config import config_for
from model.decode import decode
from model.engines.choice import load_engine
from model.preprocess import crop_box, preprocess
from service.app import create_app
from service.features.patches import Patches, unit_rows
from service.originals import source_of
from service.search.store import CollectionSpec, Item
from service.settings import Settings
from service.vision.find_region import Reference, learn_region, mask_scores, scores
from service.vision.foreground import upsample_mask
from service.vision.local import Vision
from service.vision.mask import coco_rle_encode
from service.vision.maxsim import maxsim
from service.vision.positional_bias import positional_basis
from service.vision.region import mask_weights
from tests.service.vision.test_find_region import Scene, pair

RESULTS = Path(__file__).parent / "results"
THREADS = 2


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def timed(work: Callable[[], Any], runs: int) -> dict[str, float]:
    """Return the median wall time and the mean CPU time of a call, in milliseconds."""
    work()
    walls, cpu = [], time.process_time()
    for _ in range(runs):
        started = time.perf_counter()
        work()
        walls.append(time.perf_counter() - started)
    return {"ms": 1e3 * float(np.median(walls)), "cpu_ms": 1e3 * (time.process_time() - cpu) / runs}


@asynccontextmanager
async def service(artifact: Artifact, data_dir: Path, **settings: Any) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    chosen = Settings(data_dir=data_dir, decode_workers=THREADS, threads=THREADS, **settings)
    app = create_app(chosen, artifact, load_engine(artifact, "onnxruntime:fp32", threads=THREADS))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=600) as client:
            yield app.state.service, client


def scenes(vision: Vision, count: int) -> tuple[list[tuple[Scene, Scene]], np.ndarray]:
    """Return pairs of scenes with the same target, and their patch features [count, 2, 256, 192]."""
    rng, spec = np.random.default_rng(11), vision.artifact.manifest.preprocess
    pairs = [pair(rng) for _ in range(count)]
    features = [[vision.engine.run(preprocess(s.image, spec)[None]).patches[0] for s in both] for both in pairs]
    return pairs, np.array(features)


async def measure_find(vision: Vision, items: int, width: int, folder: Path) -> dict[str, Any]:
    pairs, features = scenes(vision, 120)
    pool = features.reshape(-1, 256, features.shape[-1])
    artifact = vision.artifact
    if width == 384:
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(192, 192)))[0].astype(np.float32)
        pool = np.concatenate([pool, pool @ turn], axis=2)
        spec = artifact.manifest.preprocess
        artifact = random_artifact(config_for("dinov2_vits14"), spec, folder / "vits", name="random_vits14")
    packed = [Patches.of(rows, (16, 16), (256, 256)) for rows in pool]
    async with service(artifact, folder / "data", patch_store_bytes=2**33, request_deadline_s=600) as (run, client):
        tag, rng = run.tag(), np.random.default_rng(1)
        digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(items)]
        await run.store.create("shop", CollectionSpec(tag, width, originals=True))
        for start in range(0, items, 1000):
            part = range(start, min(start + 1000, items))
            new = [Item(f"p{i:05}", rng.normal(size=width).astype(np.float32), {}, source_of(digests[i])) for i in part]
            await run.store.upsert("shop", new, tag=tag)
        started = time.perf_counter()
        for i, digest in enumerate(digests):
            await run.pipeline.patch_cache.add({digest: packed[i % len(packed)]}, recent=False)
        written_s = time.perf_counter() - started
        answers = []
        for number in (0, 1, 2):  # item 2 * number has the features of the first scene of a pair
            mask = coco_rle_encode(pairs[number][0].mask)
            body = {"references": [{"id": f"p{2 * number:05}", "mask": mask}], "candidates": 10_000, "min_score": 0.5}
            wall, cpu = time.perf_counter(), time.process_time()
            answer = (await client.post("/v1/collections/shop/find-region", json=body)).raise_for_status().json()
            times = {"s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            answers.append(times | {name: answer[name] for name in ("examined", "pending", "total")})
        size = run.settings.patch_store_file.stat().st_size
    return {"width": width, "items": items, "file_bytes": size, "write_s": written_s, "requests": answers}


def measure_match(vision: Vision) -> dict[str, Any]:
    images = [png(s.image) for s in scenes(vision, 1)[0][0]]
    pixels = np.zeros((1, 3, 224, 224), np.float32)
    from service.features.pipeline import PLAIN
    from service.vision import tasks

    task = tasks.task("match")
    result: dict[str, Any] = {"forward": timed(lambda: vision.engine.run(pixels), 60)}
    for options in ({}, {"debias": True}, {"format": "png"}):
        parsed = task.options.model_validate(options)
        analysed = [vision.analyse(image, PLAIN) for image in images]

        def work(parsed: Any = parsed, analysed: Any = analysed) -> Any:
            return task.encode([task.compute(each, parsed, vision.model) for each in analysed], parsed)

        result["match " + json.dumps(options)] = timed(work, 60)
    return result


async def measure_rerank(vision: Vision, width: int, folder: Path, queries: int) -> dict[str, Any]:
    """Return the times of queries by id, without and with stored patch features. In the last case, the vectors of the
    images were cached before the images were added to the collection."""
    pairs, _ = scenes(vision, 3 * queries)
    images = [png(scene.image) for both in pairs for scene in both]
    artifact = vision.artifact
    if width == 384:
        spec = artifact.manifest.preprocess
        artifact = random_artifact(config_for("dinov2_vits14"), spec, folder / "vits", name="random_vits14")
    result: dict[str, Any] = {}
    for name, limit, is_cached in (("computed", 0, False), ("stored", 2**30, False), ("cached first", 2**30, True)):
        kept = {"patch_store_bytes": limit, "patch_cache_bytes": 0, "request_deadline_s": 600}
        async with service(artifact, folder / name, **kept) as (_, client):
            await client.put("/v1/collections/shop", json={"originals": True})
            texts = [base64.b64encode(image).decode() for image in images]
            if is_cached:
                for text in texts:
                    (await client.post("/v1/embeddings", json={"input": text})).raise_for_status()
            started = time.perf_counter()
            items = [{"id": f"p{i}", "image": text} for i, text in enumerate(texts)]
            for start in range(0, len(items), 40):
                body = {"items": items[start : start + 40]}
                (await client.post("/v1/collections/shop/items", json=body)).raise_for_status()
            added_s, walls, cpu = time.perf_counter() - started, [], time.process_time()
            for i in range(queries):
                started = time.perf_counter()
                body = {"id": f"p{i}", "rerank": "patches", "rerank_depth": 20}
                (await client.post("/v1/collections/shop/search", json=body)).raise_for_status()
                walls.append(time.perf_counter() - started)
            cpu_ms = 1e3 * (time.process_time() - cpu) / queries
        times = {"ms": 1e3 * float(np.median(walls)), "slowest_ms": 1e3 * max(walls), "cpu_ms": cpu_ms}
        result[name] = times | {"added_per_s": len(items) / added_s}
    return result


def measure_scenes(vision: Vision, count: int = 96) -> dict[str, Any]:
    pairs, features = scenes(vision, count)
    seen = crop_box(256, 256, vision.artifact.manifest.preprocess)
    visible = upsample_mask(np.ones((1, 1), np.float32), 256, 256, seen)
    of_zeros = vision.model.patches_of_zeros(224, 224)
    result = {}
    for name, basis in (("plain", np.zeros((0, 192), np.float32)), ("debias", positional_basis(of_zeros))):
        overlaps, ranks = [], []
        for i, (first, second) in enumerate(pairs):
            weights = mask_weights(coco_rle_encode(first.mask), (256, 256), seen, (16, 16)).ravel()
            region = learn_region([Reference(features[i, 0], weights, np.ones(256, bool))], basis)
            found = upsample_mask(mask_scores(region, features[i, 1]).reshape(16, 16), 256, 256, seen)
            truth = second.mask & visible
            overlaps.append((found & truth).sum() / (found | truth).sum())
            others = scores(region, [(rows, None) for rows in features[:, 1]])
            ranks.append(int((others > others[i]).sum()))
        first_share = float(np.mean(np.array(ranks) == 0))
        result[name] = {"directions": len(basis), "mean_iou": float(np.mean(overlaps)), "right_first": first_share}
    return result


def measure_agreement(vision: Vision, folder: Path, queries: int, depth: int = 20) -> dict[str, float]:
    """Compare scores and orders of stored patch features (int8) with those of float32, on the images of a folder. Each
    query re-ranks the `depth` images with the nearest vectors."""
    spec = vision.artifact.manifest.preprocess
    files = random.Random(0).sample(sorted(folder.rglob("*.jpg")), 3 * queries)
    features = [vision.engine.run(preprocess(decode(file.read_bytes()), spec)[None]) for file in files]
    vectors = unit_rows(np.stack([each.cls[0] for each in features]))
    exact = [unit_rows(each.patches[0]) for each in features]
    side = round(len(exact[0]) ** 0.5)
    stored = [unit_rows(Patches.of(each.patches[0], (side, side), (1, 1)).rows) for each in features]
    errors, same_order, same_first, same_five = [], 0, 0, 0
    for query in range(queries):
        near = [i for i in np.argsort(-(vectors @ vectors[query])) if i != query][:depth]
        wanted = np.array([maxsim(exact[query], exact[i]) for i in near])
        got = np.array([maxsim(stored[query], stored[i]) for i in near])
        errors += list(np.abs(wanted - got))
        orders = np.argsort(-wanted, kind="stable"), np.argsort(-got, kind="stable")
        same_order += bool((orders[0] == orders[1]).all())
        same_first += bool(orders[0][0] == orders[1][0])
        same_five += set(orders[0][:5]) == set(orders[1][:5])
    shares = {"same_order": same_order, "same_first": same_first, "same_five": same_five}
    largest, mean = float(max(errors)), float(np.mean(errors))
    return {"largest_error": largest, "mean_error": mean} | {key: value / queries for key, value in shares.items()}


def measure_budget(entries: int = 1000, scans: int = 5) -> dict[str, dict[str, float]]:
    """Simulate repeated scans of `entries` entries in a cache with room for a share of them, and return the shares
    found."""
    shares: dict[str, dict[str, float]] = {}
    for share in (0.5, 0.8, 0.9):
        for name in ("random", "oldest"):
            kept: dict[int, None] = {}
            hits = 0
            for scan in range(scans):
                for key in range(entries):
                    if key in kept:
                        hits += scan > 0
                        continue
                    if len(kept) >= share * entries:
                        del kept[random.choice(list(kept)) if name == "random" else next(iter(kept))]
                    kept[key] = None
            shares.setdefault(str(share), {})[name] = hits / entries / (scans - 1)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--parts", default="find,match,rerank,agreement,scenes,budget")
    parser.add_argument("--queries", type=int, default=20, help="queries that are re-ranked")
    parser.add_argument("--images", type=Path, help="folder of at least three times as many .jpg images, for agreement")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{time.strftime('%Y-%m-%d')}-find-region.json")
    arguments = parser.parse_args()
    artifact = load_artifact(bundled_artifact())
    vision = Vision(artifact, load_engine(artifact, "onnxruntime:fp32", threads=THREADS), THREADS)
    result: dict[str, Any] = {"cpus": os.cpu_count(), "load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = arguments.parts.split(",")
        if "find" in parts:
            runs = [measure_find(vision, arguments.items, width, folder / str(width)) for width in (192, 384)]
            result["find"] = [asyncio.run(run) for run in runs]
        if "match" in parts:
            result["match"] = measure_match(vision)
        if "rerank" in parts:
            result["rerank"] = {
                str(width): asyncio.run(measure_rerank(vision, width, folder / f"rerank-{width}", arguments.queries))
                for width in (192, 384)
            }
        if "agreement" in parts and arguments.images is not None:
            result["agreement"] = measure_agreement(vision, arguments.images, arguments.queries)
        if "scenes" in parts:
            result["scenes"] = measure_scenes(vision)
        if "budget" in parts:
            result["budget"] = measure_budget()
    text = json.dumps(result, indent=1)
    print(text)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
