"""Compare the search by vector of two versions of the service, in turns on the same machine.

    python benchmarks/search.py --vectors 100000 --kinds hnsw --peers faiss --only build --folder DIR
    python benchmarks/search_pair.py OLD_TREE NEW_TREE DIR/100000 [--rounds 6] [--seconds 4]

Both versions open the collection that `benchmarks/search.py` has built in the folder. The version that takes its turn
first changes from round to round. A round has two parts:

    process  a new process of each version searches with one client, in turns with bare faiss, and then with 16 clients,
             in turns with 16 threads that search bare faiss
    http     16 clients send requests to one process of each version, to two processes of each version, and to the new
             version also with vectors as base64 text. Two processes of a version that has the setting `workers` are two
             workers on one port. Otherwise they have two ports, and the clients are divided among them

The result is the median of all rounds. It includes the processor time of a search and of a request in microseconds
(`cpu_us`), which depends less on other work of the machine than the rates do. With its defaults the whole takes about
eight minutes. The last line is the result as JSON, which is also written to benchmarks/results/.
"""

import argparse
import asyncio
import base64
import datetime
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

RESULTS = Path(__file__).parent / "results"
CLIENTS = 16
Figures = dict[str, float]


# ---- in process


def searched(tree: Path, folder: Path, seconds: float) -> Figures:
    """Import the store of a version, search, and return the figures."""
    sys.path[:0] = [str(tree), str(tree / "benchmarks")]
    import faiss
    import search_peers as peers
    import uvloop

    queries = np.load(folder / "queries.npy")
    singles = [queries[n : n + 1] for n in range(len(queries))]
    effort = json.loads((folder / "build.json").read_text())["hnsw"]["effort"]

    async def measure() -> Figures:
        faiss.omp_set_num_threads(1)
        ours, bare = await peers.open_ours(folder, "hnsw"), peers.open_faiss_hnsw(folder, effort)
        assert bare is not None
        for single in singles[:100]:
            await ours.search(single)
            bare.search(single)
        times = await alone(ours, bare, singles, seconds)
        figures = {f"p50_ms_{name}": statistics.median(took) * 1e3 for name, took in times.items()}
        figures["p50_to_bare"] = figures["p50_ms_ours"] / figures["p50_ms_bare"]
        done: dict[str, int] = defaultdict(int)
        walls: dict[str, float] = defaultdict(float)
        cpus: dict[str, float] = defaultdict(float)
        for part in ("16", "16_bare") * 2:
            started, before = time.perf_counter(), time.process_time()
            if part == "16":
                done[part] += await together(ours, singles, seconds / 2)
            else:
                done[part] += searched_by_threads(bare, singles, seconds / 2)
            walls[part] += time.perf_counter() - started
            cpus[part] += time.process_time() - before
        for part, count in done.items():
            figures |= {f"qps_{part}": count / walls[part], f"cpu_us_{part}": cpus[part] / count * 1e6}
        figures["qps_16_to_bare"] = figures["qps_16"] / figures["qps_16_bare"]
        await ours.close()
        return figures

    return uvloop.run(measure())


