"""Estimates: exact arithmetic from measured costs, and the words in which they are told."""

from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from tests.training.tiny import TINY
from training.config import TrainConfig
from training.data.batches import Reading, shuffled
from training.data.loader import open_loader
from training.estimate import (
    CPU_GROWTH,
    EVALUATION_BATCH,
    LINE_BYTES,
    NOTE_BYTES,
    SHEET_BYTES,
    Costs,
    Plan,
    ReadingCosts,
    count_evaluations,
    duration,
    epochs_within,
    estimate,
    evaluation_memory,
    image_memory,
    in_words,
    seconds_of_evaluation,
    size,
    step_with_reading,
    steps_of_phases,
)
from training.resources import Free
from training.wiring import crop_settings

GIB = 2**30
READING = ReadingCosts(seconds=0.01, core_seconds=0.02, cores=2, ahead=8)
COSTS = Costs(
    step_seconds=(0.5, 2.0),
    first_seconds=3.0,
    log_seconds=0.25,
    forward_seconds=0.64,
    threads=2,
    training_images=READING,
    evaluation_images=ReadingCosts(seconds=0.0, core_seconds=0.0, cores=2, ahead=8),
    digest_seconds=0.001,
    step_bytes=1000,
    forward_bytes=900,
    feature_bytes=2,
    first_state_bytes=50,
    state_bytes=100,
    checkpoint_bytes=25,
    write_bytes_per_s=10.0,
)
PLAN = Plan(
    images=1000,
    epochs=2.0,
    phase_steps=(80, 20),
    batch_size=20,
    n_ranks=1,
    on_cpu=True,
    in_memory=True,
    image_bytes=300,
    log_every=30,
    save_every_seconds=60.0,
    best_saves=0,
    keep_states=2,
    rollback_states=0,
    checkpoints=2,
    sheets=1,
    evaluations=3,
    images_per_evaluation=100,
    other_images=20,
)
UNKNOWN = Free(None, None, None)


def test_the_parts_of_a_run_add_up():
    made = estimate(PLAN, COSTS, UNKNOWN)
    assert made.startup_seconds == pytest.approx(3 + 1000 * (0.01 + 0.001))
    assert made.training_seconds == pytest.approx(80 * 0.5 + 20 * 2.0 + 4 * 0.25)  # lines at 30, 60, 90 and 100
    assert made.evaluation_seconds == pytest.approx(320 * 0.01)
    # 81 seconds of training: the state of step 0, one after a minute and one at the end
    assert made.saving_seconds == pytest.approx((50 + 2 * (100 + 25) + 2 * 25) / 10)
    parts = made.startup_seconds, made.training_seconds, made.evaluation_seconds, made.saving_seconds
    assert made.total_seconds == pytest.approx(sum(parts))
    assert made.steps == 100
    assert made.seconds_per_step == pytest.approx(0.81)
    assert made.images_per_s == pytest.approx(20 / 0.81)
    evaluation = 900 + 2 * 100 + 4 * 100 * 100  # more than the steps need
    assert made.memory_bytes == int(CPU_GROWTH * evaluation) + 300
    assert made.disk_bytes == 2 * (100 + NOTE_BYTES) + 2 * 25 + SHEET_BYTES + 4 * LINE_BYTES
    assert made.disk_peak_bytes == made.disk_bytes + 100
    assert made.fits


def test_a_run_that_saves_only_at_its_end_still_has_the_state_of_step_0():
    made = estimate(replace(PLAN, save_every_seconds=600.0, rollback_states=1), COSTS, UNKNOWN)
    states = 2 * (100 + NOTE_BYTES) + 50 + NOTE_BYTES
    assert made.disk_bytes == states + 2 * 25 + SHEET_BYTES + 4 * LINE_BYTES
    assert made.saving_seconds == pytest.approx((50 + 125 + 50) / 10)


def test_the_best_evaluations_may_save_further_states():
    made = estimate(replace(PLAN, save_every_seconds=600.0, best_saves=3), COSTS, UNKNOWN)
    assert made.disk_bytes == 2 * (100 + NOTE_BYTES) + 2 * 25 + SHEET_BYTES + 4 * LINE_BYTES
    assert made.saving_seconds == pytest.approx((50 + 4 * 125 + 50) / 10)


