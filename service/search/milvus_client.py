"""The connection to a Milvus server. This module runs pymilvus' client in threads, translates the client's errors, and
converts collection names to names that Milvus allows."""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import grpc
from pymilvus import MilvusClient, MilvusException

from service.addresses import bracketed_host, milvus_parts
from service.errors import CollectionNotFound, ServiceError, StorageFailed, Unavailable

PREFIX: Final = "dinov2_"
"""The prefix of the names of the service's collections and aliases in Milvus. Names without this prefix are ignored."""
_CHANNEL: Final = {
    "grpc.use_local_subchannel_pool": 1,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}
"""Options of the gRPC channel. With them, the client reconnects within a second after the server is available again.
Without them, gRPC would wait up to two minutes, and a new channel to the same server would share this wait."""
_NOT_FOUND: Final = 100
_NOT_LOADED: Final = 101
_RATE_LIMIT: Final = 8
_NO_INDEX: Final = 700


class Server:
    """A connection to a Milvus server. It calls pymilvus' client in its own threads and translates the client's errors
    to `ServiceError`."""

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = milvus_parts(url)
        self.address = f"{bracketed_host(parts)}:{parts.port or 19530}"
        self._options = {
            "uri": f"{'https' if parts.scheme == 'milvus+tls' else 'http'}://{self.address}",
            "user": unquote(parts.username or ""),
            "password": unquote(parts.password or ""),
            "db_name": parts.path.strip("/"),
        }
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="milvus")
        self._client: Any = None
        self._is_closed = False

    async def connect(self) -> None:
        def work() -> None:
            self._client = MilvusClient(**self._options, timeout=self._timeout_s, dedicated=True, grpc_options=_CHANNEL)

        try:
            await self._run(work)
        except BaseException:
            self._threads.shutdown(wait=False)
            raise

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the client and return its result. If the server has not loaded the collection, load the
        collection and call the method again."""

        def work() -> Any:
            do = partial(getattr(self._client, method), timeout=self._timeout_s, **arguments)
            try:
                return do()
            except MilvusException as error:
                if error.code != _NOT_LOADED:
                    raise
            self._load(arguments["collection_name"])
            return do()

        return await self._run(work)

    def _load(self, name: str) -> None:
        """Make the server load a collection. If the collection has no index because its creation was interrupted,
        create the index first."""
        try:
            self._client.load_collection(name, timeout=self._timeout_s)
        except MilvusException as error:
            if error.code != _NO_INDEX:
                raise
            self._client.create_index(name, index(), timeout=self._timeout_s)
            self._client.load_collection(name, timeout=self._timeout_s)

    async def _run(self, work: Callable[[], Any]) -> Any:
        if self._is_closed:
            raise StorageFailed("the vector store is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (MilvusException, grpc.RpcError, ValueError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> ServiceError:
        """Translate an error of the client to a `ServiceError` and return it. The message does not contain the
        password."""
        code = error.code() if isinstance(error, grpc.RpcError) else getattr(error, "code", None)
        message = str(getattr(error, "message", None) or getattr(error, "details", lambda: error)())
        if self._options["password"]:
            message = message.replace(self._options["password"], "***")
        if code == _NOT_FOUND:
            return CollectionNotFound(f"the collection no longer exists: {message[:200]}")
        is_away = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, _RATE_LIMIT)
        if is_away or re.search("Fail connecting|Retry timeout|Retry run out|closed channel", message):
            return Unavailable(f"Milvus at {self.address} does not answer: {message[:200]}", retry_after_s=1)
        return StorageFailed(f"Milvus at {self.address}: {message[:500]}")

    async def close(self) -> None:
        self._is_closed = True
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._client.close)


def encoded(name: str) -> str:
    """Return the name that a collection or alias has in Milvus. Milvus does not allow hyphens, so `-` becomes `_2d` and
    `_` becomes `__`."""
    return PREFIX + name.replace("_", "__").replace("-", "_2d")


def decoded(name: str) -> str | None:
    """Convert a name in Milvus back to the name of a collection or alias. Return None if it is a name that `encoded`
    never returns."""
    if not re.fullmatch(f"{PREFIX}[a-z0-9]([a-z0-9]|__|_2d)*", name):
        return None
    return re.sub("_(_|2d)", lambda escape: "_" if escape[1] == "_" else "-", name.removeprefix(PREFIX))


def index() -> Any:
    """Return the parameters of the vector index. They are the same for all collections."""
    parameters = MilvusClient.prepare_index_params()
    parameters.add_index("vector", index_type="HNSW", metric_type="IP", params={"M": 32, "efConstruction": 200})
    return parameters
