"""Compare the throughput of two versions of the service with many clients, in turns on the same machine.

    python benchmarks/throughput_pair.py OLD_TREE NEW_TREE IMAGES [--rounds 10] [--seconds 10] [--clients 16]

Both trees serve the demo model, each in its own process with the default settings but without a cache. In each round,
one version after the other, in a new order, answers the clients of benchmarks/load.py, which send JPEG files from the
folder IMAGES. The script prints the images/s and the median of the ratios of the rounds with its interval, and writes
the result to benchmarks/results/.
"""

import argparse
import asyncio
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.load import read_photos, run_clients
from benchmarks.services import Service

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the old version")
    parser.add_argument("new", type=Path, help="checkout of the new version")
    parser.add_argument("images", type=Path, help="folder with .jpg files")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10, help="time for each version in a round")
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    images = read_photos(arguments.images, 200)
    settings = {"DINOV2_CACHE_BYTES": "0", "DINOV2_THREADS": str(os.cpu_count())}
    rates: dict[str, list[float]] = {"old": [], "new": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        services = {name: Service(getattr(arguments, name), folder / name, settings, stack) for name in rates}
        for turn in range(-1, arguments.rounds):  # the first round is not counted
            for name in random.sample(list(services), 2):
                port = services[name].client.base_url.port
                assert port is not None
                tally = asyncio.run(run_clients(port, images, arguments.clients, arguments.seconds))
                if set(tally.status) != {200}:
                    raise SystemExit(f"{name}: not all requests were answered with 200: {dict(tally.status)}")
                if turn >= 0:
                    rates[name].append(tally.status[200] / arguments.seconds)
    ratios = sorted(new / old for old, new in zip(rates["old"], rates["new"], strict=True))
    reach = round(0.98 * len(ratios) ** 0.5)  # ranks around the median
    middle = len(ratios) // 2
    low, high = ratios[max(0, middle - reach)], ratios[min(len(ratios) - 1, middle + reach)]
    result: dict[str, Any] = {
        "benchmark": "throughput of two versions",
        "date": datetime.date.today().isoformat(),
        "clients": arguments.clients,
        "images_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_interval": [round(low, 3), round(high, 3)],
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-throughput-pair.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
