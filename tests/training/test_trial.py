"""The trial before a run: it measures what the run will need, and leaves nothing behind."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.arithmetic import ENVIRONMENT
from tests.training.tiny import ALONE, QUIET, TINY
from training import resources
from training import trial as trials
from training.config import TrainConfig
from training.data.listing import list_images
from training.estimate import LINE_BYTES, SHEET_BYTES, Costs, ReadingCosts, estimate
from training.plan import costed_plan, evaluated_images, pieces_of
from training.resources import MIB, Free, free_resources, least_free, write_speed
from training.setup import make_setup
from training.state import save_state
from training.train import train
from training.trial import checkpoint_bytes, state_bytes, trial
from training.wiring import image_settings

LAST = {"share": 0.5, "global_size": 42, "local_size": 14, "micro_batch": 4}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("apples", "pears", "plums"):
        for i in range(9):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def config_of(photos, out, **changes):
    return TrainConfig.model_validate({"data": photos, "out": out, **TINY, **changes})


def parts_for(config):
    """The training images, the plan and the parts of a run."""
    listing = list_images(image_settings(config)[0], ALONE, QUIET)
    plan = costed_plan(config, len(listing.train), evaluated_images(config, listing), ALONE)
    return listing.train, plan, pieces_of(config, ALONE, plan.steps)


def global_state():
    """The state that every part of the process shares."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def tensors_of(setup):
    parts = setup.parts
    return [*parts.student.state_dict().values(), *parts.ema.state_dict().values(), *parts.buffers.values()]


def test_a_trial_changes_no_bit_of_the_run(photos, tmp_path):
    config = config_of(photos, tmp_path / "run", centering="softmax", last_phase=LAST)
    images, _, pieces = parts_for(config)
    setup = make_setup(config, ALONE)
    torch.manual_seed(5)
    before, weights = global_state(), [tensor.clone() for tensor in tensors_of(setup)]
    trial(pieces, images, ALONE)
    assert global_state() == before
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(setup), weights, strict=True))
    assert not setup.parts.optimizer.state
    assert all(parameter.grad is None for parameter in setup.parts.student.parameters())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_after_a_trial_is_the_same_run(photos, tmp_path):
    alone, after = (config_of(photos, tmp_path / name, epochs=1) for name in ("alone", "after"))
    train(alone, QUIET)
    images, _, pieces = parts_for(after)
    trial(pieces, images, ALONE)
    train(after, QUIET)
    content = [torch.load(next((c.out / "states").glob("*3.pt")), weights_only=True)["student"] for c in (alone, after)]
    assert all(torch.equal(content[0][name], content[1][name]) for name in content[0])


@pytest.fixture
def steps(monkeypatch):
    """The numbers of the steps that a trial makes, and the images of their micro-batches."""
    made, real = [], trials.train_step

    def counted(settings, setup, schedules, micros, step, **options):
        made.append((step, len(micros), micros[0].globals_.shape[-1]))
        return real(settings, setup, schedules, micros, step, **options)

    monkeypatch.setattr(trials, "train_step", counted)
    return made


def test_a_trial_makes_four_steps_at_the_end_of_each_phase(photos, tmp_path, steps):
    config = config_of(photos, tmp_path / "run", epochs=10, last_phase=LAST)
    images, plan, pieces = parts_for(config)
    assert plan.phase_steps == (15, 15)
    costs, _ = trial(pieces, images, ALONE)
    assert steps == [(n, 1, 28) for n in (14, 13, 12, 11)] + [(n, 2, 42) for n in (29, 28, 27, 26)]
    assert len(costs.step_seconds) == 2
    assert min(costs.step_seconds) > 0


def test_a_long_step_is_measured_once_and_a_phase_without_steps_never(photos, tmp_path, steps, monkeypatch):
    monkeypatch.setattr(trials, "LONG_S", 0.0)
    config = config_of(photos, tmp_path / "run", epochs=1 / 3, last_phase=LAST)
    images, plan, pieces = parts_for(config)
    assert plan.phase_steps == (1, 0)
    costs, _ = trial(pieces, images, ALONE)
    assert steps == [(0, 1, 28), (0, 1, 28)]
    assert costs.step_seconds[1] == 0


