"""`torchrun -m training` from end to end: one rank dies and both end; gone on with by two, then by one.

The losses are weighted so low that gradients stay near AdamW's epsilon. There a step depends smoothly on the gradient;
otherwise a weight whose gradient is nearly zero would move by a whole step in a direction that rounding decides.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.arithmetic import ENVIRONMENT
from training import train as loop
from training.recipe import load_config
from training.state import find_state
from training.watch.monitor import read_lines

ROOT = Path(__file__).parents[2]
RECIPE = """
vit = {embed_dim = 16, depth = 2, num_heads = 2, img_size = 28, layerscale_init = 1.0}
global_size = 28
local_size = 14
n_local = 2
cache_size = 32
cache_bytes = 0
n_prototypes = 32
head_hidden_dim = 16
head_bottleneck_dim = 8
batch_size = 8
epochs = 10
log_every = 1
lr = 1e-3
dino_weight = 1e-6
ibot_weight = 1e-6
koleo_weight = 1e-7
eval_resize = 28
eval_crop = 28
precision = "fp32"
on_collapse = "warn"
"""


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    for name in ("apples", "pears", "plums"):
        (folder / name).mkdir(parents=True)
        for i in range(9):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 30)).save(folder / name / f"{i}.png")
        (folder / name / "broken.png").write_bytes(b"no photo")
    return folder


@contextmanager
def torchrun(photos, out, recipe):
    """Two ranks of `python -m training`; none is left behind, whatever the test finds."""
    arguments = ["-m", "training", "--data", photos, "--out", out, "--recipe", recipe, "save_every_minutes=1e-9"]
    own = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *own, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for number in ranks_of(out):
            os.kill(number, signal.SIGKILL)
        process.communicate()


def ranks_of(out):
    """Process numbers of the ranks that train there, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue
        rank = [item for item in environment if item.startswith(b"RANK=")]
        if str(out).encode() in words and rank:
            found[int(rank[0].removeprefix(b"RANK="))] = int(folder.name)
    return [number for _, number in sorted(found.items())]


def wait_for_step(process, out, step):
    while not any(line["step"] >= step for line in read_lines(out / "metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_two_ranks_killed_stopped_and_gone_on_with_by_one(photos, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    whole, out = tmp_path / "whole", tmp_path / "run"
    with torchrun(photos, out, recipe) as process:
        wait_for_step(process, out, 4)
        os.kill(ranks_of(out)[1], signal.SIGKILL)
        _, message = process.communicate(timeout=60)  # does not hang
    assert process.returncode not in (0, None)
    assert "Signal 9 (SIGKILL)" in message
    assert not ranks_of(out)
    killed_after = find_state(out)[0].step
    assert 3 <= killed_after < 30
    with torchrun(photos, out, recipe) as process:
        wait_for_step(process, out, killed_after + 3)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=60)
    assert message.count("stopped by SIGTERM; the state after step") == 2  # both ranks after the same
    stopped_after = find_state(out)[0].step
    assert killed_after + 3 <= stopped_after < 30
    listed = {line.split(":")[0] for line in (out / "skipped.txt").read_text().splitlines()}
    assert listed == {f"{name}/broken.png" for name in ("apples", "pears", "plums")}  # whichever rank came upon them
    for place in (out, whole):
        loop.train(load_config(str(recipe), photos, place), Console(quiet=True))
    found, expected = (read_lines(place / "metrics.jsonl") for place in (out, whole))
    assert [line["step"] for line in found] == list(range(1, 31)) == [line["step"] for line in expected]
    for name in ("loss", "dino", "ibot", "koleo"):
        np.testing.assert_allclose([x[name] for x in found], [x[name] for x in expected], rtol=2e-4, err_msg=name)
