"""The engines that `benchmarks/search.py` compares, and a fast HTTP client and empty servers.

The engines are our store, faiss, hnswlib, usearch and Qdrant Edge. Each is called as directly as possible. Each is
built once into a folder and opened from there. Item n of the data has the id n in every engine. All graphs have M = 32
and efConstruction = 100, and they are searched with the efSearch that our store has chosen. Our store and Qdrant Edge
return the metadata of the hits. The others return only ids.
"""

import asyncio
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.artifact import read_manifest
from model.cpus import available_cpus
from service import sqlite
from service.search import database
from service.search.database import SegmentRow
from service.search.embedded import EmbeddedStore, open_embedded
from service.search.filters import Between
from service.search.segment_files import open_segment
from service.search.store import CollectionSpec, Hit, IndexSpec, Item

BUNDLED = next((Path(__file__).parents[1] / "model" / "bundled").iterdir())
FINGERPRINT = "benchmark"
HEIGHT, WIDTH = read_manifest(BUNDLED).input_size
TAG = f"{FINGERPRINT}/cls/l2/{HEIGHT}x{WIDTH}/fp32"
"""The vector tag of the collection, which a search with `FINGERPRINT` requires in a service with the bundled model."""
NAME, K, BATCH = "photos", 10, 2000
M, EF_CONSTRUCTION = 32, 100
KEYS = ("rank", "region")


@dataclass(frozen=True)
class Where:
    """A filter for the items with a metadata value in [low, high). `bits` is the bitmap of these items."""

    key: str
    low: int
    high: int
    bits: np.ndarray


class Engine:
    """An opened search engine.

    Attributes:
        name: name of the engine in the tables.
        waits: whether `search` returns a coroutine.
        filters: whether the engine supports filters.
    """

    name: str
    waits = False
    filters = True

    def native(self, where: Where) -> Any:
        """Return a filter in the form of this engine. It is created before the time is measured."""
        raise NotImplementedError

    def search(self, query: np.ndarray, where: Any = None) -> Any:
        """Search for the K nearest items of one query [1, D], and return the result in the form of this engine."""
        raise NotImplementedError

    def places(self, answer: Any) -> list[int]:
        """Return the numbers of the items in a result of `search`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close the files of the engine."""


# ---- ours


class Ours(Engine):
    waits = True

    def __init__(self, kind: str, store: EmbeddedStore) -> None:
        self.name, self.store = f"ours {kind}", store

    def native(self, where: Where) -> Between:
        return Between((where.key,), (("gte", where.low), ("lt", where.high)))

    def search(self, query: np.ndarray, where: Any = None) -> Any:
        return self.store.search(NAME, query, K, tag=TAG, where=where)

    def places(self, answer: list[list[Hit]]) -> list[int]:
        return [int(hit.id) for hit in answer[0]]

    async def close(self) -> None:
        await self.store.close()


async def open_ours(folder: Path, kind: str) -> Ours:
    store = await open_embedded(folder / kind, build_threads=available_cpus())
    assert isinstance(store, EmbeddedStore)
    return Ours(kind, store)


async def build_ours(folder: Path, kind: str, vectors: np.ndarray, keys: dict[str, np.ndarray]) -> dict[str, Any]:
    ours = await open_ours(folder, kind)
    spec = CollectionSpec(TAG, vectors.shape[1], index=IndexSpec(kind), indexed=KEYS)  # type: ignore[arg-type]
    await ours.store.create(NAME, spec)
    writing = 0.0
    for begin in range(0, len(vectors), BATCH):
        rows = zip(*(keys[key][begin : begin + BATCH].tolist() for key in KEYS), strict=True)
        some = [
            Item(str(begin + n), vector, dict(zip(KEYS, row, strict=True)))
            for n, (vector, row) in enumerate(zip(vectors[begin : begin + BATCH], rows, strict=True))
        ]
        started = time.perf_counter()
        await ours.store.upsert(NAME, some, tag=TAG)
        writing += time.perf_counter() - started
    started = time.perf_counter()
    await ours.store.settle(NAME)
    settling = time.perf_counter() - started
    segments = (await ours.store.stats(NAME))["segments"]
    await ours.close()
    figures = {"write_s": writing, "index_s": settling, "segments": len(segments)}
    return {**figures, "built_as": segments[0]["kind"], "effort": segments[0]["effort"]}


