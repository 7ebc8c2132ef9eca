"""Tests of the check of the limit of open files at the start."""

import resource

import pytest

from service import descriptors
from service.descriptors import FOR_FILES, check_descriptors


class Limits:
    """The limit of open files of a process."""

    RLIMIT_NOFILE, RLIM_INFINITY = resource.RLIMIT_NOFILE, resource.RLIM_INFINITY

    def __init__(self, soft: int, hard: int) -> None:
        self.limits = (soft, hard)

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == self.RLIMIT_NOFILE
        return self.limits

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == self.RLIMIT_NOFILE
        self.limits = limits


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [
        (4096, 4096, 4096),
        (1000 + FOR_FILES, 4096, 1000 + FOR_FILES),
        (1024, 4096, 1000 + FOR_FILES),
        (256, resource.RLIM_INFINITY, 1000 + FOR_FILES),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_the_limit_is_raised_only_as_far_as_needed(monkeypatch, soft, hard, after):
    limits = Limits(soft, hard)
    monkeypatch.setattr(descriptors, "resource", limits)
    check_descriptors(1000)
    assert limits.limits == (after, hard)


def test_what_the_system_does_not_allow_is_told(monkeypatch):
    monkeypatch.setattr(descriptors, "resource", Limits(1024, 1024))
    with pytest.raises(
        ValueError, match="max_connections=1000 needs 1512 open files, and this process may open 1024"
    ) as error:
        check_descriptors(1000)
    assert "DINOV2_MAX_CONNECTIONS to at most 512" in str(error.value)