@pytest.mark.parametrize(
    "changes", [{"centering": "softmax"}, {"shared_head": False, "precision": "fp16"}, {"optimizer": "sgd_normalized"}]
)
def test_the_size_of_a_state_is_known_before_it_is_written(photos, tmp_path, changes):
    config = config_of(photos, tmp_path / "run", **changes)
    images, _, pieces = parts_for(config)
    costs, _ = trial(pieces, images, ALONE)
    setup = make_setup(config, ALONE)

    def written(step):
        path = save_state(tmp_path, setup.parts, step, {}, {}, 2, ALONE).path
        return path.stat().st_size

    assert costs.first_state_bytes == pytest.approx(written(0), rel=2e-3)
    micros = trials.make_micros(pieces.crops, ALONE, torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.ones(8), 0, 9)
    trials.train_step(pieces.step_settings, setup, pieces.schedules, micros, 0)
    assert costs.state_bytes == pytest.approx(written(1), rel=2e-3)
    assert costs.state_bytes == state_bytes(setup.parts)
    assert costs.checkpoint_bytes == checkpoint_bytes(setup.parts)


def test_the_disk_space_is_that_of_the_files_of_a_run(photos, tmp_path):
    vit = {"embed_dim": 96, "depth": 2, "num_heads": 2, "img_size": 28, "layerscale_init": 1.0}
    config = config_of(photos, tmp_path / "run", vit=vit, keep_checkpoints_every_epochs=1, log_every=2)
    images, plan, pieces = parts_for(config)
    made = estimate(plan, *trial(pieces, images, ALONE))
    train(config, QUIET)
    files = [path for path in config.out.rglob("*") if path.suffix in (".pt", ".json", ".safetensors")]
    assert len([path for path in files if path.suffix == ".safetensors"]) == plan.checkpoints == 6
    weights = made.disk_bytes - plan.sheets * SHEET_BYTES - 5 * LINE_BYTES
    assert weights == pytest.approx(sum(path.stat().st_size for path in files), rel=0.02)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from tests.training.test_trial import config_of, parts_for
from tests.training.tiny import ALONE
from training.resources import peak_bytes, restart_peak
from training.setup import make_setup
from training.trial import make_micros, train_step, trial

vit = {"embed_dim": 192, "depth": 4, "num_heads": 4, "img_size": 56, "layerscale_init": 1.0}
config = config_of(Path(sys.argv[1]), Path(sys.argv[2]), vit=vit, global_size=56, local_size=28, n_prototypes=8192)
images, plan, pieces = parts_for(config)
restart_peak(ALONE.device)
base = peak_bytes(ALONE.device)
estimated = trial(pieces, images, ALONE)[0].step_bytes
setup = make_setup(config, ALONE)
for step in range(6):
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    micros = make_micros(pieces.crops, ALONE, pixels, torch.ones(8), step, plan.steps)
    train_step(pieces.step_settings, setup, pieces.schedules, micros, step)
print(json.dumps([estimated - base, peak_bytes(ALONE.device) - base]))
"""


@pytest.mark.skipif(not resources.CLEAR.exists(), reason="the peak memory of a process can be restarted only on Linux")
def test_the_memory_is_that_of_real_steps(photos, tmp_path):
    command = [sys.executable, "-c", MEASURE, str(photos), str(tmp_path / "run")]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT).stdout
    estimated, needed = json.loads(printed.splitlines()[-1])
    assert needed > 100 * MIB
    assert estimated == pytest.approx(needed, rel=0.2)


PEAKS = """
import torch
from training.resources import peak_bytes, restart_peak

