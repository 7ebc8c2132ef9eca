"""Measure vector search on this machine with our embedded store, faiss, hnswlib, usearch, Qdrant Edge, and the service.

    python benchmarks/search.py --vectors 100000 --http [--folder DIR] [--only latency qps ...]
    python benchmarks/search.py --vectors 1000000 --http --folder DIR

The N vectors are random unit vectors in clusters around N/100 centres (at least 100). The variance of their principal
components falls off as 1/rank, as in image features. The queries are new vectors from the same distribution, and an
exact search gives the true neighbours. The benchmark has these parts:

    build    write the vectors in batches of 2,000 and build the indexes
    latency  send one query at a time; the engines take turns in random order, and each engine has its own order of
             queries, so that no engine warms the cache for another
    qps      measure queries per second with 1 and 16 clients; the engines take turns
    filters  search with filters that 0.001 %, 0.1 %, 10 % and 50 % of the items match, and with one filter that only
             items far from the query match
    memory   measure the memory of a new process that opens one engine and answers 1,000 queries
    open     measure the time of opening a store in a new process, with the files in the page cache
    http     (with --http) measure the service as one process, as two processes on the same folder, and in comparison
             with empty servers that only read the request

Each part runs in a separate process. A slow engine gets fewer turns. With more than 100,000 vectors, the other engines
and our index kind `flat` are skipped unless they are named, and faiss opens the HNSW graph of our own store. With
--folder, the built data is kept, so that the parts can run one after another. The result file keeps the parts of the
same day that are not run again. The benchmark needs the extra `bench`.

The script prints tables and, as the last line, the result as JSON, which is also written to benchmarks/results/.
"""

import argparse
import asyncio
import ctypes
import datetime
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import search_peers as peers
from benchmarks.search_peers import KEYS, NAME, Engine, K, Where
from model.cpus import available_cpus
from service.search.kinds import KINDS

RESULTS = Path(__file__).parent / "results"
D, SPREAD, CHUNK = 384, 0.5, 50_000
SMALL = 100_000
CLIENTS = (1, 16)
SHARES = (0.00001, 0.001, 0.1, 0.5)
PARTS = ("latency", "qps", "filters", "memory", "open", "http")
Rows = list[dict[str, Any]]


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, which then exits and frees its memory. Return the result of the function."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# ---- data


