"""A run under everything that happens to runs: killed, asked to leave, a full disk, broken files, odd users."""

import gc
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load_checkpoint, save_checkpoint
from model.vit import DinoVisionTransformer
from tests.arithmetic import ENVIRONMENT
from tests.training.tiny import QUIET, TINY
from training import run as between
from training import train as loop
from training.__main__ import main
from training.config import TrainConfig
from training.ending import Interrupted, RunStopped
from training.state import alone_in, find_state
from training.watch import collapse
from training.watch.measure import KNN
from training.watch.monitor import read_lines
from training.watch.sentinels import Limits, Sentinels, Verdict

ROOT = Path(__file__).parents[2]
FIGURES = ("step", "loss", "dino", "ibot", "koleo", "lr", "grad_norm_backbone", "rankme_share")


def make_photos(folder, n=9):
    rng = np.random.default_rng(0)
    for name in ("apples", "pears", "plums"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 30)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos") / "here")


def config(photos, out, **changes):
    return TrainConfig.model_validate({"data": photos, "out": out, **TINY, **changes})


def lines(out):
    return [[line.get(name) for name in FIGURES] for line in read_lines(out / "metrics.jsonl")]


def events(out, kind):
    return [line["message"] for line in read_lines(out / "events.jsonl") if line["kind"] == kind]


def same_weights(a, b):
    first, second = load_checkpoint(a)[0], load_checkpoint(b)[0]
    return all(torch.equal(first[key], second[key]) for key in first)


def recipe(folder, **changes):
    """The tiny settings as a recipe's file."""

    def toml(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    path = folder / "tiny.toml"
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in {**TINY, **changes}.items()))
    return path


def start(photos, out, path, *overrides, **options):
    command = [sys.executable, "-m", "training", "--data", photos, "--out", out, "--recipe", path, *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, **options
    )


def with_sigterm(step, at):
    def run(*arguments):
        if arguments[4] == at:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    return run


def guarded_by(guard, monkeypatch):
    """The k-NN guard before the first step and after later ones."""
    monkeypatch.setattr(loop, "evaluate", guard)


def wait_for_step(process, out, step):
    while not any(line[0] >= step for line in lines(out)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def test_kill_sigterm_and_a_full_disk_from_the_command_line(photos, tmp_path, monkeypatch, capsys):
    """One run through several processes of `python -m training`; in the end nobody can tell."""
    path = recipe(tmp_path, epochs=10)
    whole, out = tmp_path / "whole", tmp_path / "run"
    with start(photos, out, path, "save_every_minutes=1e-9") as process:
        wait_for_step(process, out, 5)
        process.kill()
    killed_after = find_state(out)[0].step
    assert 1 <= killed_after < 30
    given = ["training", "--data", photos, "--out", out, "--recipe", path, "save_every_minutes=60"]
    monkeypatch.setattr("sys.argv", [str(word) for word in given])
    one_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", with_sigterm(one_step, killed_after + 3))
    assert main() == 143
    message = capsys.readouterr().err
    assert f"stopped by SIGTERM; the state after step {killed_after + 4} of 30 is saved: run the same" in message
    monkeypatch.setattr(loop, "train_step", one_step)
    stopped_after = find_state(out)[0].step
    assert stopped_after == killed_after + 4

    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, free[1]))  # bytes of a file: a state has more
    try:
        monkeypatch.setattr("sys.argv", [*sys.argv, "save_every_minutes=1e-9"])
        assert main() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert "run the same command again to resume" in message
    assert find_state(out)[0].step == stopped_after
    resumed = loop.train(config(photos, out, epochs=10, recipe="tiny"), QUIET)
    assert same_weights(resumed, loop.train(config(photos, whole, epochs=10, recipe="tiny"), QUIET))
    assert lines(out) == lines(whole)


