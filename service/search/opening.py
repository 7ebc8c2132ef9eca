"""Opens the vector store that the settings name. No other module chooses between the kinds of vector store.

The packages that a store needs are imported only if the settings name this store, because pymilvus is an optional
dependency.
"""

from dataclasses import fields
from typing import Any

from model.cpus import available_cpus
from service.search.quotas import Quotas
from service.search.store import VectorStore
from service.settings import Settings


def quotas_of(settings: Settings) -> Quotas:
    return Quotas(**{each.name: getattr(settings, each.name) for each in fields(Quotas)})


async def open_store(settings: Settings, **embedded_options: Any) -> VectorStore:
    """Open the store that `settings.vector_store` names, and return it. If it is the embedded store, `embedded_options`
    are passed to `open_embedded`.

    Raises:
        ModuleNotFoundError: pymilvus is needed but not installed. The message says how to install it.
        StorageFailed: the data folder cannot be used, or Milvus refuses the connection.
        Unavailable: Milvus cannot be reached.
    """
    if settings.vector_store == "embedded":
        from service.search.embedded import open_embedded

        threads = max(1, available_cpus() // settings.workers)
        options: dict[str, Any] = {"threads": threads, "quotas": quotas_of(settings), **embedded_options}
        return await open_embedded(settings.data_dir, **options)
    try:
        from service.search.milvus import open_milvus
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("pymilvus", "grpc"):
            raise
        raise ModuleNotFoundError(
            "vector_store is Milvus, but its client is not installed: python -m pip install pymilvus",
            name=error.name,
        ) from error
    return await open_milvus(settings.vector_store)
