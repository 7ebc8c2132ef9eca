"""The outcome of each item of a request: a value or the item's own error.

A function that works on one item returns or raises. `attempt` and `Outcome.then` turn the result into an outcome, so
one broken image does not fail the others. `split_items` applies the request's `on_error` at the end. Only a
`ServiceError` is an item's error. Any other exception is a bug and propagates.
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
    """One item's value or error. `index` counts from 0 in the order sent. With an `error`, `value` has no meaning.

    Treat it as immutable. It is not frozen, because every image and every search makes several, and creating a frozen
    dataclass takes twice as long.
    """

    index: int
    value: T | None = None
    error: ServiceError | None = None

    def result(self) -> T:
        """Return the value.

        Raises:
            ServiceError: the item's error, if it has one.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.value)

    def then(self, work: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> "Outcome[R]":
        """Apply `work` to the value. An error is passed on."""
        if self.error is not None:
            return Outcome(self.index, error=self.error)
        return attempt(self.index, work, cast("T", self.value), *args, **kwargs)

    async def then_await(
        self, work: Callable[Concatenate[T, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> "Outcome[R]":
        """Apply asynchronous `work` to the value. An error is passed on."""
        if self.error is not None:
            return Outcome(self.index, error=self.error)
        return await attempt_await(self.index, work(cast("T", self.value), *args, **kwargs))


def attempt(index: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
    """Call `work` and return its value, or the ServiceError that it raises, as an outcome."""
    try:
        return Outcome(index, work(*args, **kwargs))
    except ServiceError as error:
        return Outcome(index, error=error)


async def attempt_await(index: int, work: Awaitable[T]) -> Outcome[T]:
    """Await `work` and return its value, or the ServiceError that it raises, as an outcome."""
    try:
        return Outcome(index, await work)
    except ServiceError as error:
        return Outcome(index, error=error)


def numbered(values: Iterable[T]) -> list[Outcome[T]]:
    """Wrap values in outcomes without errors, numbered in order."""
    return [Outcome(index, value) for index, value in enumerate(values)]


def indexed(outcomes: Iterable[Outcome[T]]) -> list[tuple[int, T]]:
    """Return the values with their indices."""
    return [(outcome.index, outcome.result()) for outcome in outcomes if outcome.error is None]


def successes(outcomes: Iterable[Outcome[T]]) -> list[T]:
    """Return the values, in order."""
    return [outcome.result() for outcome in outcomes if outcome.error is None]


def failures(outcomes: Iterable[Outcome[T]]) -> list[ItemError]:
    """Return the errors, in order."""
    return [ItemError(outcome.index, outcome.error) for outcome in outcomes if outcome.error is not None]


def split_items(
    outcomes: Sequence[Outcome[T]], on_error: OnError, param: str
) -> tuple[list[tuple[int, T]], list[ItemError]]:
    """Return the good values with their indices, and the errors.

    Raises:
        InvalidItems: there are errors and on_error is "fail", or no item is good.
    """
    good, bad = indexed(outcomes), failures(outcomes)
    if bad and (on_error == "fail" or not good):
        raise InvalidItems(bad, total=len(outcomes), param=param)
    return good, bad