def test_kills_at_random_moments(capsys, monkeypatch):
    """A few; the script alone takes all cases and as many kills as one has time for."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_crash

    case = "softmax, two heads, streamed"
    monkeypatch.setattr("sys.argv", ["training_crash.py", "--kills", "3", "--seed", "3", "--case", case])
    assert training_crash.main() == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["cases"][case]["kills"] >= 3


class PulledError(Exception):
    """Stands for the plug."""


def pulled(step, at):
    def run(*arguments):
        if arguments[4] == at:
            raise PulledError
        return step(*arguments)

    return run


def test_sigterm_is_heard_after_the_step_and_before_the_first_one(photos, tmp_path, monkeypatch):
    out, one_step = tmp_path / "run", loop.train_step

    monkeypatch.setattr(loop, "train_step", with_sigterm(one_step, 4))
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the state after step 5 of 9 is saved"):
        loop.train(config(photos, out, log_every=100), QUIET)
    assert find_state(out)[0].step == 5
    monkeypatch.setattr(loop, "train_step", one_step)
    monkeypatch.setattr(loop, "load_state", lambda saved, parts: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="run the same command again to resume"):
        loop.train(config(photos, out), QUIET)
    assert find_state(out)[0].step == 5


def test_damaged_states_are_passed_over_in_the_loop(photos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    expected = loop.train(config(photos, whole), QUIET)
    loop.train(config(photos, out, save_every_minutes=1e-9, keep_states=4), QUIET)
    for step in (8, 9):
        path = out / "states" / f"{step:09}.pt"
        path.write_bytes(path.read_bytes()[:-1])
    tampered = config(photos, out, save_every_minutes=1e-9, keep_states=1)
    assert same_weights(loop.train(tampered, QUIET), expected)
    assert lines(out) == lines(whole)
    assert any("000000009.pt is damaged" in message for message in events(out, "warning"))
    for path in (out / "states").glob("*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match="none is complete"):
        loop.train(tampered, QUIET)
    shutil.rmtree(out / "states")  # what the message says
    assert same_weights(loop.train(tampered, QUIET), expected)
    assert lines(out) == lines(whole)


# Sentinels


def flat(figures_from):
    """`rankme_share` as if the features had collapsed from some step on, until the rates are lowered."""

    def run(run, step, terms, seen):
        shown = seen[:1].expand(len(seen), -1) if step >= figures_from and run.sentinels.lr_factor == 1 else seen
        return log_line(run, step, terms, shown)

    log_line = loop.log_line
    return run


def test_collapse_goes_back_with_lower_rates_and_a_killed_run_decides_the_same(photos, tmp_path, monkeypatch):
    settings = {
        "on_collapse": "rollback",
        "sentinel_lines": 2,
        "min_rankme_share": 0.14,
        "save_every_minutes": 1e-9,
        "keep_states": 1,
        "dino_weight": 1.0,
        "n_prototypes": 4096,  # so that the loss starts below ln K
        "teacher_temp": [0.02, 0.02],
        "lr": 1e-3,
    }
    monkeypatch.setattr(loop, "log_line", flat(4))
    monkeypatch.setattr(collapse, "signs", only_rank)
    whole, out = tmp_path / "whole", tmp_path / "run"
    expected = loop.train(config(photos, whole, **settings), QUIET)
    [message, after] = events(whole, "rollback")
    assert "collapse" in message
    assert "back to step 3 or before, and continues with 0.5 of the lr" in message
    assert after == "continuing after step 3"  # though but one state is kept
    one_step = loop.train_step
    for at in (4, 7):
        monkeypatch.setattr(loop, "train_step", pulled(one_step, at))
        with pytest.raises(PulledError):
            loop.train(config(photos, out, **settings), QUIET)
    monkeypatch.setattr(loop, "train_step", one_step)
    assert same_weights(loop.train(config(photos, out, **settings), QUIET), expected)
    assert lines(out) == lines(whole)
    assert find_state(out)[0].memory == find_state(whole)[0].memory
    with pytest.raises(RunStopped, match=r"collapse.*The run stops; its checkpoints are kept"):
        loop.train(config(photos, tmp_path / "stop", **{**settings, "on_collapse": "stop"}), QUIET)
    assert (tmp_path / "stop" / "checkpoint.safetensors").exists()


def only_rank(figures, limits, state):
    low = figures["rankme_share"] < limits.min_rankme_share
    return {"rank": "the class tokens are one", "spread": "their mean cosine is 1"} if low else {}


def test_a_network_that_really_collapses_is_stopped(photos, tmp_path):
    """Without centring that holds and at a high temperature the targets say nothing."""
    ruin = {"teacher_temp": [10.0, 10.0], "centering": "softmax", "on_collapse": "stop", "epochs": 6, "lr": 1e-4}
    with pytest.raises(RunStopped, match=r"collapse.*(of ln K|entropy)"):
        loop.train(config(photos, tmp_path / "run", sentinel_lines=3, **ruin), QUIET)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] < 18
    assert len(events(tmp_path / "run", "stop")) == 1


def test_a_nan_of_the_last_step_is_passed_over_and_the_run_is_over(photos, tmp_path, monkeypatch):
    one_step = loop.train_step

    def spoiled(*arguments):
        terms, seen = one_step(*arguments)
        return (terms | {"loss": terms["loss"] * math.nan} if arguments[4] == 8 else terms), seen

    monkeypatch.setattr(loop, "train_step", spoiled)
    out = tmp_path / "run"
    loop.train(config(photos, out), QUIET)
    saved, _ = find_state(out)
    assert (saved.step, saved.memory["sentinels"]["passed_over"]) == (9, [9])
    with pytest.raises(RunStopped, match=r"loss is nan.*batch is stored"):
        loop.train(config(photos, tmp_path / "stop", on_not_finite="stop"), QUIET)


def falling(values):
    """k-NN by the number of steps that the average has moved: what the guard is told, whatever the network."""

    def run(run, step):
        verdict = run.sentinels.check_measure(step, KNN, values(step, run.sentinels.lr_factor), 10**9)
        run.monitor.evaluated(step, {"knn_cls_10": values(step, run.sentinels.lr_factor)})
        return verdict

    return run


def test_the_guard_goes_back_to_the_best_step_however_long_ago(photos, tmp_path, monkeypatch):
    def accuracy(step, lr_factor):
        return 0.5 + step / 100 if step <= 3 or lr_factor < 1 else 0.6 - step / 25

    guarded_by(falling(accuracy), monkeypatch)
    settings = {
        "on_measure": "rollback",
        "eval_every_epochs": 1,
        "epochs": 4,
        "keep_states": 1,
        "save_every_minutes": 1e-9,
    }
    whole, out = tmp_path / "whole", tmp_path / "run"
    expected = loop.train(config(photos, whole, **settings), QUIET)
    assert events(whole, "rollback")[-1] == "continuing after step 3"
    assert [line["step"] for line in read_lines(whole / "evaluations.jsonl")] == [0, 3, 6, 9, 12]
    half = load_checkpoint(expected)[2]["settings"]["lr"] * math.sqrt(8 / 1024) / 2
    assert max(line["lr"] for line in read_lines(whole / "metrics.jsonl")[3:]) <= half * 1.001
    one_step = loop.train_step
    for at in (0, 5, 4, 8):
        monkeypatch.setattr(loop, "train_step", pulled(one_step, at))
        with pytest.raises(PulledError):
            loop.train(config(photos, out, **settings), QUIET)
    monkeypatch.setattr(loop, "train_step", one_step)
    assert same_weights(loop.train(config(photos, out, **settings), QUIET), expected)
    assert lines(out) == lines(whole)
    assert read_lines(out / "evaluations.jsonl") == read_lines(whole / "evaluations.jsonl")


def test_a_run_that_the_guard_stops_keeps_its_best_step(photos, tmp_path, monkeypatch):
    guarded_by(falling(lambda step, _: 0.5 if step <= 3 else 0.1), monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(RunStopped, match="its checkpoints are kept"):
        loop.train(config(photos, out, on_measure="stop", eval_every_epochs=1, epochs=4), QUIET)
    assert find_state(out)[0].step == 3
    assert (out / "checkpoint.safetensors").exists()


def test_the_guard_keeps_what_the_weights_had_before_the_first_step(photos, tmp_path, monkeypatch):
    """Killed between the first state and the first step, a run still knows what it started from."""
    first = loop.train(config(photos, tmp_path / "first"), QUIET)
    out, guard = tmp_path / "run", loop.evaluate
    settings = {"init": first, "eval_every_epochs": 1, "epochs": 2, "held_out_share": 0.4, "batch_size": 4}

    def killed(run, step):
        raise PulledError

    guarded_by(killed, monkeypatch)
    with pytest.raises(PulledError):
        loop.train(config(photos, out, **settings), QUIET)
    assert find_state(out)[0].step == 0
    guarded_by(guard, monkeypatch)
    monkeypatch.setattr(loop, "train_step", pulled(loop.train_step, 0))
    for _ in range(2):
        with pytest.raises(PulledError):
            loop.train(config(photos, out, **settings), QUIET)
        [line] = read_lines(out / "evaluations.jsonl")  # measured once
        assert line["step"] == 0
        assert find_state(out)[0].memory["sentinels"]["best"] == line["own_knn"]


def tinted(folder, n=40):
    """Grey images of all brightnesses with a faint tint, which is their class."""
    rng = np.random.default_rng(1)
    for label, tint in (("red", (6, 0, -6)), ("blue", (-6, 0, 6))):
        (folder / label).mkdir(parents=True)
        for i in range(n):
            grey = Image.fromarray(rng.integers(30, 226, (4, 4), dtype=np.uint8)).resize((32, 32))
            pixels = np.asarray(grey, np.int16)[:, :, None] + np.array(tint)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


@torch.no_grad()
def tint_reader(path, config):
    """A checkpoint that sees red minus blue and nothing else: its patch embedding is set by hand, not learned."""
    torch.manual_seed(0)
    model, spec = DinoVisionTransformer(config.vit_config), config.eval_spec
    weight, bias = model.patch_embed.proj.weight.zero_(), model.patch_embed.proj.bias.zero_()
    for channel, sign in enumerate((1, -1)):
        weight[channel, 0] = sign * spec.std[0] / weight[0, 0].numel()
        weight[channel, 2] = -sign * spec.std[2] / weight[0, 0].numel()
        bias[channel] = sign * (spec.mean[0] - spec.mean[2])
    model.pos_embed.zero_()
    for block in model.blocks:  # attention hands the class token the patches as they are
        block.attn.qkv.weight[2 * model.embed_dim :] = torch.eye(model.embed_dim)
        block.attn.proj.weight.copy_(torch.eye(model.embed_dim))
    save_checkpoint(path, model.state_dict(), config.vit_config, {})
    return path


def test_a_ruinous_rate_is_noticed_by_the_guard(tmp_path):
    """From a checkpoint that reads tints, at a rate that wrecks it: the run stops, or slows down.

    The first steps are thousands of times larger than the weights that read the tint, and follow the brightness of the
    images: whatever the arithmetic, k-NN falls from 100 % to about chance.
    """
    data = tinted(tmp_path / "tinted")
    good = tint_reader(tmp_path / "good.safetensors", config(data, tmp_path))
    ruin = {"held_out_share": 0.4, "n_local": 0, "drop_path": 0.0, "warmup": 0.0, "seed": 2, "init": good}
    ruin |= {"measure": "own", "lr": 5.0, "momentum": [0.0, 0.0], "eval_every_epochs": 1, "epochs": 4}
    out = tmp_path / "ruined"
    with pytest.raises(RunStopped, match=r"k-NN accuracy .*down from 100\.0% at step 0.*more than.*lower lr"):
        loop.train(config(data, out, **ruin), QUIET)
    before, after = [line["knn_cls_10"] for line in read_lines(out / "evaluations.jsonl")]
    assert before == 1
    assert after < 0.8
    out = tmp_path / "back"
    slow = {**ruin, "on_measure": "rollback", "rollback_lr_factor": 1e-9}
    loop.train(config(data, out, **slow), QUIET)
    assert "continuing after step 0" in events(out, "rollback")
    assert json.loads((out / "knn.json").read_text())["cls"]["10"] == pytest.approx(before, abs=0.1)


# Data


def test_one_in_twenty_files_broken_in_a_folder_and_in_shards(tmp_path):
    data = make_photos(tmp_path / "photos", n=20)
    files = sorted(data.rglob("*.png"))
    whole = files[5].read_bytes()
    files[3].write_bytes(whole[: len(whole) // 2])  # cut
    files[30].write_bytes(b"")
    Image.new("RGB", (400, 2)).save(files[45])  # reads, but no image
    names = [str(files[i].relative_to(data)) for i in (3, 30, 45)]
    shard = tmp_path / "shards" / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for path in files:
            tar.add(path, str(path.relative_to(data)))
    held_out_too = {"held_out_share": 0.5, "eval_every_epochs": 1, "sheet_every": 2, "epochs": 2, "whiten": 0.1}
    for name, where, cache in (("folder", data, 2**32), ("streamed", data, 0), ("tar", tmp_path / "shards", 0)):
        out = tmp_path / name
        loop.train(config(where, out, cache_bytes=cache, **held_out_too), QUIET)
        listed = (out / "skipped.txt").read_text().splitlines()
        trained = [line for line in listed if ": " in line and line.split(": ", 1)[1]]
        assert len(trained) == len(listed)
        found = {line.split(": ")[0].rpartition("a.tar/")[2] for line in listed}
        assert found <= set(names), listed
        assert found, name
        knn = json.loads((out / "knn.json").read_text())["cls"]["10"]
        assert 0 <= knn <= 1
        assert len(read_lines(out / "metrics.jsonl")) == len(read_lines(tmp_path / "folder" / "metrics.jsonl"))


def test_streamed_photos_are_listed_though_the_run_is_killed(photos, tmp_path, monkeypatch):
    data = shutil.copytree(photos, tmp_path / "photos")
    for name in ("apples", "pears"):
        (data / name / "3.png").write_bytes(b"no photo")
    out, one_step = tmp_path / "run", loop.train_step
    streamed = config(data, out, cache_bytes=0, save_every_minutes=1e-9, held_out_share=0.0)

    monkeypatch.setattr(loop, "train_step", pulled(one_step, 7))
    with pytest.raises(PulledError):
        loop.train(streamed, QUIET)
    assert {line.split(":")[0] for line in (out / "skipped.txt").read_text().splitlines()} == {
        "apples/3.png",
        "pears/3.png",
    }


# Users


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, r"batch_size=64 is more than the 25 images"),
        ({"device": "cuda"}, r"device='cuda': torch .* finds no GPU"),
        ({"device": "cuda:7"}, r"device='cuda:7'"),
        ({"device": "toaster"}, r"device='toaster'"),
        ({"device": "meta"}, r"device='meta'.*cpu.*cuda"),
        ({"micro_batch": 3}, r"batch_size=8 must be a multiple of .*micro_batch=3"),
        ({"init": "nowhere.safetensors"}, r"nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_words(photos, tmp_path, changes, message):
    if torch.cuda.is_available() and str(changes.get("device", "")).startswith("cuda"):
        pytest.skip("this machine has a GPU")
    with pytest.raises((ValueError, OSError), match=message):
        loop.train(config(photos, tmp_path / "run", **changes), QUIET)


@pytest.mark.parametrize("place", [".", "runs/mine", "apples"])
def test_a_run_among_its_own_photos_is_refused(photos, place):
    with pytest.raises(ValueError, match=r"is inside data=.*the run would train on its own image sheets"):
        loop.train(config(photos, photos / place), QUIET)
    assert not (photos / "runs").exists()


def test_a_second_process_on_the_same_run_is_refused(photos, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with alone_in(out), pytest.raises(ValueError, match="another process trains in"):
        loop.train(config(photos, out), QUIET)
    assert {path.name for path in out.iterdir()} == {"lock"}
    loop.train(config(photos, out, epochs=1), QUIET)


def test_the_command_line_says_what_is_wrong_in_a_line(photos, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["training", *(str(a) for a in arguments)])
        return main(), capsys.readouterr().err

    path = recipe(tmp_path)
    (tmp_path / "file").write_text("")
    status, message = run("--data", photos, "--recipe", path, "--out", tmp_path / "file" / "run")
    assert (status, "file" in message) == (2, True)
    path.write_text(path.read_text() + "lerning_rate = 3\n")
    status, message = run("--data", photos, "--recipe", path, "--out", tmp_path / "run")
    assert (status, "lerning_rate" in message) == (2, True)
    status, message = run("--data", photos, "--recipe", "smoke", "--out", tmp_path / "run", "batchsize=3")
    assert (status, "batchsize" in message) == (2, True)
    status, message = run("--data", photos, "--recipe", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert (status, "none.toml" in message) == (2, True)


def test_half_precision_on_a_cpu_trains(photos, tmp_path):
    loop.train(config(photos, tmp_path / "run", precision="fp16", epochs=1), QUIET)
    assert all(math.isfinite(line[1]) for line in lines(tmp_path / "run"))


def test_nothing_is_left_behind(photos, tmp_path, monkeypatch):
    def state():
        return (
            {thread.name for thread in threading.enumerate()},
            signal.getsignal(signal.SIGTERM),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.distributed.is_initialized(),
            sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else [],
        )

    loop.train(config(photos, tmp_path / "warm", epochs=1), QUIET)  # what libraries keep for ever
    gc.collect()  # files that other tests have left open
    before = state()
    loop.train(config(photos, tmp_path / "run", epochs=1, cache_bytes=0), QUIET)
    assert state() == before
    monkeypatch.setattr(loop, "train_step", pulled(loop.train_step, 1))
    with pytest.raises(PulledError):
        loop.train(config(photos, tmp_path / "pulled", cache_bytes=0), QUIET)
    assert state() == before
    monkeypatch.undo()

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(between, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(config(photos, tmp_path / "full", cache_bytes=0), QUIET)
    assert state() == before


def test_a_run_in_another_thread_than_the_main_one(photos, tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(loop.train(config(photos, tmp_path / "run", epochs=1), QUIET)))
    thread.start()
    thread.join()
    assert done


def test_ranks_share_what_the_sentinels_of_the_first_decide(monkeypatch):
    """Rank 1 has figures of its own; it must not act on them."""
    from types import SimpleNamespace

    told = {"rollbacks": 1, "lr_factor": 0.5}
    sentinels = Sentinels(Limits(32))
    verdict = Verdict("measure", "rollback", 6, 3, "x")
    state = {**sentinels.state_dict(), **told}
    monkeypatch.setattr(between, "from_main", lambda world, value: (verdict, state))
    run = SimpleNamespace(world=SimpleNamespace(is_main=False), sentinels=sentinels)

    def never():
        raise AssertionError("rank 1 asked its own")

    assert between.decide(run, never) == verdict
    assert (sentinels.lr_factor, sentinels.state.rollbacks) == (0.5, 1)
