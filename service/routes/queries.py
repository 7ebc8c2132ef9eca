"""What a search request asks for, read and checked, before anything is computed.

A body is one query, a list of them, or a photo with options. A query names what to search for in one of five forms; all
but `region` come down to parts: a photo, a vector or an item's id, each with a weight. A vector becomes an array here,
at once: it is most of the body of the commonest request, and pydantic would make a list of floats of it first.

Of a list, a query that makes no sense becomes an error of its own, as photos do elsewhere.
"""

import reprlib
import struct
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import Request
from pydantic import FailFast, Field, TypeAdapter, ValidationError

from service.errors import InvalidRequest
from service.outcomes import OnError, Outcome, attempt_await, numbered, successes
from service.routes.uploads import (
    Model,
    check_count,
    check_fields,
    decode_texts,
    json_of,
    media_type,
    parse_options,
    read_upload,
)
from service.schemas import MAX_PARTS, ParamsIn, PartIn, QueryIn, Ranking, SearchIn, SearchOptions
from service.search.filters import MAX_VALUES, And, Filter, In, Not, Or, parse_filter, parse_path
from service.search.specs import MAX_DIMENSION
from service.search.store import MAX_DEPTH, SearchParams, check_id
from service.settings import Settings

FORMS: Final = ("image", "vector", "id", "combine", "region")
MAX_RESULTS_OF_BATCH: Final = MAX_DEPTH
DEFAULT_RERANK_DEPTH: Final = 20
_FLOATS: Final = TypeAdapter(Annotated[list[Annotated[float, Field(strict=True)]], FailFast()])


@dataclass(frozen=True)
class Part:
    """One of what is searched for: a photo, a vector or an id."""

    image: Outcome[bytes] | None = None  # its index is that of the part
    vector: npt.NDArray[np.float64] | None = None  # [D], of any scale
    id: str | None = None
    fingerprint: str | None = None  # of the model that made the vector, if the client told
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """One query, checked: `form` is one of `FORMS`, `asked` what else the request said."""

    form: str
    parts: tuple[Part, ...]  # of a region: its photo
    asked: Ranking
    region: dict[str, Any] | None = None  # {"box": (x, y, w, h)} or {"mask": {"size": ..., "counts": ...}}
    where: Filter | None = None
    path: tuple[str, ...] | None = None  # of the key that is grouped by
    params: SearchParams | None = None
    like: bytes = b""  # queries with the same `like` can share one call of the store

    @property
    def needs_model(self) -> bool:
        """Whether the served model computes something for it."""
        return any(part.image is not None for part in self.parts)

    @property
    def needs_patches(self) -> bool:
        """Whether the patch tokens of its photo are needed, not only its vector."""
        return self.form == "region" or (self.form == "image" and self.asked.rerank is not None)


@dataclass(frozen=True)
class Asked:
    """A whole request: its queries, of a batch with the errors of those that make no sense."""

    queries: list[Outcome[Query]]
    model: str = "auto"
    batch: bool = False
    on_error: OnError = "fail"


