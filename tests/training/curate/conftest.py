"""Fixtures for the tests of curation."""

import pytest

from tests.training.curate.small_images import FakeEmbedder


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> type[FakeEmbedder]:
    """Replace the model of scans in this process, and make parts of four images."""
    monkeypatch.setattr("training.curate.scan.Embedder", FakeEmbedder)
    monkeypatch.setattr("training.curate.views.Embedder", FakeEmbedder)
    monkeypatch.setattr("training.curate.scan.PART_IMAGES", 4)
    FakeEmbedder.made = FakeEmbedder.images = 0
    return FakeEmbedder