def segment_row(folder: Path, kind: str) -> SegmentRow:
    with closing(sqlite.connect(folder / kind / "search.sqlite3", read_only=True)) as db:
        [row] = database.segments(db, database.find(db, NAME).key)
    return row


# ---- faiss


class Faiss(Engine):
    def __init__(self, name: str, index: Any, ef: int | None) -> None:
        self.name, self._index, self._ef = name, index, ef
        self._plain = self._parameters(None)

    def _parameters(self, selector: Any) -> Any:
        if self._ef is None:
            return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        return faiss.SearchParametersHNSW(efSearch=self._ef, sel=selector)

    def native(self, where: Where) -> Any:
        return self._parameters(faiss.IDSelectorBitmap(where.bits))  # type: ignore[call-arg]

    def search(self, query: np.ndarray, where: Any = None) -> Any:
        return self._index.search(query, K, params=where or self._plain)

    def places(self, answer: Any) -> list[int]:
        return [place for place in answer[1][0].tolist() if place >= 0]


def open_faiss_flat(folder: Path, kind: str) -> Faiss:
    """Open the vectors of our store as a flat faiss index in memory. The file of our store has the format of faiss."""
    path = folder / kind / "segments" / segment_row(folder, kind).folder / "vectors.faiss"
    return Faiss("faiss flat", faiss.read_index(str(path)), None)


def open_faiss_hnsw(folder: Path, ef: int) -> Faiss | None:
    """Return a faiss HNSW index, which is the one that `build_faiss` wrote or else the graph of our store.

    Return None if neither exists.
    """
    path = folder / "faiss.index"
    if path.exists():
        return Faiss("faiss hnsw", faiss.read_index(str(path)), ef)
    if not (folder / "hnsw").exists() or (row := segment_row(folder, "hnsw")).kind != "hnsw":
        return None
    return Faiss("faiss hnsw", open_segment(folder / "hnsw" / "segments", row, "float32").index, ef)


def build_faiss(folder: Path, vectors: np.ndarray) -> dict[str, float]:
    faiss.omp_set_num_threads(available_cpus())
    index = faiss.IndexHNSWFlat(vectors.shape[1], M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    started = time.perf_counter()
    for begin in range(0, len(vectors), BATCH):
        index.add(vectors[begin : begin + BATCH])
    seconds = time.perf_counter() - started
    faiss.write_index(index, str(folder / "faiss.index"))
    return {"write_s": 0.0, "index_s": seconds}


# ---- hnswlib


class Hnswlib(Engine):
    name, filters = "hnswlib", False

    def __init__(self, folder: Path, dimension: int, ef: int) -> None:
        import hnswlib

        self._index = hnswlib.Index("ip", dimension)
        self._index.load_index(str(folder / "hnswlib.index"))
        self._index.set_num_threads(1)
        self._index.set_ef(ef)

    def search(self, query: np.ndarray, where: Any = None) -> Any:
        return self._index.knn_query(query, K)

    def places(self, answer: Any) -> list[int]:
        return answer[0][0].tolist()


def build_hnswlib(folder: Path, vectors: np.ndarray) -> dict[str, float]:
    import hnswlib

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), ef_construction=EF_CONSTRUCTION, M=M)
    started = time.perf_counter()
    for begin in range(0, len(vectors), BATCH):
        some = vectors[begin : begin + BATCH]
        index.add_items(some, np.arange(begin, begin + len(some)), num_threads=available_cpus())
    seconds = time.perf_counter() - started
    index.save_index(str(folder / "hnswlib.index"))
    return {"write_s": 0.0, "index_s": seconds}


