"""Describe a dataset in Croissant, MLCommons' vocabulary for metadata of datasets, so that other programs can load it.

Croissant is JSON-LD with the vocabulary of schema.org (https://docs.mlcommons.org/croissant/docs/croissant-spec.html).
The record set `images` joins the images in the shards with their lines in the manifest. If the dataset consists of
lists, there are no image files to describe, and the record set has only the lines.

The description has no date, because equal images must give equal files.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

CROISSANT: Final = "croissant.json"
VERSION: Final = "http://mlcommons.org/croissant/1.0"
TAR, LINES = "application/x-tar", "application/jsonlines"
SUFFIXES: Final = ("jpg", "png", "webp", "gif", "bmp", "tif", "avif", "heic")
"""The suffixes that images have in shards."""

_TERMS: Final = """
citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath
key md5 parentField path recordSet references regex repeated replace samplingRate separator source subField transform
"""
CONTEXT: Final[dict[str, Any]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in _TERMS.split()},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}


def describe(
    files: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    digest: str,
    counts: Mapping[str, int],
    about: Mapping[str, str],
) -> dict[str, Any]:
    """Return the description of a dataset as the content of `croissant.json`.

    Args:
        files: the shards or lists: for each its `name`, `bytes` and `sha256`.
        manifest: the same for the manifest.
        digest: the digest of the images.
        counts: the number of images of each part.
        about: the `name` of the dataset, its `description` and its `license`. An empty text is left out.
    """
    shards = [file["name"] for file in files if file["name"].endswith(".tar")]
    distribution = [_file(file, TAR if file["name"].endswith(".tar") else LINES) for file in (*files, manifest)]
    if shards:
        distribution.append(_image_files(shards))
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        **{field: text for field, text in about.items() if text},
        "identifier": f"sha256:{digest}",
        "distribution": distribution,
        "recordSet": [_splits([part for part, n in counts.items() if n]), _records(manifest["name"], bool(shards))],
    }


def _file(file: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file["name"],
        "name": file["name"],
        "contentUrl": file["name"],
        "contentSize": f"{file['bytes']} B",
        "encodingFormat": media_type,
        "sha256": file["sha256"],
    }


def _image_files(shards: Sequence[str]) -> dict[str, Any]:
    """Describe the images in the shards. The pattern excludes the labels and the JSON that are beside them."""
    return {
        "@type": "cr:FileSet",
        "@id": "image-files",
        "name": "image-files",
        "containedIn": [{"@id": shard} for shard in shards],
        "encodingFormat": "image/*",
        "includes": [f"*.{suffix}" for suffix in SUFFIXES],
    }


def _splits(parts: Sequence[str]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "splits",
        "name": "splits",
        "dataType": "cr:Split",
        "key": {"@id": "splits/name"},
        "field": [{"@type": "cr:Field", "@id": "splits/name", "name": "name", "dataType": "sc:Text"}],
        "data": [{"splits/name": part} for part in parts],
    }


COLUMNS: Final = {
    "key": "The number of the image's source, counted from 1, a slash, and the image's name in that source.",
    "sha256": "The sha256 of the image's file.",
    "part": "The part of the dataset to which the image belongs. Dropped images have none.",
    "label": "The class of the image.",
    "stage": "The stage of the curation that dropped the image.",
    "reason": "Why the image was dropped.",
}


def _records(manifest: str, in_shards: bool) -> dict[str, Any]:
    """Describe the records of the images: the columns of the manifest and, if there are shards, the images."""

    def field(name: str, description: str, source: Mapping[str, Any], kind: str = "sc:Text") -> dict[str, Any]:
        return {
            "@type": "cr:Field",
            "@id": f"images/{name}",
            "name": name,
            "description": description,
            "dataType": kind,
            "source": source,
        }

    def column(name: str) -> dict[str, Any]:
        return {"fileObject": {"@id": manifest}, "extract": {"column": name}}

    fields = [field(name, description, column(name)) for name, description in COLUMNS.items()]
    fields[list(COLUMNS).index("part")]["references"] = {"field": {"@id": "splits/name"}}
    if in_shards:
        names = {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([0-9a-f]+)(?:\.\w+)?$"}}
        sample = field("sample", "The image's name in its shard.", {"fileSet": {"@id": "image-files"}, **names})
        sample["references"] = column("sample")
        content = {"fileSet": {"@id": "image-files"}, "extract": {"fileProperty": "content"}}
        fields = [sample, field("image", "The image.", content, "sc:ImageObject"), *fields]
    return {"@type": "cr:RecordSet", "@id": "images", "name": "images", "field": fields}
