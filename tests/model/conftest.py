"""Give all fixtures and tests the same number of torch threads and the same random seed, in whatever order they run."""

from tests.arithmetic import (  # noqa: F401 - fixtures of every test here
    same_arithmetic_for_each_test,
    same_arithmetic_for_the_fixtures_of_a_module,
)
