"""Read the request of `POST /v1/collections/{name}/find-region`, and make its answer. The command does the same."""

from typing import Any

from service.options import check_fields, parse_options
from service.retrieval.find_region import FoundRegion, FoundRegions
from service.retrieval.region_schemas import MAX_REFERENCES, FindRegionAnswer, FindRegionIn, RegionFields
from service.search.filters import Filter, parse_filter
from service.state import Service


def read_request(fields: dict[str, Any]) -> tuple[FindRegionIn, Filter | None]:
    """Parse the fields of a request, and return its options and its filter.

    Raises:
        InvalidRequest: a field is missing, unknown or invalid.
    """
    references = fields.get("references")
    for reference in references[: MAX_REFERENCES + 1] if isinstance(references, list) else []:
        if isinstance(reference, dict):
            check_fields(reference, "a reference")
            if isinstance(reference.get("mask"), dict):
                check_fields(reference["mask"], "a mask")
    options = parse_options(FindRegionIn, fields)
    return options, None if options.filter is None else parse_filter(options.filter)


def answer_fields(service: Service, name: str, found: FoundRegions, timings: dict[str, float]) -> FindRegionAnswer:
    """Return the JSON answer for a page of results. `name` is the name or alias by which the collection was asked."""
    ranking = found.ranking
    return {
        "object": "list",
        "collection": name,
        "data": [_fields(each) for each in found.page],
        "cursor": found.cursor,
        "total": len(ranking.items),
        "examined": ranking.examined,
        "pending": ranking.pending,
        "unreadable": ranking.unreadable,
        **service.identity(found.tag),
        "timings": timings,
    }


def _fields(found: FoundRegion) -> RegionFields:
    fields: RegionFields = {
        "id": found.item.id,
        "score": found.score,
        "box": found.box,
        "area": found.area,
        "segmentation": {"size": found.segmentation["size"], "counts": found.segmentation["counts"]},
        "metadata": dict(found.item.metadata),
    }
    if found.item.source is not None:
        fields["source"] = found.item.source
    return fields
