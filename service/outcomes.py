"""What became of each item of a request: a value, or the error that is that item's own.

A function that works on one item returns or raises. `attempt` and `Outcome.then` turn what it raises into an outcome,
so that one broken image does not fail the others; `split_items` applies the request's `on_error` at the end. Only a
`ServiceError` is an item's error: anything else is a fault of ours and goes on up.
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
    """`index` counts from 0 in the order sent; `value` is meaningless where there is an `error`.

    Never changed once it is made. Not frozen, because every image and every search makes a few, and a frozen dataclass
    takes twice as long to make.
    """

    index: int
    value: T | None = None
    error: ServiceError | None = None

    def result(self) -> T:
        """The value.

        Raises:
            ServiceError: the item's error, where there is one.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.value)

    def then(self, work: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> "Outcome[R]":
        """What `work` makes of the value; an error stays."""
        if self.error is not None:
            return Outcome(self.index, error=self.error)
        return attempt(self.index, work, cast("T", self.value), *args, **kwargs)

    async def then_await(
        self, work: Callable[Concatenate[T, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> "Outcome[R]":
        """As `then`, for work that is awaited."""
        if self.error is not None:
            return Outcome(self.index, error=self.error)
        return await attempt_await(self.index, work(cast("T", self.value), *args, **kwargs))


def attempt(index: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
    """What `work` returns, or the ServiceError that it raises."""
    try:
        return Outcome(index, work(*args, **kwargs))
    except ServiceError as error:
        return Outcome(index, error=error)


async def attempt_await(index: int, work: Awaitable[T]) -> Outcome[T]:
    """As `attempt`, for work that is awaited."""
    try:
        return Outcome(index, await work)
    except ServiceError as error:
        return Outcome(index, error=error)


def numbered(values: Iterable[T]) -> list[Outcome[T]]:
    """Values in order, none of which has failed so far."""
    return [Outcome(index, value) for index, value in enumerate(values)]


def indexed(outcomes: Iterable[Outcome[T]]) -> list[tuple[int, T]]:
    """The values with their indices."""
    return [(outcome.index, outcome.result()) for outcome in outcomes if outcome.error is None]


def successes(outcomes: Iterable[Outcome[T]]) -> list[T]:
    """The values, in order."""
    return [outcome.result() for outcome in outcomes if outcome.error is None]


def failures(outcomes: Iterable[Outcome[T]]) -> list[ItemError]:
    """The errors, in order."""
    return [ItemError(outcome.index, outcome.error) for outcome in outcomes if outcome.error is not None]


def split_items(
    outcomes: Sequence[Outcome[T]], on_error: OnError, param: str
) -> tuple[list[tuple[int, T]], list[ItemError]]:
    """Good items with their indices, and bad ones.

    Raises:
        InvalidItems: there are bad ones and on_error is "fail", or there is no good one.
    """
    good, bad = indexed(outcomes), failures(outcomes)
    if bad and (on_error == "fail" or not good):
        raise InvalidItems(bad, total=len(outcomes), param=param)
    return good, bad
