"""Fixtures that tests of several packages share, and settings that limit numeric libraries to one thread.

The arrays in the tests are tiny, and `make test` runs one worker per core, so several threads would only wait for each
other. The libraries read these environment variables when they load, so the variables are set before any test imports
NumPy or faiss.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def pytest_collection_finish() -> None:
    """Exclude all imported modules from garbage collection, because scanning them takes half a second each time."""
    gc.collect()
    gc.freeze()


_INITIAL_STATES: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order(request: pytest.FixtureRequest) -> None:
    """Reset the random generator `RNG` of a test's module, so that a test's numbers do not depend on earlier tests."""
    generator = getattr(request.module, "RNG", None)
    if generator is not None:
        initial = _INITIAL_STATES.setdefault(request.module.__name__, generator.bit_generator.state)
        generator.bit_generator.state = initial


@pytest.fixture
def peak_memory_bytes() -> Callable[[str], int]:
    """Return a function that runs a Python script in a separate process and returns its peak memory in bytes."""

    def measure(script: str) -> int:
        report = "\nimport resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        result = subprocess.run(
            [sys.executable, "-"],
            input=script + report,
            text=True,
            capture_output=True,
            cwd=ROOT,
            check=True,
            timeout=60,
        )
        return int(result.stdout.rsplit("peak ", 1)[1]) * (1 if sys.platform == "darwin" else 1024)

    return measure
