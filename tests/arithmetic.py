"""Fixtures for reproducible torch results in the tests: the number of threads and the state of the random generator.

The networks in the tests are tiny, so several threads would only wait for each other, most of all on busy cores. The
environment variable `TEST_TORCH_THREADS` sets another number of threads; sums are then rounded differently. Tests start
other processes with `ENVIRONMENT`, so that these processes compute exactly as the tests do.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

THREADS = int(os.environ.get("TEST_TORCH_THREADS", "1"))
# Like `torch.set_num_threads`, this fixes the threads of OpenMP and MKL, which use fewer on machines with few cores.
SETTINGS = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "MKL_DYNAMIC": "FALSE"}
ENVIRONMENT = os.environ | SETTINGS
HAS_TORCH = importlib.util.find_spec("torch") is not None


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Run the `with` block with `THREADS` torch threads and a freshly seeded random generator.

    The previous number of threads is restored afterwards.
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
