"""Parse and check the queries of a search request before anything is computed.

A request contains one query, a list of queries, or an image with options. `read_vector` parses a vector separately from
the rest of the request, because this is faster and most requests consist mainly of a vector.

An invalid query in a list does not prevent the other queries from being parsed.
"""

import binascii
import math
import reprlib
import struct
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import FailFast, Field, TypeAdapter, ValidationError

from service.data_urls import decode_texts
from service.errors import InvalidRequest
from service.options import Model, check_fields, parse_options
from service.outcomes import Outcome, attempt, numbered, successes
from service.retrieval.query import FORMS, Part, Query, SearchRequest, Vector
from service.schemas import MAX_PARTS, ParamsIn, PartIn, QueryIn, Ranking, SearchIn, SearchOptions
from service.search.checks import check_id
from service.search.filters import MAX_VALUES, And, Filter, In, Not, Or, parse_filter, parse_path
from service.search.specs import MAX_DIMENSION
from service.search.store import MAX_DEPTH, SearchParams
from service.settings import Settings
from service.web_images import WebImages

MAX_RESULTS_OF_BATCH: Final = MAX_DEPTH
_FLOAT_BYTES: Final = 4
_MAX_TEXT: Final = 4 * (MAX_DIMENSION * _FLOAT_BYTES // 3 + 2)  # characters of base64, and more than a vector can have
_FLOATS: Final = TypeAdapter(Annotated[list[Annotated[float, Field(strict=True)]], FailFast()])


@dataclass
class _Reader:
    """A parser for the queries of one request. A filter that several queries share is parsed only once. In the parsed
    queries, each image is still as it was sent. `_with_images` decodes the images of all queries together."""

    filters: dict[int, Filter] = field(default_factory=dict)  # by `id()` of the JSON object, which outlives the reader
    values: int = 0  # number of values in all filters

    def query(self, fields: dict[str, Any], body: QueryIn | None = None) -> Query:
        """Parse and check one query, and return it. If the caller has already parsed `fields`, `body` is the parsed
        object."""
        body = body or _parsed(QueryIn, fields)
        forms = [form for form in FORMS if getattr(body, form) is not None]
        if len(forms) != 1:
            raise InvalidRequest(f"exactly one of {', '.join(FORMS)} is needed, not {' and '.join(forms) or 'none'}")
        [form] = forms
        if body.fingerprint is not None and form != "vector":
            raise InvalidRequest(
                "fingerprint requires a vector: it names the model that made `vector`", param="fingerprint"
            )
        region = None
        if form == "combine":
            assert body.combine is not None
            parts = tuple(self._part(part, part.weight, f"combine.{i}.", i) for i, part in enumerate(body.combine))
        elif form == "region":
            assert body.region is not None
            region = body.region.model_dump(include={"box", "mask"}, exclude_none=True)
            if len(region) != 1:
                raise InvalidRequest(
                    f"region: exactly one of box and mask is needed, not {' and '.join(region) or 'none'}",
                    param="region",
                )
            parts = (Part(image=_undecoded(body.region.image)),)
        elif form == "vector":
            parts = (Part(vector=read_vector(body.vector, "vector"), fingerprint=body.fingerprint),)
        else:
            parts = (self._part(body, 1.0, ""),)
        return self.ranked(form, parts, body, region)

    def ranked(
        self, form: str, parts: tuple[Part, ...], ranking: Ranking, region: dict[str, Any] | None = None
    ) -> Query:
        """Check the options that all forms of queries have in common (`ranking`), and build a query from these options
        and `parts`."""
        if ranking.k + ranking.offset > MAX_DEPTH:
            raise InvalidRequest(
                f"k + offset is {ranking.k + ranking.offset}; at most {MAX_DEPTH:,} is allowed", param="offset"
            )
        _check_grouping_and_rerank(form, ranking)
        return Query(
            form,
            parts,
            ranking,
            region,
            where=None if ranking.filter is None else self._filter(ranking.filter),
            path=None if ranking.group_by is None else parse_path(ranking.group_by, "group_by"),
            params=search_params(ranking.params),
        )

    def _part(self, part: PartIn | QueryIn, weight: float, where: str, index: int = 0) -> Part:
        names = [name for name in ("image", "vector", "id") if getattr(part, name) is not None]
        if len(names) != 1:
            raise InvalidRequest(
                f"{where.rstrip('.')}: exactly one of image, vector and id is needed, not "
                f"{' and '.join(names) or 'none'}",
                param="combine",
            )
        if part.vector is not None:
            return Part(vector=read_vector(part.vector, f"{where}vector"), fingerprint=part.fingerprint, weight=weight)
        if part.fingerprint is not None:
            raise InvalidRequest(f"{where}fingerprint requires a vector: it names its model", param="combine")
        if part.id is not None:
            return Part(id=check_id(part.id, f"{where}id"), weight=weight)
        return Part(image=_undecoded(part.image, index), weight=weight)

    def _filter(self, body: Any) -> Filter:
        if id(body) not in self.filters:
            if self.values <= MAX_VALUES:  # no filter is parsed after the limit is exceeded
                self.filters[id(body)] = parse_filter(body)
                self.values += _count_values(self.filters[id(body)])
            if self.values > MAX_VALUES:
                raise InvalidRequest(f"the filters of one request have more than {MAX_VALUES:,} values", param="filter")
        return self.filters[id(body)]


def _undecoded(sent: Any, index: int = 0) -> Outcome[Any]:
    """Return an outcome with an image as it was sent, which `_with_images` replaces. `index` is the position of the
    part in its query."""
    return Outcome(index, sent)


async def _with_images(queries: list[Outcome[Query]], settings: Settings, web: WebImages) -> list[Outcome[Query]]:
    """Decode the images of all queries, and fetch those that are links. Return the queries with their images."""
    sent = [part.image.value for query in successes(queries) for part in query.parts if part.image is not None]
    if not sent:
        return queries
    images = iter(await decode_texts(list(sent), settings, web))

    def decoded(part: Part) -> Part:
        return part if part.image is None else replace(part, image=replace(next(images), index=part.image.index))

    return [query.then(lambda query: replace(query, parts=tuple(map(decoded, query.parts)))) for query in queries]


def read_image_search(image: Outcome[bytes], fields: dict[str, Any], settings: Settings) -> SearchRequest:
    """Build the search request for one image. `fields` contains the options as strings, from a form or a query string.

    Raises:
        InvalidRequest: an option is invalid.
    """
    options = parse_options(SearchOptions, _from_text(fields))
    query = _Reader().ranked("image", (Part(image=image),), options)
    return SearchRequest(numbered([query]), options.model)


async def read_search(fields: dict[str, Any], settings: Settings, web: WebImages) -> SearchRequest:
    """Parse the JSON object of a search request. The object contains either one query or the list `queries`. `web`
    fetches images that are links.

    Raises:
        ServiceError: the whole request, or its only query, is invalid.
    """
    reader = _Reader()
    body = _parsed(SearchIn, fields)
    if body.queries is None:
        if "on_error" in body.model_fields_set:
            raise InvalidRequest("on_error requires queries", param="on_error")
        query = reader.query(fields, body)
        _check_images([query], settings)
        return SearchRequest(await _with_images(numbered([query]), settings, web), body.model)
    forms = [name for name in (*FORMS, "fingerprint") if getattr(body, name) is not None]
    if forms:
        raise InvalidRequest(
            f"{' and '.join(forms)} cannot be combined with queries: put it into each query", param="queries"
        )
    shared = {name: value for name, value in fields.items() if name in Ranking.model_fields}
    queries = [attempt(i, _one_of_many, reader, shared, part) for i, part in enumerate(body.queries)]
    _check_batch(successes(queries), settings)
    queries = await _with_images(queries, settings, web)
    return SearchRequest(queries, body.model, batch=True, on_error=body.on_error)


def _parsed(model: type[Model], fields: dict[str, Any]) -> Model:
    """Parse `fields` into an instance of `model`, after checking that no nested object has too many fields."""
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


def _one_of_many(reader: _Reader, shared: dict[str, Any], fields: Any) -> Query:
    if not isinstance(fields, dict):
        raise InvalidRequest(f"a query must be an object, not {reprlib.repr(fields)}")
    check_fields(fields, "the query")
    query = reader.query({**fields, **{name: shared[name] for name in shared if fields.get(name) is None}})
    if query.ranking.rerank is not None:
        raise InvalidRequest("rerank is not possible in a batch: send the query alone", param="rerank")
    return query


def _check_batch(queries: list[Query], settings: Settings) -> None:
    """Check the total number of images in the queries of a request, and the total number of results that they request.

    Raises:
        InvalidRequest: one of these numbers exceeds its limit.
    """
    _check_images(queries, settings)
    results = sum(query.ranking.k * (query.ranking.group_size or 1) + query.ranking.offset for query in queries)
    if results > MAX_RESULTS_OF_BATCH:
        raise InvalidRequest(
            f"the queries request {results:,} results in total (k times group_size, plus offset); "
            f"at most {MAX_RESULTS_OF_BATCH:,} are allowed",
            param="queries",
        )


def _check_images(queries: list[Query], settings: Settings) -> None:
    images = sum(part.image is not None for query in queries for part in query.parts)
    if images > settings.items_per_request:
        raise InvalidRequest(f"{images} images to search for: a request can have at most {settings.items_per_request}")


def read_vector(value: Any, where: str) -> Vector:
    """Parse a JSON value as a vector [D]: a list of numbers becomes float64, and base64 text float32. `where` is the
    name of the field, for error messages.

    Raises:
        InvalidRequest: the value is neither a list of 1 to `MAX_DIMENSION` numbers nor the base64 text of as many
            finite numbers in little-endian float32, or all numbers are 0. The message names the first element that is
            not a number.
    """
    return _from_base64(value, where) if isinstance(value, str) else _from_list(value, where)


def _from_base64(text: str, where: str) -> npt.NDArray[np.float32]:
    try:
        data = binascii.a2b_base64(text[:_MAX_TEXT], strict_mode=True)
    except ValueError as error:  # not base64, or not ASCII
        raise InvalidRequest(
            f"{where}: a vector must be a list of numbers or the base64 text of float32 numbers, not "
            f"{reprlib.repr(text)}: {error}",
            param=where[:80],
        ) from error
    if len(data) % _FLOAT_BYTES or not 1 <= len(data) // _FLOAT_BYTES <= MAX_DIMENSION:
        raise InvalidRequest(
            f"{where}: the base64 text of a vector must have {_FLOAT_BYTES} bytes (little-endian float32) for each of "
            f"1 to {MAX_DIMENSION:,} numbers, not {len(text) // 4 * 3:,} bytes",
            param=where[:80],
        )
    vector = np.frombuffer(data, "<f4")
    wide = vector.astype(np.float64)
    square = float(wide.dot(wide))  # is finite if all numbers are, and 0 if all numbers are 0
    if not math.isfinite(square):
        index = int(np.isfinite(vector).argmin())
        raise InvalidRequest(f"{where}.{index}: must be a finite number, not {vector[index]}", param=where[:80])
    if not square:
        raise _no_direction(len(vector), where)
    return vector


def _no_direction(count: int, where: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: a vector of {count} zeros has no direction", param=where[:80])


def _from_list(value: Any, where: str) -> npt.NDArray[np.float64]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_DIMENSION:
        size = f" of {len(value):,}" if isinstance(value, list) else ""
        raise InvalidRequest(
            f"{where}: a vector must be a list of 1 to {MAX_DIMENSION:,} numbers, not {reprlib.repr(value)}{size}",
            param=where[:80],
        )
    try:
        numbers = _FLOATS.validate_python(value)
    except ValidationError as error:
        index = error.errors(include_url=False, include_context=False)[0]["loc"][0]
        assert isinstance(index, int)
        raise InvalidRequest(
            f"{where}.{index}: must be a number, not {reprlib.repr(value[index])}", param=where[:80]
        ) from error
    if not any(numbers):
        raise _no_direction(len(numbers), where)
    return np.frombuffer(struct.pack(f"{len(numbers)}d", *numbers))  # takes a third of the time of np.array


def _count_values(condition: Filter) -> int:
    if isinstance(condition, And | Or):
        return sum(_count_values(part) for part in condition.parts)
    if isinstance(condition, Not):
        return _count_values(condition.part)
    return len(condition.values) if isinstance(condition, In) else 1


def search_params(params: ParamsIn | None) -> SearchParams | None:
    """Convert the search parameters of a request to the type that the stores use. If `params` is None, return None."""
    return None if params is None else SearchParams(params.exact, params.ef_search, params.nprobe)


def _check_grouping_and_rerank(form: str, ranking: Ranking) -> None:
    if ranking.group_size is not None and ranking.group_by is None:
        raise InvalidRequest("group_size requires group_by", param="group_size")
    if ranking.rerank is None:
        if ranking.matches or ranking.rerank_depth is not None:
            raise InvalidRequest("matches and rerank_depth require rerank", param="rerank")
        return
    if ranking.group_by is not None:
        raise InvalidRequest("rerank and group_by cannot be combined", param="rerank")
    if form not in ("image", "region", "id"):
        raise InvalidRequest(
            f"rerank compares images, but a query by {form} has none: use image, region or id", param="rerank"
        )


def _from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert options from a form or query string to the types that they have in a JSON body. `filter` and `params` are
    parsed as JSON, and a single `include` becomes a list."""
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
