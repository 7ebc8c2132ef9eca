"""Measure the speed of indexing a folder of images, compared with the engine alone on the same images.

    python benchmarks/indexing.py dinov2_vits14|ARTIFACT PHOTOS [--photos 160] [--rounds 4]

The engine alone and indexing take turns in one process, so that other load affects both. The engine alone gets images
that were decoded in advance. Indexing has more threads, so other load on the machine slows indexing down less.
Therefore check `load_average` and the CPU times too. Indexing lists, reads, decodes and embeds the images and writes
the vectors into a new collection of the embedded store on disk.

`decode_ms` is the CPU time of decoding and preprocessing one image. Without a GPU, decoding uses the same cores as the
engine. The ratio of indexing to the engine alone then cannot exceed `bound`, which is 1 / (1 + decode time / engine
time), with both times in CPU seconds.
"""

import argparse
import asyncio
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serving import random_artifact
from model.artifact import Artifact, load_artifact
from model.config import CONFIGS
from model.cpus import available_cpus
from model.decode import decode
from model.engines.choice import load_engine
from model.engines.protocol import Engine
from model.preprocess import REFERENCE_224, preprocess
from service.ingest.index import IndexOptions, IndexReport, index_photos
from service.ingest.sources import find_photos
from service.search.embedded import open_embedded
from service.search.store import VectorStore

RESULTS = Path(__file__).parent / "results"
Batches = list[np.ndarray]


def link_photos(photos: Path, folder: Path, count: int) -> int:
    """Create links in `folder` to the first `count` images, and return the number of links."""
    found = sorted(photos.rglob("*.jpg"))[:count]
    if not found:
        raise SystemExit(f"{photos}: contains no .jpg")
    for number, path in enumerate(found):
        (folder / f"{number:05}.jpg").symlink_to(path.resolve())
    return len(found)


def decoded(folder: Path, artifact: Artifact, batch: int) -> tuple[Batches, float]:
    """Decode and preprocess all images of a folder. Return batches [B, 3, h, w] and the CPU seconds that this took."""
    started = time.process_time()
    spec = artifact.manifest.preprocess
    pixels = [preprocess(decode(path.read_bytes()), spec) for path in sorted(folder.iterdir())]
    spent = time.process_time() - started
    return [np.stack(pixels[start : start + batch]) for start in range(0, len(pixels), batch)], spent


def run_bare(engine: Engine, batches: Batches) -> tuple[float, float]:
    """Run the engine on all batches. Return the wall-clock seconds and the CPU seconds."""
    started, spent = time.perf_counter(), time.process_time()
    for batch in batches:
        engine.run(batch)
    return time.perf_counter() - started, time.process_time() - spent


async def run_index(
    store: VectorStore, folder: Path, name: str, artifact: Artifact, engine: Engine, batch: int
) -> IndexReport:
    found = find_photos([str(folder)])
    report = await index_photos(found, store, name, artifact, engine, IndexOptions(batch_size=batch))
    assert not report.failed, report.problems[:3]
    return report


async def measure(artifact: Artifact, engine: Engine, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    batches, decode_s = decoded(folder, artifact, arguments.batch)
    count = sum(len(batch) for batch in batches)
    run_bare(engine, batches[:2])
    bare, index, engine_cpu, index_cpu = [], [], [], []
    with tempfile.TemporaryDirectory() as data_dir:
        store = await open_embedded(Path(data_dir))
        for turn in range(arguments.rounds):
            wall, cpu = run_bare(engine, batches)
            bare.append(count / wall)
            engine_cpu.append(cpu)
            spent = time.process_time()
            report = await run_index(store, folder, f"turn-{turn}", artifact, engine, arguments.batch)
            index_cpu.append(time.process_time() - spent)
            index.append(report.images_per_s)
        await store.close()
    ratios = [over / alone for over, alone in zip(index, bare, strict=True)]
    return {
        "benchmark": "indexing",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": artifact.name,
        "engine": f"{engine.name} {engine.precision}",
        "cpus": available_cpus(),
        "load_average": round(os.getloadavg()[0], 2),
        "photos": count,
        "batch": arguments.batch,
        "engine_images_per_s": [round(rate, 2) for rate in bare],
        "index_images_per_s": [round(rate, 2) for rate in index],
        "index_to_engine": [round(ratio, 3) for ratio in ratios],
        "index_to_engine_median": round(statistics.median(ratios), 3),
        "decode_ms": round(decode_s / count * 1e3, 2),
        "engine_cpu_ms": round(statistics.median(engine_cpu) / count * 1e3, 2),
        "index_cpu_ms": round(statistics.median(index_cpu) / count * 1e3, 2),
        "bound": round(1 / (1 + decode_s / statistics.median(engine_cpu)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="artifact folder, or a model such as dinov2_vits14 with random weights")
    parser.add_argument("folder", type=Path, help="folder with .jpg files")
    parser.add_argument("--photos", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as links:
        if arguments.artifact in CONFIGS:
            config = CONFIGS[arguments.artifact]
            artifact = random_artifact(config, REFERENCE_224, Path(scratch), name=arguments.artifact)
        else:
            artifact = load_artifact(Path(arguments.artifact), derived_dir=Path(scratch))
        link_photos(arguments.folder, Path(links), arguments.photos)
        result = asyncio.run(measure(artifact, load_engine(artifact), Path(links), arguments))
    for key, value in result.items():
        print(f"{key:>24}  {value}")
    name = f"{result['date']}-indexing-{artifact.manifest.name}.json"
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
