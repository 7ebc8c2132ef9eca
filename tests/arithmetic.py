"""How torch computes in the tests: its number of threads and the state of its random generator.

The networks in the tests are tiny, so several threads would only wait for each other, most of all on busy cores.
`TEST_TORCH_THREADS` sets another number of threads; sums are then rounded differently. Tests start other processes with
`ENVIRONMENT`, so that these compute exactly as the test itself.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

THREADS = int(os.environ.get("TEST_TORCH_THREADS", "1"))
# What `torch.set_num_threads` does: OpenMP and MKL, which would otherwise take fewer where there are fewer cores.
SETTINGS = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "MKL_DYNAMIC": "FALSE"}
ENVIRONMENT = os.environ | SETTINGS
HAS_TORCH = importlib.util.find_spec("torch") is not None


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Run the `with` block with `THREADS` torch threads and a freshly seeded generator. Restore the number of threads
    afterwards.
    """
    if not HAS_TORCH:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def same_arithmetic_for_the_fixtures_of_a_module():
    with same_arithmetic():
        yield


@pytest.fixture(autouse=True)
def same_arithmetic_for_each_test():
    with same_arithmetic():
        yield