@dataclass
class _Reader:
    """Reads queries; what several of them share is read once."""

    settings: Settings
    filters: dict[int, Filter] = field(default_factory=dict)  # by the object's identity: it outlives the reader
    values: int = 0  # in all of them

    async def query(self, fields: dict[str, Any], known: QueryIn | None = None) -> Query:
        body = known or _parsed(QueryIn, fields)
        given = [form for form in FORMS if getattr(body, form) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"exactly one of {', '.join(FORMS)} is needed, not {' and '.join(given) or 'none'}")
        [form] = given
        if body.fingerprint is not None and form != "vector":
            raise InvalidRequest("fingerprint says which model made `vector`, and there is none", param="fingerprint")
        region = None
        if form == "combine":
            assert body.combine is not None
            parts = tuple(
                [await self._part(part, part.weight, f"combine.{i}.", i) for i, part in enumerate(body.combine)]
            )
        elif form == "region":
            assert body.region is not None
            region = body.region.model_dump(include={"box", "mask"}, exclude_none=True)
            if len(region) != 1:
                raise InvalidRequest(
                    f"region: exactly one of box and mask is needed, not {' and '.join(region) or 'none'}",
                    param="region",
                )
            parts = (Part(image=await self._image(body.region.image)),)
        else:
            parts = (await self._part(body, 1.0, ""),)
        return self.ranked(form, parts, body, region)

    def ranked(self, form: str, parts: tuple[Part, ...], asked: Ranking, region: dict[str, Any] | None = None) -> Query:
        """With the fields that all forms share."""
        if asked.k + asked.offset > MAX_DEPTH:
            raise InvalidRequest(f"k + offset is {asked.k + asked.offset}; at most {MAX_DEPTH:,}", param="offset")
        _check_grouping_and_rerank(form, asked)
        return Query(
            form,
            parts,
            asked,
            region,
            where=None if asked.filter is None else self._filter(asked.filter),
            path=None if asked.group_by is None else parse_path(asked.group_by, "group_by"),
            params=search_params(asked.params),
            like=orjson.dumps([asked.k + asked.offset, asked.filter, asked.params and asked.params.model_dump()]),
        )

    async def _part(self, given: PartIn | QueryIn, weight: float, where: str, index: int = 0) -> Part:
        names = [name for name in ("image", "vector", "id") if getattr(given, name) is not None]
        if len(names) != 1:
            raise InvalidRequest(
                f"{where.rstrip('.')}: exactly one of image, vector and id is needed, not "
                f"{' and '.join(names) or 'none'}",
                param="combine",
            )
        if given.vector is not None:
            return Part(
                vector=read_vector(given.vector, f"{where}vector"), fingerprint=given.fingerprint, weight=weight
            )
        if given.fingerprint is not None:
            raise InvalidRequest(f"{where}fingerprint says which model made a vector; there is none", param="combine")
        if given.id is not None:
            return Part(id=check_id(given.id, f"{where}id"), weight=weight)
        return Part(image=await self._image(given.image, index), weight=weight)

    async def _image(self, text: str | None, index: int = 0) -> Outcome[bytes]:
        return replace((await decode_texts([text], self.settings))[0], index=index)

    def _filter(self, body: Any) -> Filter:
        if id(body) not in self.filters:
            if self.values <= MAX_VALUES:  # else the next ones need not even be read
                self.filters[id(body)] = parse_filter(body)
                self.values += _count_values(self.filters[id(body)])
            if self.values > MAX_VALUES:
                raise InvalidRequest(f"the filters of one request hold more than {MAX_VALUES:,} values", param="filter")
        return self.filters[id(body)]


async def read_search(request: Request, settings: Settings) -> Asked:
    """The request's queries: JSON with one or with `queries`, or a photo as a form's file or a raw body.

    Raises:
        ServiceError: what is wrong with the request as a whole, or with its only query.
    """
    reader = _Reader(settings)
    if media_type(request) != "application/json":
        upload = await read_upload(request, key="image")
        check_count(len(upload.images), settings.model_copy(update={"max_batch_items": 1}), "file")
        options = parse_options(SearchOptions, _from_text(upload.fields))
        query = reader.ranked("image", (Part(image=upload.images[0]),), options)
        return Asked(numbered([query]), options.model)
    fields = await json_of(request)
    body = _parsed(SearchIn, fields)
    if body.queries is None:
        if "on_error" in fields:
            raise InvalidRequest("on_error belongs to queries, and there are none", param="on_error")
        query = await reader.query(fields, body)
        _check_images([query], settings)
        return Asked(numbered([query]), body.model)
    forms = [name for name in (*FORMS, "fingerprint") if getattr(body, name) is not None]
    if forms:
        raise InvalidRequest(f"{' and '.join(forms)} beside queries: say it in each of them", param="queries")
    shared = {name: value for name, value in fields.items() if name in Ranking.model_fields}
    queries = [await attempt_await(i, _one_of_many(reader, shared, given)) for i, given in enumerate(body.queries)]
    _check_batch(successes(queries), settings)
    return Asked(queries, body.model, batch=True, on_error=body.on_error)


def _parsed(model: type[Model], fields: dict[str, Any]) -> Model:
    """`parse_options`, and no object within may have very many fields either."""
    combine, region, params = fields.get("combine"), fields.get("region"), fields.get("params")
    parts = combine[: MAX_PARTS + 1] if isinstance(combine, list) else []
    mask = region.get("mask") if isinstance(region, dict) else None
    for where, value in (
        ("region", region),
        ("mask", mask),
        ("params", params),
        *(("combine", part) for part in parts),
    ):
        if isinstance(value, dict):
            check_fields(value, where)
    return parse_options(model, fields)