# ---- usearch


class Usearch(Engine):
    name, filters = "usearch", False

    def __init__(self, folder: Path, dimension: int, ef: int) -> None:
        self._index = _usearch(dimension, ef)
        self._index.load(str(folder / "usearch.index"))
        self._index.expansion_search = ef  # loading replaces this value with the saved one

    def search(self, query: np.ndarray, where: Any = None) -> Any:
        return self._index.search(query[0], K, threads=1)

    def places(self, answer: Any) -> list[int]:
        return answer.keys.tolist()


def _usearch(dimension: int, ef: int) -> Any:
    from usearch.index import Index

    return Index(
        ndim=dimension,
        metric="ip",
        dtype="f32",
        connectivity=M,
        expansion_add=EF_CONSTRUCTION,
        expansion_search=ef,
    )


def build_usearch(folder: Path, vectors: np.ndarray) -> dict[str, float]:
    index = _usearch(vectors.shape[1], 64)
    started = time.perf_counter()
    for begin in range(0, len(vectors), BATCH):
        some = vectors[begin : begin + BATCH]
        index.add(np.arange(begin, begin + len(some)), some, threads=available_cpus())
    seconds = time.perf_counter() - started
    index.save(str(folder / "usearch.index"))
    return {"write_s": 0.0, "index_s": seconds}


# ---- Qdrant Edge


class Qdrant(Engine):
    name = "qdrant edge"

    def __init__(self, folder: Path, ef: int) -> None:
        import qdrant_edge

        self._edge = qdrant_edge
        self._shard = qdrant_edge.EdgeShard.load(str(folder / "qdrant"))
        self._params = qdrant_edge.SearchParams(hnsw_ef=ef)

    def native(self, where: Where) -> Any:
        span = self._edge.RangeFloat(gte=where.low, lt=where.high)
        return self._edge.Filter(must=[self._edge.FieldCondition(where.key, range=span)])

    def search(self, query: np.ndarray, where: Any = None) -> Any:
        nearest = self._edge.Query.Nearest(query[0].tolist())
        return self._shard.search(
            self._edge.SearchRequest(nearest, K, filter=where, params=self._params, with_payload=True)
        )

    def places(self, answer: Any) -> list[int]:
        return [point.id for point in answer]

    async def close(self) -> None:
        self._shard.close()


def build_qdrant(folder: Path, vectors: np.ndarray, keys: dict[str, np.ndarray]) -> dict[str, Any]:
    import qdrant_edge as edge

    (folder / "qdrant").mkdir()
    config = edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(vectors.shape[1], edge.Distance.Dot),
        hnsw_config=edge.HnswIndexConfig(M, EF_CONSTRUCTION, 10_000, available_cpus()),  # 10,000 KB is the default
        optimizers=edge.EdgeOptimizersConfig(default_segment_number=1),
    )
    shard = edge.EdgeShard.create(str(folder / "qdrant"), config)
    for key in KEYS:
        shard.update(edge.UpdateOperation.create_field_index(key, edge.PayloadSchemaType.Integer))
    writing = 0.0
    for begin in range(0, len(vectors), BATCH):
        lists = vectors[begin : begin + BATCH].tolist()
        some = [
            edge.Point(begin + n, vector, {key: int(keys[key][begin + n]) for key in KEYS})
            for n, vector in enumerate(lists)
        ]
        started = time.perf_counter()
        shard.update(edge.UpdateOperation.upsert_points(some))
        writing += time.perf_counter() - started
    started = time.perf_counter()
    shard.optimize()
    shard.flush()
    seconds, info = time.perf_counter() - started, shard.info()
    shard.close()
    figures = {"write_s": writing, "index_s": seconds, "segments": info.segments_count}
    return {**figures, "indexed": info.indexed_vectors_count}


# ---- all


