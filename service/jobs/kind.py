"""A kind of job: its parameters, and the function that does its work."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

from pydantic import ConfigDict

from service.jobs.context import Context
from service.schema_base import Schema
from service.settings import Settings


class JobParams(Schema):
    """The base class of the parameters of all kinds. A class that names data or models overrides `resolved`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. The service checks the parameters in this way when
        a job is created, and the worker does it again when the job is started, because links may have changed.

        Raises:
            ValueError: a path is not allowed.
        """
        return self


def _nothing(params: Any, settings: Settings) -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    summary: what a job of this kind does, for people.
    params: the class of its parameters, a subclass of JobParams.
    run: the function that does the work. It gets a Context with the parameters.
    needs: the packages without which a worker does not run this kind.
    check: further checks of resolved parameters, which take about a second. They are made only when a job is created.
        The function raises ValueError for a value that is not allowed.
    """

    summary: str
    params: type[JobParams]
    run: Callable[[Context[Any]], None]
    needs: tuple[str, ...] = ()
    check: Callable[[Any, Settings], None] = _nothing

    @property
    def can_run_here(self) -> bool:
        """Whether the packages that it needs are installed."""
        return all(find_spec(package) is not None for package in self.needs)
