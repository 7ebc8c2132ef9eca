"""Tests of the engine that runs the images of a batch side by side."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from model.engines.protocol import Features, FloatArray
from model.engines.split import SplitEngine
from tests.fakes import FakeEngine

PIXELS = np.random.default_rng(0).standard_normal((5, 3, 28, 28)).astype(np.float32)


@dataclass
class Meeting(FakeEngine):
    """An engine whose passes end only when two of them run at the same time."""

    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=5))

    def run(self, pixels: FloatArray) -> Features:
        self.both.wait()
        return super().run(pixels)


def test_the_images_of_a_batch_run_side_by_side_and_keep_their_order() -> None:
    engine, single = FakeEngine(), Meeting()
    split = SplitEngine(engine, single, 2)
    features, expected = split.run(PIXELS), FakeEngine().run(PIXELS)
    for name in Features._fields:
        np.testing.assert_allclose(getattr(features, name), getattr(expected, name), rtol=1e-6)
    assert single.batches == [(1, 3, 28, 28)] * 4
    assert engine.batches == [(1, 3, 28, 28)]  # the fifth image uses both threads


def test_a_single_image_uses_all_threads() -> None:
    engine, single = FakeEngine(), FakeEngine()
    SplitEngine(engine, single, 2).run(PIXELS[:1])
    assert (engine.images, single.images) == (1, 0)


def test_the_error_of_an_image_reaches_the_caller() -> None:
    split = SplitEngine(FakeEngine(), FakeEngine(error=ValueError("broken")), 2)
    with pytest.raises(ValueError, match="broken"):
        split.run(PIXELS[:2])


def test_both_engines_are_closed() -> None:
    engine, single = FakeEngine(), FakeEngine()
    split = SplitEngine(engine, single, 2)
    assert split.close_single() is engine
    assert (single.closed, engine.closed) == (True, False)
    split.close()
    assert engine.closed
