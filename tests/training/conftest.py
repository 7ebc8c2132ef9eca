"""Fixtures that give every fixture and test the same torch threads and random generator, in whatever order they run."""

from tests.arithmetic import (  # noqa: F401 - fixtures for all tests in this folder
    same_arithmetic_for_each_test,
    same_arithmetic_for_the_fixtures_of_a_module,
)