async def _one_of_many(reader: _Reader, shared: dict[str, Any], given: Any) -> Query:
    if not isinstance(given, dict):
        raise InvalidRequest(f"a query is an object, not {reprlib.repr(given)}")
    check_fields(given, "the query")
    query = await reader.query({**shared, **given})
    if query.asked.rerank is not None:
        raise InvalidRequest("rerank goes through the photos of one query: send it by itself", param="rerank")
    return query


def _check_batch(queries: list[Query], settings: Settings) -> None:
    """What all queries of a request may cost together."""
    _check_images(queries, settings)
    results = sum(query.asked.k * (query.asked.group_size or 1) + query.asked.offset for query in queries)
    if results > MAX_RESULTS_OF_BATCH:
        raise InvalidRequest(
            f"the queries ask for {results:,} results together (k times group_size, plus offset); "
            f"at most {MAX_RESULTS_OF_BATCH:,}",
            param="queries",
        )


def _check_images(queries: list[Query], settings: Settings) -> None:
    images = sum(part.image is not None for query in queries for part in query.parts)
    if images > settings.items_per_request:
        raise InvalidRequest(f"{images} images to search for: a request takes {settings.items_per_request}")


def read_vector(value: Any, where: str) -> npt.NDArray[np.float64]:
    """A JSON value as a vector [D].

    Raises:
        InvalidRequest: not a list of 1 to `MAX_DIMENSION` numbers; the message names the first that is none. Or all of
            them are 0.
    """
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_DIMENSION:
        size = f" of {len(value):,}" if isinstance(value, list) else ""
        raise InvalidRequest(
            f"{where}: a vector is a list of 1 to {MAX_DIMENSION:,} numbers, not {reprlib.repr(value)}{size}",
            param=where[:80],
        )
    try:
        numbers = _FLOATS.validate_python(value)
    except ValidationError as error:
        index = error.errors(include_url=False, include_context=False)[0]["loc"][0]
        assert isinstance(index, int)
        raise InvalidRequest(
            f"{where}.{index}: a number is needed, not {reprlib.repr(value[index])}", param=where[:80]
        ) from error
    if not any(numbers):
        raise InvalidRequest(
            f"{where}: {len(numbers)} zeros have no direction, so nothing is similar", param=where[:80]
        )
    return np.frombuffer(struct.pack(f"{len(numbers)}d", *numbers))  # a third of the time of np.array


def _count_values(condition: Filter) -> int:
    if isinstance(condition, And | Or):
        return sum(_count_values(part) for part in condition.parts)
    if isinstance(condition, Not):
        return _count_values(condition.part)
    return len(condition.values) if isinstance(condition, In) else 1


def search_params(given: ParamsIn | None) -> SearchParams | None:
    """As the store takes them."""
    return None if given is None else SearchParams(given.exact, given.ef_search, given.nprobe)


def _check_grouping_and_rerank(form: str, asked: Ranking) -> None:
    if asked.group_size is not None and asked.group_by is None:
        raise InvalidRequest("group_size needs group_by", param="group_size")
    if asked.rerank is None:
        if asked.matches or asked.rerank_depth is not None:
            raise InvalidRequest("matches and rerank_depth need rerank", param="rerank")
        return
    if asked.group_by is not None:
        raise InvalidRequest("rerank and group_by do not go together", param="rerank")
    if form not in ("image", "region", "id"):
        raise InvalidRequest(
            f"rerank compares photos, and a query by {form} has none: use image, region or id", param="rerank"
        )


def _from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Options of a form or an address, where everything is text: JSON within it, one `include` as a list."""
    read = dict(fields)
    for name in ("filter", "params"):
        if isinstance(read.get(name), str):
            try:
                read[name] = orjson.loads(read[name])
            except orjson.JSONDecodeError as error:
                raise InvalidRequest(f"{name} is not JSON: {error}", param=name) from error
    if isinstance(read.get("include"), str):
        read["include"] = [read["include"]]
    return read