cpu, peaks = torch.device("cpu"), []
for n_bytes in (0, 2**26, 0):
    restart_peak(cpu)
    block = torch.ones(n_bytes // 4)
    peaks.append(peak_bytes(cpu))
    del block
print(*peaks)
"""


@pytest.mark.skipif(not resources.CLEAR.exists(), reason="the peak memory of a process can be restarted only on Linux")
def test_the_peak_of_memory_can_be_measured_again_and_again():
    """In a process of its own, because other tests leave memory that is freed at any time."""
    done = subprocess.run([sys.executable, "-c", PEAKS], check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    before, with_block, after = map(int, done.stdout.split())
    assert with_block > before + 60 * MIB
    assert after < before + 32 * MIB


def test_a_step_that_does_not_fit_into_the_gpu_ends_with_advice(photos, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(trials, "train_step", full)
    images, _, pieces = parts_for(config_of(photos, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"lower micro_batch.*\(CUDA out of memory. Tried to allocate 2 GiB\)$"):
        trial(pieces, images, ALONE)


def test_unreadable_images_are_measured_too_unless_there_are_no_others(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    for path in files[1:]:
        path.write_bytes(b"broken")
    images, _, pieces = parts_for(config_of(photos, tmp_path / "run", held_out_share=0.0))
    costs, _ = trial(pieces, images, ALONE)
    assert costs.training_images.seconds > 0
    files[0].write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of 27 images could be read; the first: "):
        trial(pieces, images, ALONE)


def test_the_time_of_an_image_counts_all_threads():
    def read(index):
        trials.time.sleep(0.02)

    alone = trials._measure_reading(read, 40, 1, 2)
    four = trials._measure_reading(read, 40, 4, 2)
    assert alone.seconds >= 0.02
    assert 0.005 <= four.seconds < alone.seconds / 2
    assert four.core_seconds < 0.01  # sleeping occupies no core
    assert four.cores == 2


def test_the_slowest_rank_decides():
    reading = ReadingCosts(1.0, 1.0, 1, 0)
    first = Costs((1.0, 5.0), 1.0, 0.5, 0.5, 1, reading, reading, 0.1, 100, 90, 1, 10, 20, 5, 1e6)
    second = replace(first, step_seconds=(2.0, 4.0), first_seconds=3.0, step_bytes=200, forward_seconds=0.0)
    second = replace(second, training_images=replace(reading, seconds=2.0), write_bytes_per_s=float("inf"))
    slowest = replace(first, step_seconds=(2.0, 5.0), first_seconds=3.0, step_bytes=200)
    assert trials._of_all([first, second]) == replace(slowest, training_images=replace(reading, seconds=2.0))
    assert least_free([Free(None, 5, 7), Free(None, 3, None)]) == Free(None, 3, 7)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096 * MIB),
        ({"memory.max": "max"}, 4096 * MIB),
        (
            {
                "memory.max": 3000 * MIB,
                "memory.current": 2500 * MIB,
                "memory.stat": f"anon 1\ninactive_file {400 * MIB}",
            },
            900 * MIB,
        ),
        (
            {
                "memory/memory.limit_in_bytes": 3000 * MIB,
                "memory/memory.usage_in_bytes": 2500 * MIB,
                "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {300 * MIB}",
            },
            800 * MIB,
        ),
    ],
)
def test_available_memory_respects_the_limit_of_a_container(tmp_path, monkeypatch, files, expected):
    (tmp_path / "meminfo").write_text(f"MemTotal:  9 kB\nMemAvailable:       {4096 * 1024} kB\nHugePages: x\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(resources, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    assert resources._available() == expected
    own = free_resources(tmp_path, ALONE).host_bytes - expected
    shared = free_resources(tmp_path, replace(ALONE, on_machine=4)).host_bytes
    assert own > 10 * MIB  # what this process uses already
    assert shared == pytest.approx(own + expected / 4, abs=10 * MIB)


def test_elsewhere_available_memory_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "MEMORY", tmp_path / "missing")
    free = free_resources(tmp_path / "not yet" / "there", ALONE)
    assert (free.device_bytes, free.host_bytes) == (None, None)
    assert free.disk_bytes > 0


def test_the_speed_of_the_disk_leaves_no_file(tmp_path):
    assert write_speed(tmp_path / "run", 1) > 0
    assert list(tmp_path.iterdir()) == []
