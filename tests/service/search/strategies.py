"""Hypothesis strategies for filters as a request may send them."""

from typing import Any

from hypothesis import strategies as st

_text_operators = st.sampled_from(["contains", "prefix"])


def filter_bodies(
    keys: st.SearchStrategy[str], scalars: st.SearchStrategy[Any], bounds: st.SearchStrategy[Any]
) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for filters with conditions of every kind, single and nested.

    `keys` are the metadata keys, `scalars` the values they are compared with, and `bounds` the limits of ranges.
    """
    texts = scalars.filter(lambda value: isinstance(value, str) and value)
    ranges = st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), bounds, min_size=1, max_size=3)
    one = st.one_of(
        st.builds(lambda key, value: {"key": key, "eq": value}, keys, scalars),
        st.builds(lambda key, values: {"key": key, "in": values}, keys, st.lists(scalars, min_size=1, max_size=8)),
        st.builds(lambda key, there: {"key": key, "exists": there}, keys, st.booleans()),
        st.builds(lambda key, value: {"key": key, "ne": value}, keys, scalars),
        st.builds(lambda key, op, text: {"key": key, op: text}, keys, _text_operators, texts),
        st.builds(lambda op, text: {"field": "id", op: text}, st.sampled_from(["eq", "ne", "gte", "lt"]), texts),
        st.builds(lambda op, text: {"field": "id", op: text}, _text_operators, texts),
        st.builds(lambda key, limits: {"key": key, **limits}, keys, ranges),
    )
    return st.recursive(
        one,
        lambda inside: st.one_of(
            st.builds(lambda part: {"not": part}, inside),
            st.builds(
                lambda name, parts: {name: parts},
                st.sampled_from(["and", "or"]),
                st.lists(inside, min_size=1, max_size=3),
            ),
        ),
        max_leaves=6,
    )