def test_with_a_gpu_images_and_states_are_in_main_memory():
    made = estimate(replace(PLAN, on_cpu=False, images_per_evaluation=0), COSTS, UNKNOWN)
    assert (made.memory_bytes, made.host_bytes) == (1000, 300 + 100)


def test_streamed_images_are_read_during_the_steps_of_each_rank():
    plan = replace(PLAN, in_memory=False, n_ranks=2)
    costs = replace(COSTS, training_images=replace(READING, seconds=0.1, core_seconds=0.0))
    made = estimate(plan, costs, UNKNOWN)
    assert made.training_seconds == pytest.approx(80 * 1.0 + 20 * 2.0 + 4 * 0.25)  # 10 images per rank take 1 s
    assert made.startup_seconds == 3.0


@pytest.mark.parametrize(
    ("step", "n_images", "reading", "expected"),
    [
        (5.0, 100, ReadingCosts(0.01, 0.01, 4, 0), 5.0),  # two cores are idle
        (5.0, 100, ReadingCosts(0.07, 0.01, 4, 0), 7.0),  # a slow server
        (5.0, 100, ReadingCosts(0.01, 0.02, 2, 0), 6.0),  # the threads and the step share two cores
    ],
)
def test_a_step_waits_for_whatever_is_slowest(step, n_images, reading, expected):
    assert step_with_reading(step, n_images, 2, reading) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("forward", "reading", "batch"),
    [
        (2.0, ReadingCosts(0.0, 0.0, 2, 8), 2.0),
        (0.05, ReadingCosts(0.1, 0.0, 2, 8), 6.4),  # hidden behind reading
        (2.0, ReadingCosts(0.1, 0.0, 2, 8), 2.0 + 6.4 - 0.8),  # 8 images are read during the forward pass
        (2.0, ReadingCosts(0.01, 0.0, 2, 64), 2.0),  # hidden behind the forward pass
        (2.0, ReadingCosts(0.01, 0.05, 2, 64), 2.0 + 64 * 0.05 / 2),  # all cores are busy
    ],
)
def test_an_evaluation_reads_ahead_only_a_few_images(forward, reading, batch):
    costs = replace(COSTS, forward_seconds=forward, evaluation_images=reading)
    assert seconds_of_evaluation(3 * EVALUATION_BATCH, costs) == pytest.approx(3 * batch)
    assert seconds_of_evaluation(0, costs) == 0


def test_an_evaluation_holds_all_features_and_one_block_of_similarities():
    assert evaluation_memory(0, COSTS) == 0
    assert evaluation_memory(10, COSTS) == 2 * 10 + 4 * 10 * 10
    assert evaluation_memory(100_000, COSTS) == 2 * 100_000 + 4 * 1024 * 65_536


@pytest.mark.parametrize("total", [1, 2, 7, 10, 41, 1000])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.999])
def test_phases_have_as_many_steps_as_the_run_gives_them(total, share):
    last = {"share": share, "global_size": 42, "local_size": 14}
    crops = crop_settings(TrainConfig.model_validate({"data": "-", "out": "-", **TINY, "last_phase": last}))
    of_step = [crops.phases.index(crops.phase(step / total)) for step in range(total)]
    counts = steps_of_phases([phase.starts_at for phase in crops.phases], total)
    assert counts == (of_step.count(0), of_step.count(1))


@pytest.mark.parametrize("total", [1, 5, 10, 11])
@pytest.mark.parametrize("every", [0, 1, 3, 5, 10, 20])
def test_evaluations_are_counted_as_the_loop_makes_them(total, every):
    during = [step for step in range(1, total) if every and step % every == 0]
    assert count_evaluations(total, every) == len(during) + 2


class Images:
    """Sixteen copies of one image."""

    parts, skipped, ignored = {}, (), {}

    def __init__(self):
        file = BytesIO()
        Image.new("RGB", (10, 10)).save(file, "png")
        self.content = file.getvalue()

    def __len__(self):
        return 16

    def name(self, index):
        return str(index)

    def encoded(self, index):
        return self.content


