"""The table of all kinds of jobs. A new kind needs one entry here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError

from model.messages import in_words
from service.errors import InvalidRequest
from service.jobs.build_engine import BuildEngineParams, build_engine
from service.jobs.curate import CurateParams, check_curation, curate
from service.jobs.evaluate import EvaluateParams, evaluate
from service.jobs.export import ExportParams, export
from service.jobs.kind import JobParams, Kind
from service.jobs.reindex import ReindexParams, reindex
from service.jobs.retrain import RetrainParams, check_retraining, retrain
from service.jobs.train import TrainParams, check_training, train
from service.settings import Settings

KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "curate": Kind(
            "make a clean and diverse training set out of raw images",
            CurateParams,
            curate,
            ("torch", "pyarrow"),
            check_curation,
        ),
        "train": Kind("train a model on your own images", TrainParams, train, ("torch",), check_training),
        "export": Kind("turn a checkpoint or a run into an artifact", ExportParams, export),
        "build-engine": Kind("build a TensorRT plan on a GPU", BuildEngineParams, build_engine, needs=("cuda",)),
        "reindex": Kind("embed collections again with another model", ReindexParams, reindex),
        "retrain": Kind(
            "train, compare with the live model, and make the better one live",
            RetrainParams,
            retrain,
            ("torch",),
            check_retraining,
        ),
        "evaluate": Kind("evaluate a model on labelled images", EvaluateParams, evaluate, needs=("torch",)),
    }
)


def checked_params(
    kind: str, params: Mapping[str, Any], settings: Settings, kinds: Mapping[str, Kind] = KINDS
) -> JobParams:
    """Return the parameters of a job, with absolute paths without links.

    Raises:
        InvalidRequest: the kind is unknown, or a parameter is not allowed. The message says what is allowed.
    """
    if kind not in kinds:
        raise InvalidRequest(f"unknown kind {kind[:80]!r}: use one of {', '.join(kinds)}", param="kind")
    try:
        return kinds[kind].params.model_validate(dict(params)).resolved(settings)
    except ValidationError as error:
        raise InvalidRequest(in_words(error), param="params") from error
    except ValueError as error:
        raise InvalidRequest(str(error), param="params") from error


def accepted_params(
    kind: str, params: Mapping[str, Any], settings: Settings, kinds: Mapping[str, Kind] = KINDS
) -> JobParams:
    """Return the parameters of a new job, as `checked_params` does, after all checks of its kind. This may take a
    second, because the settings of a training are checked by a child process.

    Raises:
        InvalidRequest: see `checked_params`.
    """
    checked = checked_params(kind, params, settings, kinds)
    try:
        kinds[kind].check(checked, settings)
    except ValueError as error:
        raise InvalidRequest(str(error), param="params") from error
    return checked


def kinds_here(kinds: Mapping[str, Kind] = KINDS) -> list[str]:
    """Return the kinds whose packages are installed on this machine."""
    return [name for name, kind in kinds.items() if kind.can_run_here]