def build(folder: Path, name: str, vectors: np.ndarray, keys: dict[str, np.ndarray]) -> dict[str, Any]:
    """Build an engine from scratch. Return the seconds of writing the vectors, the seconds of completing the index, and
    other figures.
    """
    for left in (folder / name, folder / f"{name}.index"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    plain: dict[str, Callable[[Path, np.ndarray], dict[str, Any]]] = {
        "faiss": build_faiss,
        "hnswlib": build_hnswlib,
        "usearch": build_usearch,
    }
    if name in plain:
        return plain[name](folder, vectors)
    if name == "qdrant":
        return build_qdrant(folder, vectors, keys)
    return asyncio.run(build_ours(folder, name, vectors, keys))


async def open_all(folder: Path, kinds: list[str], peers: list[str], dimension: int, ef: int) -> list[Engine]:
    faiss.omp_set_num_threads(1)
    engines: list[Engine] = [await open_ours(folder, kind) for kind in kinds]
    engines.append(open_faiss_flat(folder, kinds[0]))
    if graph := open_faiss_hnsw(folder, ef):
        engines.append(graph)
    if "hnswlib" in peers:
        engines.append(Hnswlib(folder, dimension, ef))
    if "usearch" in peers:
        engines.append(Usearch(folder, dimension, ef))
    if "qdrant" in peers:
        engines.append(Qdrant(folder, ef))
    return engines


# ---- HTTP


class Client(asyncio.Protocol):
    """A keep-alive connection that sends the next request as soon as the previous response is complete."""

    def __init__(self, requests: list[bytes], at: int, until: float) -> None:
        self._requests, self._at, self._until = requests, at, until
        self._buffer, self._needed, self._sent = bytearray(), 0, 0.0
        self.seconds: list[float] = []
        self.last = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._at = (self._at + 1) % len(self._requests)
        self._sent = time.perf_counter()
        self._transport.write(self._requests[self._at])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._needed:
            end = self._buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            head = bytes(self._buffer[:end]).lower()
            length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head)
            if not head.startswith(b"http/1.1 200 ") or length is None:
                self.done.set_exception(
                    RuntimeError(f"not a response with status 200 and Content-Length: {bytes(self._buffer[:500])!r}")
                )
                self._transport.close()
                return
            self._needed = end + int(length[1])
        if len(self._buffer) < self._needed:
            return
        now = time.perf_counter()
        self.seconds.append(now - self._sent)
        self.last = bytes(self._buffer)
        self._buffer.clear()
        self._needed = 0
        if now < self._until:
            self._send()
        else:
            self.done.set_result(None)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionResetError("the server closed the connection"))


def load(ports: list[int], requests: list[bytes], clients: int, seconds: float) -> tuple[float, np.ndarray, bytes]:
    """Send requests for some seconds from several clients, which are distributed over the ports.

    Return the responses per second, the seconds of each request, and one response.
    """

    async def run() -> tuple[float, np.ndarray, bytes]:
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        made = []
        for n in range(clients):
            client = Client(requests, n * len(requests) // clients, started + seconds)
            made.append(client)
            port = ports[n % len(ports)]
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
        await asyncio.gather(*(client.done for client in made))
        times = np.concatenate([client.seconds for client in made])
        return len(times) / (time.perf_counter() - started), times, made[0].last

    return uvloop.run(run())


def serve_nothing(name: str, port: int) -> None:
    """Run a server that parses the JSON of a request and returns an empty object.

    It uses FastAPI if `name` is "empty fastapi", and otherwise no framework.
    """
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    @app.post("/v1/collections/{name}/search")
    async def nothing(request: Request, name: str) -> Response:
        orjson.loads(await request.body())
        return Response(b"{}", media_type="application/json")

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        orjson.loads(body)
        headers = [(b"content-length", b"2"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    uvicorn.run(
        app if name == "empty fastapi" else bare,  # type: ignore[arg-type]
        port=port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
    )