async def alone(ours: Any, bare: Any, singles: list[np.ndarray], seconds: float) -> dict[str, list[float]]:
    """Search with the store and with bare faiss in turns, with different queries. Return the seconds of each search."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    until, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        turn += 1
        started = time.perf_counter()
        await ours.search(singles[turn % len(singles)])
        times["ours"].append(time.perf_counter() - started)
        started = time.perf_counter()
        bare.search(singles[(turn + len(singles) // 2) % len(singles)])
        times["bare"].append(time.perf_counter() - started)
    return times


async def together(ours: Any, singles: list[np.ndarray], seconds: float) -> int:
    """Search with several clients for some seconds, and return the number of searches."""
    until, done = time.perf_counter() + seconds, 0

    async def client(at: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            at = (at + 1) % len(singles)
            await ours.search(singles[at])
            done += 1

    await asyncio.gather(*(client(n * len(singles) // CLIENTS) for n in range(CLIENTS)))
    return done


def searched_by_threads(bare: Any, singles: list[np.ndarray], seconds: float) -> int:
    """Search with bare faiss in several threads for some seconds, and return the number of searches."""
    import faiss

    until = time.perf_counter() + seconds

    def client(at: int) -> int:
        faiss.omp_set_num_threads(1)  # of this thread
        done = 0
        while time.perf_counter() < until:
            at = (at + 1) % len(singles)
            bare.search(singles[at])
            done += 1
        return done

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, [n * len(singles) // CLIENTS for n in range(CLIENTS)]))


# ---- HTTP


def requests_with(vectors: np.ndarray, name: str, fingerprint: str, k: int, *, as_text: bool) -> list[bytes]:
    """Return HTTP requests that search for vectors [n, D], either as lists of numbers or as base64 text."""
    made = []
    for vector in vectors:
        sent = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector
        body = orjson.dumps({"vector": sent, "k": k, "fingerprint": fingerprint}, option=orjson.OPT_SERIALIZE_NUMPY)
        head = f"POST /v1/collections/{name}/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        made.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


class Served(NamedTuple):
    """Running processes of a version: their ports, and the ids of the processes that were started for them."""

    ports: list[int]
    pids: list[int]


def serve(tree: Path, data_dir: Path, workers: int, stack: ExitStack) -> Served:
    """Start the service of a version, and stop it when `stack` is closed."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")} | {
        "DINOV2_MODEL": str(next(path for path in (tree / "model" / "bundled").iterdir() if path.is_dir())),
        "DINOV2_PORT": str(port),
        "DINOV2_DATA_DIR": str(data_dir),
        "DINOV2_LOG_LEVEL": "warning",
        "DINOV2_LOCAL_WORKER": "false",
    }
    if workers > 1:
        environment["DINOV2_WORKERS"] = str(workers)
    process = subprocess.Popen([sys.executable, "-m", "service"], cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    stack.callback(process.wait, 60)
    stack.callback(process.terminate)
    wait_until_ready(port)
    return Served([port], [process.pid])


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of processes and of their children."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        total += cpu_seconds([int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()])
    return total


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(port: int, limit_s: float = 180) -> None:
    from urllib.error import URLError
    from urllib.request import urlopen

    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the service on port {port} did not become ready")


def has_workers(tree: Path) -> bool:
    return "    workers: int = " in (tree / "service" / "settings.py").read_text()


def http_targets(old: Path, new: Path, folder: Path, stack: ExitStack) -> dict[str, Served]:
    """Start the services of both versions."""
    served: dict[str, Served] = {}
    for name, tree in (("old", old), ("new", new)):
        alone = served[f"{name}, 1 process"] = serve(tree, folder / "hnsw", 1, stack)
        if has_workers(tree):
            served[f"{name}, 2 workers"] = serve(tree, folder / "hnsw", 2, stack)
        else:
            second = serve(tree, folder / "hnsw", 1, stack)
            served[f"{name}, 2 processes"] = Served(alone.ports + second.ports, alone.pids + second.pids)
    return served


def http_rounds(given: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Measure all services in turns. Return their responses per second, and their processor time in microseconds for
    each response."""
    import search_peers as peers

    vectors = np.load(given.folder / "queries.npy")[:1000]
    sent = {
        form: requests_with(vectors, peers.NAME, peers.FINGERPRINT, peers.K, as_text=form == "base64")
        for form in ("list", "base64")
    }
    rates: dict[str, list[float]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        served = http_targets(given.old, given.new, given.folder, stack)
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        cases = [(name, form) for name in served for form in sent if form == "list" or name.startswith("new")]
        for turn in range(-1, given.rounds):  # the first round warms up
            for name, form in random.sample(cases, len(cases)):
                seconds = given.seconds if turn >= 0 else 1.0
                before = cpu_seconds(served[name].pids)
                load = pool.submit(peers.load, served[name].ports, sent[form], CLIENTS, seconds)
                rate, durations, last = load.result()
                used = cpu_seconds(served[name].pids) - before
                if len(orjson.loads(last.split(b"\r\n\r\n", 1)[1])["data"]) != peers.K:
                    raise SystemExit(f"{name}, {form}: not {peers.K} hits")
                if turn >= 0:
                    rates[f"{name}, {form}"].append(rate)
                    times[f"{name}, {form}"].append(used / len(durations) * 1e6)
    return rates, times


# ---- the whole


def process_rounds(given: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    rounds: dict[str, dict[str, list[float]]] = {"old": defaultdict(list), "new": defaultdict(list)}
    for _ in range(given.rounds):
        for name in random.sample(list(rounds), 2):
            command = [sys.executable, __file__, str(given.old), str(given.new), str(given.folder)]
            command += ["--seconds", str(given.seconds), "--child", name]
            output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            for figure, value in json.loads(output.splitlines()[-1]).items():
                rounds[name][figure].append(value)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the old version")
    parser.add_argument("new", type=Path, help="checkout of the new version")
    parser.add_argument("folder", type=Path, help="folder with the data of benchmarks/search.py")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4, help="duration of one measurement")
    parser.add_argument("--only", nargs="+", choices=("process", "http"), default=["process", "http"])
    parser.add_argument("--child", choices=("old", "new"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.old, given.new, given.folder = given.old.resolve(), given.new.resolve(), given.folder.resolve()
    if given.child:
        print(json.dumps(searched(getattr(given, given.child), given.folder, given.seconds)))
        return
    result: dict[str, Any] = {
        "benchmark": "search by vector of two versions",
        "date": datetime.date.today().isoformat(),
        "rounds": given.rounds,
        "clients": CLIENTS,
        "load_average": os.getloadavg()[1],
    }
    if "process" in given.only:
        result["process"] = {
            name: {figure: round(statistics.median(values), 3) for figure, values in figures.items()}
            for name, figures in process_rounds(given).items()
        }
    if "http" in given.only:
        sys.path[:0] = [str(given.new), str(given.new / "benchmarks")]
        for key, figures in zip(("http_per_s", "http_cpu_us"), http_rounds(given), strict=True):
            result[key] = {name: round(statistics.median(values)) for name, values in figures.items()}
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-search-pair.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
