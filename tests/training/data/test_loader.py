"""Loaders: memory and streaming give the images that the plan names, survive broken ones, and end their threads."""

import threading
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.batches import MIN_TRIES, Reading, shuffled
from training.data.dataset import batch_indices
from training.data.loader import available_cpus, open_loader, waiting_advice
from training.data.memory_loader import MemoryLoader
from training.data.stream_loader import StreamLoader

SIDE = 8


class Fake:
    """Image i is a plane of (i, i, i), twice as wide as high; some are broken, some places do not answer."""

    parts, skipped, ignored = {}, (), {}

    def __init__(self, n, broken=(), down=(), delay=0.0):
        self.n, self.broken, self.down, self.delay = n, set(broken), set(down), delay
        self.asked = []
        self.threads = set()

    def __len__(self):
        return self.n

    def name(self, index):
        return f"photo {index}"

    def label(self, index):
        return None

    def fingerprint(self, index):
        return "1"

    def encoded(self, index):
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay * (index % 3))
        if index in self.down:
            raise OSError(f"photo {index}: connection refused")
        return PNGS[index % 256] if index not in self.broken else b"broken"


def png(value):
    file = BytesIO()
    Image.new("RGB", (2 * SIDE, SIDE), (value,) * 3).save(file, "png")
    return file.getvalue()


PNGS = [png(value) for value in range(256)]


def in_order(n_photos, step):
    return (torch.arange(4) + 4 * step) % n_photos


def streaming(source, plan=in_order, **options):
    return open_loader(
        source, SIDE, plan, cache_bytes=0, reading=Reading(**({"workers": 3, "ahead_steps": 2} | options))
    )


def numbers(batch):
    assert (batch.pixels == batch.pixels[:, :1, :1, :1]).all()
    return batch.pixels[:, 0, 0, 0].tolist()


def run(loader, steps):
    for step in range(steps):
        loader.batch(step)


def photo_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("photos")]


def test_the_size_decides_between_memory_and_streaming():
    needed = 10 * 3 * SIDE**2
    assert isinstance(open_loader(Fake(10), SIDE, in_order, cache_bytes=needed), MemoryLoader)
    with open_loader(Fake(10), SIDE, in_order, cache_bytes=needed - 1) as loader:
        assert isinstance(loader, StreamLoader)


def test_both_loaders_give_the_photos_of_the_plan():
    plan = shuffled(8, seed=3, share=slice(2, 6))  # the second rank's, or so
    memory = open_loader(Fake(50), SIDE, plan)
    with streaming(Fake(50, delay=0.001), plan) as stream:
        for step in range(14):  # over the end of two epochs
            expected = batch_indices(50, 8, step, seed=3)[2:6].tolist()
            for loader in (memory, stream):
                batch = loader.batch(step)
                assert numbers(batch) == expected
                assert batch.names == [f"photo {i}" for i in expected]
                assert batch.pixels.shape == (4, 3, SIDE, SIDE)
                assert batch.pixels.dtype == torch.uint8
                assert batch.aspect.tolist() == [2.0] * 4
    assert memory.waited_s > 0
    assert stream.waited_s > 0


def test_a_run_may_begin_and_jump_anywhere():
    with streaming(Fake(100)) as loader:
        for step in (7, 8, 20, 3, 3):
            assert numbers(loader.batch(step)) == [4 * step + i for i in range(4)]


def test_broken_photos_are_left_out_of_memory_and_listed():
    with open_loader(Fake(70, broken=[0, 3, 40, 69]), SIDE, in_order) as loader:
        assert len(loader) == 66
        assert numbers(loader.batch(0)) == [1, 2, 4, 5]
        assert loader.batch(0).names == ["photo 1", "photo 2", "photo 4", "photo 5"]
        assert loader.source.name(65) == "photo 68"
        assert [s.name for s in loader.skipped] == ["photo 0", "photo 3", "photo 40", "photo 69"]
        assert "starts with 62 72 6f 6b" in loader.skipped[0].reason


