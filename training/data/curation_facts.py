"""What the provenance of a run says about its curated datasets: which of their images it has trained on.

A dataset that `dinov2 curate` has written is named by its folder, or by its shards, local or at URLs. The folder of the
shards then has the `curation.json` with the digests.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from training.data.blobs import HTTP_TIMEOUT_S, open_blob
from training.data.curated import CURATION, PARTS, Curation, open_curation, parse_curation
from training.data.sources import INDEXING_THREADS, address_of, shard_urls

MAX_BYTES = 2**26
"""The largest size of a `curation.json` that is read from a server. One with 100,000 shards has 30 MB."""


def curation_facts(data: Sequence[str]) -> list[dict[str, Any]]:
    """Return the digests of the curated images of a run.

    There is one entry for each address in `data` that is a dataset that `dinov2 curate` has written, or names shards of
    one. It has the number of the source, counted from 1, the digests of the images (`sha256`), and their numbers by
    part (`images`). If an address names only some shards of a part, `shards` has the sha256 of each instead of the
    digest of the part.

    There is no entry for shards whose folder has no readable `curation.json`, or one that does not describe them.

    Raises:
        ValueError: see `open_curation`.
    """
    facts = []
    with httpx.Client(follow_redirects=True, timeout=HTTP_TIMEOUT_S) as client:
        for number, address in enumerate(data, 1):
            text = address_of(address)
            curation = None if "://" in text else open_curation(Path(text))
            if curation is not None:
                facts.append({"source": number, "sha256": dict(curation.digests), "images": dict(curation.counts)})
            elif not Path(text).is_dir() and (of_shards := _facts_of_shards(text, client)) is not None:
                facts.append({"source": number, **of_shards})
    return facts


def _facts_of_shards(address: str, client: httpx.Client) -> dict[str, Any] | None:
    """Return the digests and numbers of the images in the shards at an address, if they are known."""
    try:
        urls = shard_urls(address)
        [folder] = {url.partition("?")[0].rpartition("/")[0] for url in urls}
        curation = _curation_at(folder, urls[0].partition("?")[2], client)
    except (ValueError, OSError):  # no shards, shards of several folders, or no `curation.json` that can be read
        return None
    if curation is None or curation.form != "shards":
        return None
    described = {file["name"]: file for file in curation.files}
    used = {url.partition("?")[0].rpartition("/")[2]: url for url in urls}
    if not used.keys() <= described.keys() or not _have_sizes(used, described, client):
        return None
    return _used_parts(curation, described, used.keys())


def _curation_at(folder: str, query: str, client: httpx.Client) -> Curation | None:
    """Read the `curation.json` in a folder, which is a path or a URL. `query` is that of the URLs of the shards."""
    url = f"{folder}/{CURATION}" if folder else CURATION
    blob = open_blob(f"{url}?{query}" if query else url, client)
    if blob.size > MAX_BYTES:
        raise ValueError(f"{blob.url} has {blob.size:,} bytes")
    return parse_curation(blob.read(0, blob.size), blob.url)


def _have_sizes(used: Mapping[str, str], described: Mapping[str, Mapping[str, Any]], client: httpx.Client) -> bool:
    """Return whether the shards at the URLs `used`, by name, have the sizes in bytes that `curation.json` says."""
    with ThreadPoolExecutor(INDEXING_THREADS) as pool:
        sizes = pool.map(lambda url: open_blob(url, client).size, used.values())
        return all(size == described[name]["bytes"] for name, size in zip(used, sizes, strict=True))


def _used_parts(
    curation: Curation, described: Mapping[str, Mapping[str, Any]], used: AbstractSet[str]
) -> dict[str, Any]:
    """Return the digests and numbers of the images in the shards with the names `used`. See `curation_facts`."""
    digests, images, shards = dict[str, str](), dict[str, int](), dict[str, str]()
    for part in PARTS:
        names = {name for name in described if name.startswith(f"{part}-")}
        mine = sorted(names & used)
        if mine:
            images[part] = sum(described[name]["images"] for name in mine)
        if names and len(mine) == len(names):
            digests[part] = curation.digests[part]
        else:
            shards |= {name: described[name]["sha256"] for name in mine}
    if len(used) == len(described):
        return {"sha256": dict(curation.digests), "images": dict(curation.counts)}
    return {"sha256": digests, "images": images, **({"shards": shards} if shards else {})}
