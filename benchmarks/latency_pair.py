"""Compare the latency of two versions of the service over HTTP, in turns on the same machine.

    python benchmarks/latency_pair.py OLD_TREE NEW_TREE [--rounds 10] [--requests 300]

Both trees serve the demo model, each in its own process with one thread and its own data folder, and both get the same
collection of random vectors. In each round, one version after the other answers the same requests over one keep-alive
connection: searches by vector, embeddings of an image that is in the cache, and embeddings of new images. The script
prints the median of each round's median latency, and the ratio of the two versions, and writes the result to
benchmarks/results/.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.services import KINDS, RNG, Service, image, requests

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the old version")
    parser.add_argument("new", type=Path, help="checkout of the new version")
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds")
    parser.add_argument("--requests", type=int, default=300, help="number of requests of each kind in a round")
    arguments = parser.parse_args()
    vectors = RNG.standard_normal((5000, 192)).astype(np.float32)
    cached = image()
    medians: dict[str, dict[str, list[float]]] = {kind: {"old": [], "new": []} for kind in KINDS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        services = {name: Service(getattr(arguments, name), folder / name, {}, stack) for name in ("old", "new")}
        for service in services.values():
            service.fill(vectors)
        for _ in range(arguments.rounds):
            for kind in KINDS:
                count = max(1, arguments.requests // 10) if kind == "embedding, new image" else arguments.requests
                sends = list(requests(kind, count, cached))
                for name, service in services.items():
                    medians[kind][name].append(statistics.median(service.measure(sends)[0]))
    result: dict[str, Any] = {"benchmark": "latency of two versions", "date": datetime.date.today().isoformat()}
    for kind, by_version in medians.items():
        old, new = (statistics.median(by_version[name]) for name in ("old", "new"))
        ratios = [n / o for o, n in zip(by_version["old"], by_version["new"], strict=True)]
        row = {"old_ms": round(old, 3), "new_ms": round(new, 3), "median_ratio": round(statistics.median(ratios), 3)}
        result[kind] = row
        print(f"{kind:>22}  {row}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-latency-pair.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