def make_data(folder: Path, n: int, queries: int) -> None:
    """Write random data to files in `folder`.

    vectors.npy has the vectors [n, D], queries.npy the queries [q, D], and truth.npy the numbers [q, K] of the nearest
    vectors of each query. keys.npz has the filter keys of each vector: `rank`, a random permutation, and `region`, from
    0 to 9 by the position of its centre. It also has the region of each query.
    """
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(D))
    scale /= np.linalg.norm(scale)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    centres = (rng.normal(size=(max(100, n // 100), D)) * scale).astype(np.float32)
    regions = np.argsort(np.argsort(centres[:, 0])) * 10 // len(centres)  # 0 to 9 along the axis of greatest variance

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        which = rng.integers(len(centres), size=count)
        points = centres[which] + SPREAD * rng.standard_normal((count, D), np.float32) * scale.astype(np.float32)
        points = points @ rotation
        return points / np.linalg.norm(points, axis=1, keepdims=True), regions[which]

    wanted, query_regions = sample(queries)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (n, D))
    region = np.empty(n, np.int64)
    for begin in range(0, n, CHUNK):
        end = min(n, begin + CHUNK)
        vectors[begin:end], region[begin:end] = sample(end - begin)
    vectors.flush()
    np.save(folder / "queries.npy", wanted)
    np.save(folder / "truth.npy", exact(vectors, wanted, None))
    np.savez(folder / "keys.npz", rank=rng.permutation(n), region=region, query_regions=query_regions)


def exact(vectors: np.ndarray, queries: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """Return the numbers [q, K] of the K nearest vectors of each query, or -1 if there are fewer than K.

    If `among` is not None, only the vectors with these numbers are compared.
    """
    faiss.omp_set_num_threads(available_cpus())
    count = len(vectors) if among is None else len(among)
    scores, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for begin in range(0, count, CHUNK):
        chosen = np.arange(begin, min(count, begin + CHUNK)) if among is None else among[begin : begin + CHUNK]
        rows = np.ascontiguousarray(vectors[chosen[0] : chosen[-1] + 1] if among is None else vectors[chosen])
        some, found = faiss.knn(queries, rows, min(K, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, places = np.hstack([scores, some]), np.hstack([places, chosen[found]])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        scores, places = np.take_along_axis(scores, best, 1), np.take_along_axis(places, best, 1)
    faiss.omp_set_num_threads(1)
    return np.pad(places, ((0, 0), (0, K - places.shape[1])), constant_values=-1)


class Data:
    """The vectors, queries, true neighbours and filter keys in a folder. The vectors are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.vectors = np.asarray(np.load(folder / "vectors.npy", mmap_mode="r"))  # a memmap is slow to index
        self.queries = np.load(folder / "queries.npy")
        self.truth = np.load(folder / "truth.npy")
        self.keys = dict(np.load(folder / "keys.npz"))


def recall(found: dict[int, list[int]], truth: np.ndarray) -> float:
    """Return the share of the true neighbours that were found. `found` has the result of each query by its number."""
    hits = sum(len(set(places) & set(truth[query].tolist()) - {-1}) for query, places in found.items())
    return round(hits / sum(int((truth[query] >= 0).sum()) for query in found), 4)


# ---- build


def build_part(folder: Path, given: argparse.Namespace) -> Rows:
    """Build the engines that are not built yet. Return one row per engine with the figures of its build."""
    known = folder / "build.json"
    figures: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    for name in [*given.kinds, *given.peers]:
        if name in figures:
            continue
        say(f"build {name}")
        figures[name] = fresh(build_one, folder, name)
        known.write_text(json.dumps(figures))
    return [{"engine": name, **figures[name]} for name in [*given.kinds, *given.peers]]


def build_one(folder: Path, name: str) -> dict[str, Any]:
    data = Data(folder)
    built = peers.build(folder, name, data.vectors, {key: data.keys[key] for key in KEYS})
    n, total = len(data.vectors), built["write_s"] + built["index_s"]
    rates = {"write_per_s": round(n / built["write_s"]) if built["write_s"] else None, "all_per_s": round(n / total)}
    return {**{key: round(value, 2) for key, value in built.items() if key.endswith("_s")}, **rates} | {
        key: value for key, value in built.items() if not key.endswith("_s")
    }


@contextmanager
def running(folder: Path, given: argparse.Namespace) -> Iterator[tuple[asyncio.Runner, Data, list[Engine]]]:
    """Open all engines, and yield an event-loop runner, the data and the engines. Close the engines at the end."""
    data = Data(folder)
    built = json.loads((folder / "build.json").read_text())
    ef = max(64, built.get("hnsw", {}).get("effort", 64))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        engines = runner.run(peers.open_all(folder, given.kinds, given.peers, D, ef))
        yield runner, data, engines
        for engine in engines:
            runner.run(engine.close())


# ---- latency


async def timed(engine: Engine, query: np.ndarray, where: Any = None) -> tuple[float, list[int]]:
    """Search once. Return the time in milliseconds and the numbers of the items that were found."""
    started = time.perf_counter()
    answer = engine.search(query, where)
    if engine.waits:
        answer = await answer
    seconds = time.perf_counter() - started
    return seconds * 1e3, engine.places(answer)


async def take_turns(
    engines: list[Engine], queries: np.ndarray, truth: np.ndarray, limit_s: float, wheres: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Search with all engines in turns, and return the p50, p99 and recall of each engine by name.

    An engine that would need more than `limit_s` seconds gets fewer turns.
    """
    rng = np.random.default_rng(1)
    wheres = wheres or {}
    orders = {engine.name: rng.permutation(len(queries)) for engine in engines}
    every = {}
    for engine in engines:
        warm = [(await timed(engine, queries[n : n + 1], wheres.get(engine.name)))[0] for n in range(10)]
        every[engine.name] = max(1, round(statistics.median(warm) / 1e3 * len(queries) / limit_s))
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    found: dict[str, dict[int, list[int]]] = {engine.name: {} for engine in engines}
    for turn in range(len(queries)):
        for engine in rng.permutation(np.array(engines, object)):
            if turn % every[engine.name]:
                continue
            query = int(orders[engine.name][turn])
            took, places = await timed(engine, queries[query : query + 1], wheres.get(engine.name))
            times[engine.name].append(took)
            found[engine.name][query] = places
    return {
        name: {
            **dict(zip(("p50_ms", "p99_ms"), np.round(np.quantile(took, [0.5, 0.99]), 4).tolist(), strict=True)),
            "recall": recall(found[name], truth),
            "found": round(statistics.fmean(map(len, found[name].values())), 2),
            "queries": len(took),
        }
        for name, took in times.items()
    }


def latency_part(folder: Path, given: argparse.Namespace) -> Rows:
    with running(folder, given) as (runner, data, engines):
        figures = runner.run(take_turns(engines, data.queries, data.truth, 12))
    for ours, bare in (("ours flat", "faiss flat"), ("ours hnsw", "faiss hnsw")):
        if ours in figures and bare in figures:
            figures[ours]["p50_to_bare"] = round(figures[ours]["p50_ms"] / figures[bare]["p50_ms"], 2)
    return [{"engine": name, **row} for name, row in figures.items()]


# ---- queries per second


async def tasks_rate(engine: Engine, queries: np.ndarray, clients: int, seconds: float) -> float:
    until, done = time.perf_counter() + seconds, 0

    async def client(at: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            at = (at + 1) % len(queries)
            await engine.search(queries[at : at + 1])
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(client(n * len(queries) // clients) for n in range(clients)))
    return done / (time.perf_counter() - started)


def threads_rate(engine: Engine, queries: np.ndarray, clients: int, seconds: float) -> float:
    together = threading.Barrier(clients)

    def client(at: int) -> int:
        faiss.omp_set_num_threads(1)  # applies to this thread only
        together.wait()
        until, done = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            at = (at + 1) % len(queries)
            engine.search(queries[at : at + 1])
            done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        done = sum(pool.map(client, [n * len(queries) // clients for n in range(clients)]))
        return done / (time.perf_counter() - started)


def qps_part(folder: Path, given: argparse.Namespace) -> Rows:
    rates: dict[tuple[str, int], list[float]] = {}
    with running(folder, given) as (runner, data, engines):
        for clients in CLIENTS * 2:
            for engine in engines:
                if engine.waits:
                    rate = runner.run(tasks_rate(engine, data.queries, clients, given.seconds))
                else:
                    rate = threads_rate(engine, data.queries, clients, given.seconds / 2)
                rates.setdefault((engine.name, clients), []).append(rate)
    return [
        {"engine": name, **{f"qps_{clients}": round(statistics.fmean(rates[name, clients]), 1) for clients in CLIENTS}}
        for name in dict.fromkeys(name for name, _ in rates)
    ]


# ---- filters


def filters_part(folder: Path, given: argparse.Namespace) -> Rows:
    rows: Rows = []
    with running(folder, given) as (runner, data, engines):
        knowing = [engine for engine in engines if engine.filters and engine.name != "faiss flat"]
        n, region = len(data.vectors), data.keys["query_regions"]
        some = np.arange(min(200, len(data.queries)))
        cases = [(f"{share:.3%}", "rank", 0, max(1, round(share * n)), some) for share in SHARES]
        cases.append(("far 10%", "region", 9, 10, np.flatnonzero(region == 0)[:200]))
        for title, key, low, high, chosen in cases:
            say(f"filters {title}")
            rows += runner.run(filter_rows(knowing, data, title, (key, low, high), chosen))
    return rows


async def filter_rows(
    engines: list[Engine], data: Data, title: str, condition: tuple[str, int, int], chosen: np.ndarray
) -> Rows:
    """Measure searches with one filter, and return one row per engine.

    The first use of a filter is measured with other filters of the same selectivity that were not used before.
    """
    key, low, high = condition
    flags = (data.keys[key] >= low) & (data.keys[key] < high)
    where = Where(key, low, high, np.packbits(flags, bitorder="little"))
    queries = data.queries[chosen]
    truth = exact(data.vectors, queries, np.flatnonzero(flags))
    n, first = len(flags), {}
    for engine in [engine for engine in engines if engine.waits]:
        took: list[float] = []
        while len(took) < 11 and (len(took) < 3 or sum(took) < 5000):
            by = len(took) + 1  # no region is above 9, so a longer range passes the same items
            span = (low, high + by) if key == "region" else (by % (n - high + 1), by % (n - high + 1) + high)
            native = engine.native(Where(key, *span, where.bits))
            took.append((await timed(engine, queries[by : by + 1], native))[0])
        first[engine.name] = round(statistics.median(took), 3)
    wheres = {engine.name: engine.native(where) for engine in engines}
    figures = await take_turns(engines, queries, truth, 4, wheres)
    wanted = {"filter": title, "passes": int(flags.sum())}
    return [
        {**wanted, "engine": name, "first_ms": first.get(name), **{key: row[key] for key in row if key != "queries"}}
        for name, row in figures.items()
    ]


# ---- memory and opening


def memory() -> dict[str, float]:
    """Return the resident memory of this process in MiB, in total and separately for anonymous and file pages.

    Rss counts shared pages in full, and Pss divides them by the number of processes that share them.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {
        "rss_mib": kib["Rss"] / 1024,
        "anon_mib": kib["Anonymous"] / 1024,
        "file_mib": (kib["Rss"] - kib["Anonymous"]) / 1024,
        "pss_mib": kib["Pss"] / 1024,
        "pss_anon_mib": kib["Pss_Anon"] / 1024,
        "pss_file_mib": kib["Pss_File"] / 1024,
    }


def mapped(folder: Path) -> dict[str, float]:
    """Return the resident memory in MiB of each file of `folder` that this process has mapped, by file name."""
    sizes: dict[str, float] = {}
    name = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
            name = Path(path).name if path.startswith(str(folder)) else None
        elif name and line.startswith("Rss:"):
            sizes[name] = round(sizes.get(name, 0) + int(line.split()[1]) / 1024, 1)
    return {name: size for name, size in sizes.items() if size}


def memory_of(folder: Path, kind: str, bare: bool) -> dict[str, Any]:
    queries = np.load(folder / "queries.npy")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))
        ctypes.CDLL(None).malloc_trim(0)  # otherwise new data could reuse freed memory and not be counted
        before = memory()
        engine = peers.open_faiss_flat(folder, kind) if bare else runner.run(peers.open_ours(folder, kind))
        faiss.omp_set_num_threads(1)
        for turn in range(1000):
            at = turn % len(queries)
            runner.run(timed(engine, queries[at : at + 1]))
        after, files = memory(), mapped(folder.resolve())
        runner.run(engine.close())
    return {**{key: round(after[key] - before[key], 1) for key in after}, "files": files}


def memory_part(folder: Path, given: argparse.Namespace) -> Rows:
    rows: Rows = [{"engine": "faiss flat", **fresh(memory_of, folder, given.kinds[0], True)}]
    for kind in given.kinds:
        rows.append({"engine": f"ours {kind}", **fresh(memory_of, folder, kind, False)})
    for row in rows:
        row["rss_to_flat"] = round(row["rss_mib"] / rows[0]["rss_mib"], 3)
        row["files"] = row.pop("files")
    return rows


async def open_once(folder: Path, kind: str) -> float:
    started = time.perf_counter()
    ours = await peers.open_ours(folder, kind)
    seconds = time.perf_counter() - started
    await ours.close()
    return seconds


def opening_of(folder: Path, kind: str) -> float:
    return asyncio.run(open_once(folder, kind))


def open_part(folder: Path, given: argparse.Namespace) -> Rows:
    rows: Rows = []
    for kind in given.kinds:
        times = [fresh(opening_of, folder, kind) for _ in range(4)][
            1:
        ]  # the first run reads the files into the page cache
        files = sum(path.stat().st_size for path in (folder / kind).rglob("*") if path.is_file())
        rows.append({"engine": f"ours {kind}", "open_s": round(statistics.median(times), 3), "disk_mib": files >> 20})
    return rows


# ---- HTTP


def http_part(folder: Path, given: argparse.Namespace) -> Rows:
    from benchmarks.serving import free_port, service_process  # imported late, because this imports torch

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    kind = "hnsw" if "hnsw" in given.kinds else given.kinds[0]
    queries = np.load(folder / "queries.npy")[:1000]
    requests = []
    for vector in queries:
        question = {"vector": vector, "k": K, "fingerprint": peers.FINGERPRINT}
        body = orjson.dumps(question, option=orjson.OPT_SERIALIZE_NUMPY)
        head = f"POST /v1/collections/{NAME}/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    spawn = multiprocessing.get_context("spawn")
    ours, floor_ports = [free_port(), free_port()], {"empty fastapi": free_port(), "empty asgi": free_port()}
    ports = {f"ours {kind}": ours[:1], f"ours {kind}, 2 processes": ours}
    ports |= {name: [port] for name, port in floor_ports.items()}
    floors = [spawn.Process(target=peers.serve_nothing, args=pair) for pair in floor_ports.items()]
    try:
        for floor in floors:
            floor.start()
        with (
            service_process(peers.BUNDLED, folder / kind, ours[0]),
            service_process(peers.BUNDLED, folder / kind, ours[1]),
            ProcessPoolExecutor(1, spawn) as pool,
        ):
            return http_rows(ports, lambda *what: pool.submit(peers.load, *what).result(), requests, given.seconds)
    finally:
        for floor in floors:
            floor.terminate()
            floor.join(10)


def http_rows(
    ports: dict[str, list[int]],
    send: Callable[..., tuple[float, np.ndarray, bytes]],
    requests: list[bytes],
    seconds: float,
) -> Rows:
    rows: dict[str, dict[str, Any]] = {name: {"server": name, "request_bytes": len(requests[0])} for name in ports}
    for name, port in ports.items():
        answer = orjson.loads(send(port, requests, 4, 1)[2].split(b"\r\n\r\n", 1)[1])  # also warms up
        if name.startswith("ours") and len(answer["data"]) != K:
            raise SystemExit(f"{name} returned {len(answer['data'])} hits instead of {K}")
    for clients in CLIENTS:
        rates: dict[str, list[float]] = {name: [] for name in ports}
        times: dict[str, list[np.ndarray]] = {name: [] for name in ports}
        for _ in range(2):
            for name, port in ports.items():
                rate, some, _ = send(port, requests, clients, seconds)
                rates[name].append(rate)
                times[name].append(some * 1e3)
        for name in ports:
            p50, p99 = np.quantile(np.concatenate(times[name]), [0.5, 0.99])
            rows[name] |= {f"qps_{clients}": round(statistics.fmean(rates[name]), 1)}
            rows[name] |= {f"p50_ms_{clients}": round(float(p50), 3), f"p99_ms_{clients}": round(float(p99), 3)}
    return list(rows.values())


# ---- the whole


def table(title: str, rows: Rows) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[("" if row.get(key) is None else str(row[key])) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in (columns, *cells):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=SMALL)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS))
    parser.add_argument("--peers", nargs="*", choices=("faiss", "hnswlib", "usearch", "qdrant"))
    parser.add_argument("--only", nargs="+", choices=("build", *PARTS), help="parts to run; build always runs")
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--seconds", type=float, default=5, help="duration of one measurement of an engine in seconds")
    parser.add_argument("--folder", type=Path, help="folder that keeps data and indexes; by default they are deleted")
    parser.add_argument(
        "--result", type=Path, help="file for the result; default: benchmarks/results/DATE-search-N.json"
    )
    given = parser.parse_args()
    small = given.vectors <= SMALL
    given.kinds = given.kinds or (["flat"] if small else []) + ["hnsw", "ivf_pq", "rabitq"]
    if given.peers is None:
        given.peers = ["faiss", "hnswlib", "qdrant"] if small else []
    given.only = given.only or [part for part in PARTS if part != "http" or given.http]
    return given


def run(folder: Path, given: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = given.result or RESULTS / f"{date}-search-{given.vectors}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result |= {"benchmark": "search", "date": date, "vectors": given.vectors, "dimension": D, "k": K}
    result |= {"cpus": available_cpus(), "machine": platform.processor() or platform.machine()}
    names = {"faiss": "faiss-cpu", "qdrant": "qdrant-edge-py"}
    result["faiss_hnsw"] = "built by faiss" if "faiss" in given.peers else "our segment's graph and vectors"
    result["versions"] = {name: version(names.get(name, name)) for name in dict.fromkeys(["faiss", *given.peers])}
    if not (folder / "keys.npz").exists():  # make_data writes this file last
        say("data and truth")
        shutil.rmtree(folder)
        folder.mkdir()
        fresh(make_data, folder, given.vectors, given.queries)
    parts = {"build": build_part, "latency": latency_part, "qps": qps_part, "filters": filters_part}
    parts |= {"memory": memory_part, "open": open_part, "http": http_part}
    for name in dict.fromkeys(["build", *given.only]):
        say(name)
        started = time.perf_counter()
        rows = fresh(parts[name], folder, given)
        result[name] = {"seconds": round(time.perf_counter() - started, 1), "rows": rows}
        table(name, rows)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        run((given.folder or Path(temporary)) / f"{given.vectors}", given)


if __name__ == "__main__":
    main()