class Shaped(Fake):
    """Image i is i + 1 times as wide as high."""

    def encoded(self, index):
        super().encoded(index)
        file = BytesIO()
        Image.new("RGB", (4 * (index + 1), 4), (index,) * 3).save(file, "png")
        return file.getvalue() if index not in self.broken else b"broken"


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}])
def test_an_image_keeps_its_aspect_behind_broken_ones(options):
    with open_loader(Shaped(12, broken=[0, 3, 4]), SIDE, in_order, **options) as loader:
        for step in range(2):
            batch = loader.batch(step)
            assert numbers(batch) == [int(name.removeprefix("photo ")) for name in batch.names]
            assert batch.aspect.tolist() == [number + 1 for number in numbers(batch)]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_broken_photo_is_replaced_by_the_next_readable_one(workers):
    broken = {2, 3, 9, 39}
    source = Fake(40, broken=broken, delay=0.001)

    def replaced(index):
        return next(i % 40 for i in range(index, index + 40) if i % 40 not in broken)

    with streaming(source, workers=workers) as loader:
        for step in range(30):  # three times through all
            expected = [replaced(i) for i in in_order(40, step).tolist()]
            batch = loader.batch(step)
            assert numbers(batch) == expected
            assert batch.names == [f"photo {i}" for i in expected]
        assert sorted(s.name for s in loader.skipped) == [f"photo {i}" for i in (2, 3, 39, 9)]  # each once
        assert len(loader) == 40


def test_a_run_that_starts_later_replaces_alike():
    source = Fake(40, broken=[17, 18, 19])
    with streaming(source) as unbroken, streaming(source) as resumed:
        wanted = [numbers(unbroken.batch(step)) for step in range(8)]
        assert [numbers(resumed.batch(step)) for step in range(4, 8)] == wanted[4:]


def test_too_many_broken_photos_stop_the_run_but_not_before_a_hundred():
    source = Fake(1000, broken=range(0, 1000, 2))
    with (
        streaming(source, max_broken_share=0.4) as loader,
        pytest.raises(ValueError, match=r"of the 1\d\d images tried .* more than max_broken_share=0\.4.*photo \d"),
    ):
        run(loader, 100)
    assert len(source.asked) >= MIN_TRIES
    with streaming(source, max_broken_share=0.7) as loader:
        run(loader, 600)  # more than one epoch


def all_once(n):
    """A plan that tries all `n` images in its first step, one after the other."""
    return lambda n_photos, step: torch.arange(n)


@pytest.mark.parametrize("broken", [10, 11])
def test_a_share_that_is_reached_is_no_error_and_one_that_is_passed_is(broken):
    source = Fake(MIN_TRIES, broken=range(broken))
    with streaming(source, all_once(MIN_TRIES), workers=1, ahead_steps=1, max_broken_share=0.1) as loader:
        if broken == 10:
            assert numbers(loader.batch(0)) == [10] * 10 + list(range(10, MIN_TRIES))
            assert len(loader.skipped) == 10
            loader.batch(1)
        else:
            with pytest.raises(ValueError, match="11 of the 100 images tried so far cannot be read"):
                loader.batch(0)


def test_no_broken_share_stops_a_run_only_where_something_is_broken():
    with streaming(Fake(150), all_once(150), workers=1, max_broken_share=0.0) as loader:
        run(loader, 2)
    with (
        streaming(Fake(150, broken=[149]), all_once(150), workers=1, max_broken_share=0.0) as loader,
        pytest.raises(ValueError, match="1 of the 150 images tried so far cannot be read"),
    ):
        run(loader, 2)


