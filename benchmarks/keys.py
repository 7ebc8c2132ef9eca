"""Measures what API keys cost: a search by vector with a key, and the same search with the setting auth=off.

    python benchmarks/keys.py --out benchmarks/results/DATE-keys.json

The service runs in this process and is called without a network, so the share of the keys is the largest possible. The
two cases take turns in short rounds, because the speed of a machine drifts.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from service.keys import KeyStore
from service.security import Security, require
from service.settings import Settings
from tests.fakes import DIMS, Running, running

ITEMS, CALLS, OTHER_KEYS = 1000, 20, 20
Headers = list[tuple[bytes, bytes]]


async def filled(stack: AsyncExitStack, folder: Path) -> Running:
    """Start a service with a collection of random vectors."""
    run = await stack.enter_async_context(running(folder))
    rng = np.random.default_rng(0)
    items = [{"id": f"{i}", "vector": rng.normal(size=DIMS).tolist()} for i in range(ITEMS)]
    (await run.client.post("/v1/collections/shop/items", json={"items": items})).raise_for_status()
    return run


async def search(app: Any, headers: Headers, body: bytes) -> None:
    """Call the application once, as an HTTP server would."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        return message or await asyncio.Event().wait()  # type: ignore[return-value]

    status = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    path = "/v1/collections/shop/search"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    await app(scope | {"headers": headers, "client": ("127.0.0.1", 1)}, receive, send)
    assert status == 200, status


async def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            app = (await filled(stack, Path(folder))).app
            security, ring = app.state.security, app.state.security._ring
            store = KeyStore(Path(folder))
            keys = [store.create(f"client-{number}", ["read"])[0] for number in range(OTHER_KEYS)]
            common = [(b"host", b"service"), (b"content-type", b"application/json"), (b"user-agent", b"benchmark")]
            common += [(b"accept", b"*/*"), (b"connection", b"keep-alive")]
            body = json.dumps({"vector": [1.0] * DIMS, "k": 10}).encode()
            times: dict[str, list[float]] = {"without keys": [], "with keys": []}
            for number in range(rounds):
                key = keys[number % OTHER_KEYS].encode()
                with_key = [*common, (b"authorization", b"Bearer " + key)]
                variants = [("without keys", None, common), ("with keys", ring, with_key)]
                for name, chosen, headers in variants if number % 2 else reversed(variants):
                    security._ring = chosen  # None is what the setting auth=off makes of it
                    started = time.perf_counter()
                    for _ in range(CALLS):
                        await search(app, headers, body)
                    times[name].append((time.perf_counter() - started) / CALLS * 1e6)
            differences = [b - a for a, b in zip(times["without keys"], times["with keys"], strict=True)]
            settings = Settings(data_dir=Path(folder))
            check_us = check_alone(settings, [*common, (b"authorization", b"Bearer " + keys[0].encode())])
    median = statistics.median(times["without keys"])
    return {
        "search_us_without_keys": round(median, 1),
        "search_us_with_keys": round(statistics.median(times["with keys"]), 1),
        "difference_us_median_of_rounds": round(statistics.median(differences), 2),
        "share_percent": round(100 * statistics.median(differences) / median, 2),
        "check_alone_us": round(check_us, 3),
        "rounds": rounds,
        "calls_per_round": CALLS,
    }


def check_alone(settings: Settings, headers: Headers) -> float:
    """Return the time in microseconds that the check of one request takes, without anything else."""
    security = Security(settings)
    security.open()
    by_name = dict(headers)

    def check() -> None:
        scope: dict[str, Any] = {"method": "POST", "headers": headers, "state": {}}
        security.admit(scope, by_name)
        require(scope["state"], "read")

    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(5000):
            check()
        best = min(best, (time.perf_counter() - started) / 5000 * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = asyncio.run(measure(options.rounds))
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
