"""Find and open the heads of the served model (`model/heads/`) for vision tasks.

The folders of the heads are listed for each request, so a new head can be used without a restart.
"""

import logging

from model.heads.record import HeadError, HeadNotFound, HeadRecord, ImageTokens, Kind
from model.heads.store import Head, choose_head, open_head
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel

log = logging.getLogger(__name__)


def record_of(model: ServedModel, kind: Kind, name: str | None) -> HeadRecord:
    """Return the record of the head with this name and kind. If `name` is None, return the only head of this kind.

    Raises:
        InvalidRequest: there is no such head, or `name` is None and there are several. The message lists the heads of
            this kind.
        EngineFailed: the record is damaged.
    """
    try:
        return choose_head(model.artifact, kind, name)
    except HeadNotFound as error:
        raise InvalidRequest(str(error), param="head") from error
    except HeadError as error:
        raise _unusable(name, error) from error


def open_named(model: ServedModel, kind: Kind, name: str | None) -> Head:
    """Return the head with this name and kind, ready for use. See `record_of`.

    Raises:
        InvalidRequest: see `record_of`.
        EngineFailed: the head's files are damaged.
    """
    record = record_of(model, kind, name)
    try:
        return open_head(model.artifact, record)
    except HeadError as error:
        raise _unusable(record.name, error) from error


def outputs_of(model: ServedModel, kind: Kind, name: str | None) -> tuple[str, ...]:
    """Return the names of the inner outputs that a head needs. See `record_of`.

    Raises:
        InvalidRequest, EngineFailed: see `record_of`.
    """
    return record_of(model, kind, name).outputs(model.config)


def tokens_of(analysed: Analysed) -> ImageTokens:
    """Return the tokens of an image in the form that the methods of `Head` expect."""
    return ImageTokens(analysed.embedded.parts[0], analysed.patches, analysed.grid, analysed.outputs)


def _unusable(name: str | None, error: HeadError) -> EngineFailed:
    """Log why a head cannot be used, and return an error for the client. The reason may contain the path of a file, so
    the error does not contain it."""
    log.error("a head cannot be used: %s", error)
    return EngineFailed(f"the head {name!r} cannot be used; the log of the service has the reason")
