"""The prefix tree of the prompts that the text encoder computes.

The encoder's attention is causal, so the features of a token depend only on the tokens before it. Therefore, tokens
after the end token have no effect, and prompts are not padded to the full context. Prompts with a common prefix share
its features: "a photo of a cat." and "a photo of a dog." have six of nine tokens in common. The tree has one node for
each distinct prefix, and each node is computed once.

Legend: P prompts, n nodes, L length of the longest prompt.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Prompt = Sequence[int]

MAX_PLACES: Final = 1 << 13
"""The limit of n * L in one forward pass of the text encoder. It bounds the memory of the attention: at width 1280, the
keys on all paths take 42 MB, and so do the values."""


class PromptTree(NamedTuple):
    """The distinct prefixes of several prompts, as a tree. Each node stands for one prefix and contains its last
    token."""

    tokens: Indices  # [n], token ids
    depths: Indices  # [n], the position of each token in its prompt, from 0
    paths: Indices  # [n, L], the nodes from the first token to this node, which is repeated to fill the row
    ends: Indices  # [P], the node of each prompt's last token


def prompt_tree(prompts: Sequence[Prompt]) -> PromptTree:
    """Return the prefix tree of several prompts. A prompt is a list of token ids and must not be empty."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    tokens: list[int] = []
    paths: list[list[int]] = []
    ends: list[int] = []
    for prompt in prompts:
        node = -1
        path: list[int] = []
        for token in prompt:
            node = nodes.setdefault((node, token), len(nodes))
            path.append(node)
            if node == len(tokens):
                tokens.append(token)
                paths.append(list(path))
        ends.append(node)
    longest = max(map(len, paths))
    filled = [path + path[-1:] * (longest - len(path)) for path in paths]
    depths = [len(path) - 1 for path in paths]
    return PromptTree(*(np.array(values, np.int64) for values in (tokens, depths, filled, ends)))


def count_nodes(prompts: Sequence[Prompt]) -> int:
    """Return the number of distinct prefixes of several prompts. It determines the time to encode the prompts."""
    return len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


def in_parts(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Divide prompts into parts, one for each forward pass, and yield the indices of the prompts in each part.

    The prompts are sorted, so prompts with a common prefix are usually in the same part. In a part with several
    prompts, the number of tokens, with shared ones counted once, times the length of the longest prompt is at most
    `MAX_PLACES`.
    """
    part: list[int] = []
    tokens = longest = 0
    for index in sorted(range(len(prompts)), key=lambda index: list(prompts[index])):
        prompt = prompts[index]
        shared = _shared(prompts[part[-1]], prompt) if part else 0
        tokens, longest = tokens + len(prompt) - shared, max(longest, len(prompt))
        if part and tokens * longest > MAX_PLACES:
            yield part
            part, tokens, longest = [], len(prompt), len(prompt)
        part.append(index)
    if part:
        yield part


def _shared(first: Prompt, second: Prompt) -> int:
    """Return the length of the longest common prefix of two prompts."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
