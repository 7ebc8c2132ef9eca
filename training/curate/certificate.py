"""Make and verify leak certificates.

A leak certificate is a JSON file. It states that no image of a dataset is a copy of an evaluation image. It names each
evaluation image that was compared, the model, the settings, and the images that were removed. Digests bind it to the
bytes of both sets, so verification notices an image that was changed or added later. A part of the dataset, such as a
split, is covered by the same certificate. The certificate is not signed. It protects against mistakes, not against
forgery, but anyone can repeat the comparison.

The keys and their meaning are documented in docs/curated-datasets.md.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from model.files import write_text
from training.curate.drops import Drop
from training.curate.leaks import Leaks

FORMAT: Final = "dinov2-leak-certificate"
VERSION: Final = 1
SHORT: Final = 8  # bytes of the digest of each image of the dataset that the certificate lists
NAMED: Final = 3  # images that an error message names


class Hashed(Protocol):
    """A set of images: unique names, and the sha256 of each file, [n, 32]. A table of images is one."""

    @property
    def key(self) -> Sequence[str]: ...
    @property
    def sha256(self) -> npt.NDArray[np.uint8]: ...


class CertificateError(ValueError):
    """The certificate is damaged, or does not cover the given images."""


def set_digest(images: Hashed) -> str:
    """Return the digest of a set of images. It depends on their bytes, but not on their names and their order."""
    return hashlib.sha256(b"".join(sorted(digest.tobytes() for digest in images.sha256))).hexdigest()


def make_certificate(
    dataset: Hashed,
    evaluation: Hashed,
    leaks: Leaks,
    *,
    removed: Hashed,
    model: str,
    threshold: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a certificate for the images of a dataset, after its leaks have been removed.

    Args:
        dataset: the images that remain, with the bytes that the dataset will have.
        evaluation: the evaluation images.
        leaks: the result of `find_leaks` for these evaluation images.
        removed: the images that were removed, in the order of `leaks.drops`.
        model: fingerprint of the model that computed the embeddings.
        threshold: similarity from which two images are copies.
        settings: all settings that decide what a leak is, as JSON.

    Raises:
        ValueError: an image of the dataset is identical with a removed image or an evaluation image.
    """
    assert len(removed.key) == len(leaks.drops)
    compared = [
        {
            "key": key,
            "sha256": digest.tobytes().hex(),
            "leaks_removed": int(n_leaks),
            "candidates_rejected": int(n_rejected),
        }
        for key, digest, n_leaks, n_rejected in zip(
            evaluation.key, evaluation.sha256, leaks.n_leaks, leaks.n_rejected, strict=True
        )
    ]
    certificate = {
        "format": FORMAT,
        "version": VERSION,
        "result": "no leaks",
        "dataset": {
            "images": len(dataset.key),
            "digest": set_digest(dataset),
            "short_digests": _short_digests(dataset),
        },
        "evaluation": {"images": len(evaluation.key), "digest": set_digest(evaluation), "compared": compared},
        "removed": [
            {"key": key, "sha256": digest.tobytes().hex(), "reason": drop.reason}
            for key, digest, drop in zip(removed.key, removed.sha256, leaks.drops, strict=True)
        ],
        "model": model,
        "threshold": threshold,
        "settings": dict(settings),
        "settings_digest": _json_digest(settings),
    }
    certificate["digest"] = _json_digest(certificate)
    _check_no_identical(certificate, dataset)
    return certificate


def write_certificate(path: Path, certificate: Mapping[str, Any]) -> None:
    """Write a certificate atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(certificate, indent=1, ensure_ascii=False) + "\n")


def verify_certificate(
    path: Path,
    dataset: Hashed,
    *,
    evaluation: Hashed | None = None,
    model: str | None = None,
    find: Callable[[], Sequence[Drop]] | None = None,
) -> dict[str, Any]:
    """Check that a certificate is intact and covers these images. Return its content.

    Args:
        path: the certificate.
        dataset: the images of the dataset, or of a part of it, as they are now.
        evaluation: the evaluation images as they are now, or None to believe their digests.
        model: fingerprint that the certificate must name, or None for any.
        find: repeats the comparison, and returns the leaks that it finds; None to believe the result.

    Raises:
        CertificateError: the file is not an intact certificate; an image of the dataset was changed or added; the
            evaluation images or the model are not those of the certificate; or an image of the dataset is a leak.
        OSError: the file cannot be read.
    """
    certificate = _read(path)
    _check_no_identical(certificate, dataset)
    _check_dataset(certificate["dataset"], dataset)
    if evaluation is not None:
        _check_evaluation(certificate["evaluation"]["compared"], evaluation)
    if model is not None and model != certificate["model"]:
        raise CertificateError(f"the certificate is for the model {certificate['model']}, not for {model}")
    drops = [] if find is None else find()
    if drops:
        more = f", and {len(drops) - 1} more images are leaks" if len(drops) > 1 else ""
        raise CertificateError(f"{dataset.key[drops[0].index]} is a leak: {drops[0].reason}{more}")
    return certificate


def _json_digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short_digests(images: Hashed) -> str:
    """Return the first `SHORT` bytes of all digests, sorted, in base64."""
    return base64.b64encode(b"".join(sorted(digest[:SHORT].tobytes() for digest in images.sha256))).decode()


def _read(path: Path) -> dict[str, Any]:
    """Read a certificate, and check that it is as it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CertificateError(f"{path} is not a leak certificate: its format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise CertificateError(f"{path} has version {content.get('version')!r}; only version {VERSION} can be verified")
    if content.get("digest") != _json_digest({name: value for name, value in content.items() if name != "digest"}):
        raise CertificateError(f"{path} was changed: its content does not fit its digest")
    return content


def _check_dataset(recorded: Mapping[str, Any], dataset: Hashed) -> None:
    """Check that every image of the dataset was compared."""
    listed = base64.b64decode(recorded["short_digests"])
    compared = {listed[start : start + SHORT] for start in range(0, len(listed), SHORT)}
    others = [
        key for key, digest in zip(dataset.key, dataset.sha256, strict=True) if digest[:SHORT].tobytes() not in compared
    ]
    if others:
        raise CertificateError(
            f"{len(others)} of {len(dataset.key)} images were changed or added after the comparison: {_names(others)}. "
            "Compare the dataset again to get a new certificate"
        )


def _check_no_identical(certificate: Mapping[str, Any], dataset: Hashed) -> None:
    """Check that no image of the dataset has the bytes of an evaluation image or of a removed image."""
    leaks = {entry["sha256"]: f"the evaluation image {entry['key']}" for entry in certificate["evaluation"]["compared"]}
    leaks |= {entry["sha256"]: f"the removed image {entry['key']}" for entry in certificate["removed"]}
    for key, digest in zip(dataset.key, dataset.sha256, strict=True):
        if (leak := leaks.get(digest.tobytes().hex())) is not None:
            raise CertificateError(f"{key} is a leak: it has the same bytes as {leak}")


def _check_evaluation(compared: Sequence[Mapping[str, Any]], evaluation: Hashed) -> None:
    recorded = {entry["key"]: entry["sha256"] for entry in compared}
    now = {key: digest.tobytes().hex() for key, digest in zip(evaluation.key, evaluation.sha256, strict=True)}
    for what, keys in {
        "not compared": [key for key in now if key not in recorded],
        "missing": [key for key in recorded if key not in now],
        "changed": [key for key in now if key in recorded and now[key] != recorded[key]],
    }.items():
        if keys:
            raise CertificateError(f"the evaluation images are not those of the certificate; {what}: {_names(keys)}")


def _names(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more
