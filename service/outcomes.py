"""The outcome of each item in a request: a value, or an error.

A function for one item returns a value or raises an error. `attempt` and `Outcome.then` call such a function and return
an outcome, so that the error of one item does not affect the others. At the end, `split_items` separates the values
from the errors. If there is an error and the request's `on_error` is "fail", `split_items` raises an error for the
whole request instead. Only a `ServiceError` becomes the error of an item. Any other exception is a bug and is not
caught.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Generic, Literal, ParamSpec, TypeVar, cast

from service.errors import InvalidItems, ItemError, ServiceError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
OnError = Literal["fail", "partial"]


@dataclass(slots=True)
class Outcome(Generic[T]):
    """The value or the error of one item. `index` is the position of the item in the request, counted from 0. If
    `error` is not None, `value` has no meaning.

    Do not modify an outcome. The class is not frozen, because each request creates several outcomes, and creating an
    object of a frozen dataclass takes twice as long.
    """

    index: int
    value: T | None = None
    error: ServiceError | None = None

    def result(self) -> T:
        """Return the value of the item, or raise its error.

        Raises:
            ServiceError: the item has an error.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.value)

    def then(self, work: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> "Outcome[R]":
        """Call `work` with the value and the given arguments, and return the outcome of the call. If this outcome has
        an error, do not call `work`, and return an outcome with the same error."""
        if self.error is not None:
            return Outcome(self.index, error=self.error)
        return attempt(self.index, work, cast("T", self.value), *args, **kwargs)

    async def then_await(
        self, work: Callable[Concatenate[T, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> "Outcome[R]":
        """Call and await `work` with the value and the given arguments, and return the outcome of the call. If this
        outcome has an error, do not call `work`, and return an outcome with the same error."""
        if self.error is not None:
            return Outcome(self.index, error=self.error)
        return await attempt_await(self.index, work(cast("T", self.value), *args, **kwargs))


def attempt(index: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
    """Call `work`. Return an outcome with the value that it returns or the ServiceError that it raises."""
    try:
        return Outcome(index, work(*args, **kwargs))
    except ServiceError as error:
        _forget_frames(error)
        return Outcome(index, error=error)


def _forget_frames(error: ServiceError) -> None:
    """Remove the traceback and the causes of an error of the request. Their frames have variables such as the decoded
    image, and together with the frame that raises the error again, they form a cycle. So the image would stay in memory
    until the garbage collector runs."""
    if error.status < 500:
        error.__traceback__ = error.__cause__ = error.__context__ = None


async def attempt_await(index: int, work: Awaitable[T]) -> Outcome[T]:
    """Await `work`. Return an outcome with the value that it returns or the ServiceError that it raises."""
    try:
        return Outcome(index, await work)
    except ServiceError as error:
        return Outcome(index, error=error)


def numbered(values: Iterable[T]) -> list[Outcome[T]]:
    """Return one outcome for each value. The index of an outcome is the position of its value."""
    return [Outcome(index, value) for index, value in enumerate(values)]


def indexed(outcomes: Iterable[Outcome[T]]) -> list[tuple[int, T]]:
    """Return the (index, value) pairs of the outcomes that have no error, in order."""
    return [(outcome.index, outcome.result()) for outcome in outcomes if outcome.error is None]


def successes(outcomes: Iterable[Outcome[T]]) -> list[T]:
    """Return the values of the outcomes that have no error, in order."""
    return [outcome.result() for outcome in outcomes if outcome.error is None]


def failures(outcomes: Iterable[Outcome[T]]) -> list[ItemError]:
    """Return the index and the error of each outcome that has an error, in order."""
    return [ItemError(outcome.index, outcome.error) for outcome in outcomes if outcome.error is not None]


def split_items(
    outcomes: Sequence[Outcome[T]], on_error: OnError, param: str
) -> tuple[list[tuple[int, T]], list[ItemError]]:
    """Return two lists: the (index, value) pairs of the outcomes without an error, and the errors of the other
    outcomes.

    Raises:
        InvalidItems: an outcome has an error and `on_error` is "fail", or all outcomes have errors.
    """
    good, bad = indexed(outcomes), failures(outcomes)
    if bad and (on_error == "fail" or not good):
        raise InvalidItems(bad, total=len(outcomes), param=param)
    return good, bad