def test_a_few_broken_ones_at_the_start_do_not():
    with streaming(Fake(1000, broken=range(60))) as loader:
        assert numbers(loader.batch(0)) == [60, 60, 60, 60]


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize(("n", "limit"), [(200, 0.5), (20, 0.5), (20, 0.0)])
def test_too_many_broken_images_stop_a_run_in_memory_and_streamed(cache_bytes, n, limit):
    source = Fake(n, broken=range(n * 3 // 4))
    with (
        pytest.raises(ValueError, match=rf"tried so far cannot be read, more than max_broken_share={limit:g}; .*photo"),
        open_loader(
            source, SIDE, all_once(n), cache_bytes=cache_bytes, reading=Reading(max_broken_share=limit)
        ) as loader,
    ):
        run(loader, 1)
    with open_loader(
        source, SIDE, all_once(n), cache_bytes=cache_bytes, reading=Reading(max_broken_share=0.75)
    ) as loader:
        assert len(loader.skipped) == (n * 3 // 4 if cache_bytes else 0)


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}])
def test_nothing_readable_is_an_error(options):
    with pytest.raises(ValueError, match=r"none of 5 images could be read; the first: photo [0-4]: not a known image"):
        open_loader(Fake(5, broken=range(5)), SIDE, in_order, **options).batch(0)
    assert not photo_threads()


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}])
def test_a_place_that_does_not_answer_stops_the_run_in_the_main_thread(options):
    with (
        pytest.raises(OSError, match="photo 9: connection refused"),
        open_loader(Fake(100, down=[9]), SIDE, in_order, **options) as loader,
    ):
        run(loader, 3)
    assert not photo_threads()


def test_the_read_ahead_is_bounded_in_steps_and_bytes():
    step_bytes = 4 * 3 * SIDE**2
    for options, ahead in (
        ({"ahead_steps": 3}, 3),
        ({"ahead_steps": 9, "ahead_bytes": 2 * step_bytes}, 2),
        ({"ahead_steps": 9, "ahead_bytes": 1}, 0),
    ):
        source = Fake(1000)
        with streaming(source, **options) as loader:
            loader.batch(0)
            loader.batch(1)
            for step in list(loader._steps.values()):
                for future in step.decoded:
                    future.result()
            assert sorted(source.asked) == list(range(4 * (2 + ahead)))


def test_closing_ends_the_threads_without_decoding_what_waits():
    source = Fake(1000, delay=0.01)
    with streaming(source, ahead_steps=100, workers=2) as loader:
        loader.batch(0)
        assert len(photo_threads()) == 2
    asked = len(source.asked)
    assert not photo_threads()
    assert asked < 100
    assert all(name.startswith("photos") for name in source.threads)


def test_an_error_in_the_loop_ends_the_threads():
    def fails():
        with streaming(Fake(1000)) as loader:
            loader.batch(0)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()
    assert not photo_threads()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers=0"),
        ({"ahead_steps": 0}, "ahead_steps=0"),
        ({"ahead_bytes": 0}, "ahead_bytes=0"),
        ({"max_broken_share": 1.5}, r"max_broken_share=1\.5"),
    ],
)
def test_impossible_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        open_loader(Fake(10), SIDE, in_order, reading=Reading(**options))


def test_no_photos_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        open_loader(Fake(0), SIDE, in_order)


def test_advice_says_what_to_change(monkeypatch):
    monkeypatch.setattr("training.data.loader.available_cpus", lambda: 8)
    with streaming(Fake(10)) as loader:
        assert waiting_advice(0.1, loader, side=SIDE, workers=2) is None
        advice = waiting_advice(0.124, loader, side=160, workers=2)
        assert advice.startswith(
            "12% of the time was spent waiting for images: raise workers (now 2), shrink the images"
        )
        assert "cache_bytes, 1 GiB" in advice
        assert "all 8 cores are decoding" in waiting_advice(0.5, loader, side=160, workers=8)
    with streaming(Fake(10)) as slow:
        assert slow.fetching_share == 0
        slow.batch(0)
        assert 0 < slow.fetching_share < 1
        slow._seconds = {"fetching": 9.0, "decoding": 1.0}
        assert "raise workers (now 8; 90% of their time" in waiting_advice(0.5, slow, side=160, workers=8)
    memory = open_loader(Fake(10), SIDE, in_order)
    assert "although they are in memory" in waiting_advice(0.5, memory, side=160, workers=2)
    monkeypatch.undo()
    assert available_cpus() >= 1


def test_a_large_memory_load_keeps_the_order():
    broken = set(np.random.default_rng(0).choice(256, 40, replace=False).tolist())
    loader = open_loader(Fake(256, broken=broken), SIDE, in_order, reading=Reading(workers=4))
    assert loader.pixels[:, 0, 0, 0].tolist() == [i for i in range(256) if i not in broken]
    assert len(loader.aspect) == 216
