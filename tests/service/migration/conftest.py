"""Fixtures of the tests of migrations."""

import pytest

from service import live_models
from service.migration import switching


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_models, "POLL_S", 0.01)
    monkeypatch.setattr(live_models, "TIDY_S", 0.05)
    monkeypatch.setattr(switching, "WAIT_S", 0.02)
