"""Gives every fixture and test the same number of torch threads and the same generator state, in whatever order they
run.
"""

import pytest

from tests.arithmetic import same_arithmetic


@pytest.fixture(autouse=True, scope="module")
def same_arithmetic_for_the_fixtures_of_a_module():
    with same_arithmetic():
        yield


@pytest.fixture(autouse=True)
def same_arithmetic_for_each_test():
    with same_arithmetic():
        yield
