"""What torch computes with in the tests: the number of its threads and the state of its generator.

The networks of the tests are tiny: a team of threads would only wait for each other, longest where cores are busy.
`TEST_TORCH_THREADS` sets another number, since sums of a team of threads round differently. Processes that a test
starts take `ENVIRONMENT`, so that they compute as the test itself does.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

THREADS = int(os.environ.get("TEST_TORCH_THREADS", "1"))
# What `torch.set_num_threads` does: OpenMP and MKL, which would otherwise take fewer where there are fewer cores.
SETTINGS = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "MKL_DYNAMIC": "FALSE"}
ENVIRONMENT = os.environ | SETTINGS
HAS_TORCH = importlib.util.find_spec("torch") is not None


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Inside, torch has `THREADS` threads and a fresh generator; afterwards it has the threads that it had before."""
    if not HAS_TORCH:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