@pytest.mark.parametrize("cache_bytes", [16 * 192, 16 * 192 - 1])
@pytest.mark.parametrize("ahead_bytes", [1, 2 * 4 * 192 - 1, 2 * 4 * 192, 2**30])
def test_memory_for_images_is_what_the_loader_allocates(cache_bytes, ahead_bytes):
    in_memory, n_bytes = image_memory(16, 8, 4, cache_bytes=cache_bytes, ahead_steps=3, ahead_bytes=ahead_bytes)
    reading = Reading(workers=1, ahead_steps=3, ahead_bytes=ahead_bytes)
    with open_loader(Images(), 8, shuffled(4, 0), cache_bytes=cache_bytes, reading=reading) as loader:
        batch = loader.batch(0)
        assert loader.in_memory == in_memory
        if in_memory:
            assert loader.pixels.nbytes == n_bytes
        else:
            assert batch.pixels.nbytes + sum(step.pixels.nbytes for step in loader._steps.values()) == n_bytes


@pytest.mark.parametrize(
    ("on_cpu", "free", "words"),
    [
        (True, Free(int(1000 * CPU_GROWTH) + 299, None, None), "each process needs"),
        (False, Free(999, None, None), "each GPU needs"),
        (False, Free(None, 399, None), "of main memory"),
        (True, Free(None, None, 1000), "lower keep_states"),
    ],
)
def test_a_resource_that_is_too_small_is_named(on_cpu, free, words):
    plan = replace(PLAN, on_cpu=on_cpu, images_per_evaluation=0)
    made = estimate(plan, COSTS, free)
    [problem] = made.problems
    assert words in problem
    assert not made.fits
    assert in_words(made)[-1] == f"warning: {problem}"
    enough = (
        Free(int(1000 * CPU_GROWTH) + 300, 1, made.disk_peak_bytes) if on_cpu else Free(1000, 400, made.disk_peak_bytes)
    )
    assert estimate(plan, COSTS, enough).problems == []


def test_an_estimate_in_words():
    costs = replace(COSTS, step_bytes=GIB, state_bytes=10 * 2**20)
    made = estimate(PLAN, costs, Free(8 * GIB, 8 * GIB, 100 * GIB))
    assert in_words(made)[0] == "1,000 images; 100 steps of 20 images (2 epochs)"
    assert in_words(made)[1].startswith("estimated time: ")
    assert "before the first step 14 s, training 1 min 21 s, 3 evaluations 3.2 s, saving " in in_words(made)[1]
    assert in_words(made)[1].endswith("; 810 ms a step, 24.7 images/s")
    assert in_words(made)[2:] == [
        "estimated memory: 1.2 GiB for the process, of which 0.0 MiB is for images; 8.0 GiB available",
        "estimated disk space: 22 MiB; 100 GiB free",
    ]
    on_gpus = in_words(estimate(replace(PLAN, on_cpu=False, n_ranks=2), costs, UNKNOWN))
    assert on_gpus[2] == "estimated memory: 1.0 GiB on each GPU; main memory for images and states: 10 MiB"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0444, "44 ms"),
        (4.44, "4.4 s"),
        (59.6, "1 min"),
        (3600, "1 h"),
        (3725, "1 h 2 min"),
        (86_400 * 3 + 3600 * 4 + 59, "3 d 4 h"),
        (86_400 + 61, "1 d"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("n_bytes", "words"), [(0, "0.0 MiB"), (1.5 * GIB, "1.5 GiB"), (780 * 2**20, "780 MiB"), (2**41, "2.0 TiB")]
)
def test_sizes(n_bytes, words):
    assert size(n_bytes) == words


@pytest.mark.parametrize("hours", [0.1, 0.5, 1, 24])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 41])
def test_the_most_epochs_that_fit_into_a_time(hours, steps_per_epoch):
    def seconds(epochs):
        steps = round(epochs * steps_per_epoch)
        return 60 + 3.7 * steps + 45 * (steps // 100)

    steps = round(epochs_within(hours, seconds, steps_per_epoch) * steps_per_epoch)
    assert seconds(steps / steps_per_epoch) <= hours * 3600 < seconds((steps + 1) / steps_per_epoch)


def test_epochs_have_a_limit_and_a_time_must_suffice_for_one_step():
    assert epochs_within(1, lambda epochs: 1.0, 10, most=30) == 30
    assert [epochs_within(hours, lambda epochs: 3600 * epochs, 1) for hours in (1, 2, 5, 5.9)] == [1, 2, 5, 5]
    with pytest.raises(ValueError, match=r"hours=0\.01 is too short: a run of one step takes 2 min.*hours=0\.04"):
        epochs_within(0.01, lambda epochs: 120 + epochs, 10)
