"""What a run says: lines, files, and that none of them can stop it or lie after a resume."""

import io
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from training.watch import monitor as module
from training.watch.monitor import Monitor, RunSize, cut_lines, peak_memory_bytes, read_lines, to_numbers
from training.watch.sinks import Sink, make_sinks

FIGURES = {"loss": 2.0, "dino_over_ln_k": 0.9}


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


def console(**settings):
    return Console(file=io.StringIO(), width=300, **settings)


def test_a_line_holds_what_was_given_and_what_was_measured(tmp_path, clock):
    screen = console()
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen, peak_flops=1e6) as monitor:
        for step in (1, 2):
            with monitor.waiting():
                clock.seconds += 0.5
            clock.seconds += 1.5
            monitor.advance(step, flops=2e5)
        line = monitor.write(2, {"loss": torch.tensor(1.5), "epoch": 0.25, "dino_over_ln_k": torch.tensor([0.75])})
        clock.seconds += 1
        monitor.advance(3)
        monitor.write(3, FIGURES)
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert first == line
    assert list(first)[:4] == ["step", "loss", "epoch", "dino_over_ln_k"]
    assert (first["loss"], first["epoch"], first["dino_over_ln_k"]) == (1.5, 0.25, 0.75)
    assert (first["images_per_s"], first["data_wait_share"], first["mfu"]) == (4.0, 0.25, 0.1)  # 2 * 8 in 4 s
    assert first["peak_memory_bytes"] > 1e7
    assert (second["images_per_s"], second["data_wait_share"], "mfu" in second) == (8.0, 0.0, False)
    assert "step 2/10  epoch 0.25  loss 1.500  dino/lnK 0.750  4 img/s  mfu 10%  waits 25%" in screen.file.getvalue()


def test_evaluations_and_saves_are_not_training_time(tmp_path, clock):
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), console()) as monitor:
        clock.seconds += 2
        with monitor.paused():
            clock.seconds += 50
        monitor.advance(1)
        assert monitor.write(1, FIGURES)["images_per_s"] == 4.0


def test_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path):
    for terminal in (True, False):
        screen = console(force_terminal=terminal)
        with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen) as monitor:
            monitor.advance(1)
            monitor.write(1, FIGURES)
        assert ("step 1/10  loss" in screen.file.getvalue()) is not terminal
        assert "left" in screen.file.getvalue()


def test_a_log_line_is_one_line_with_the_time_of_day_and_the_time_left(tmp_path, monkeypatch):
    """Log files are not wrapped at 80 columns."""
    screen, seconds = Console(file=io.StringIO(), width=80), iter([100.0, 140.0])
    monitor = Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen)
    monkeypatch.setattr("training.watch.monitor.time.monotonic", lambda: next(seconds))
    with monitor:
        monitor.advance(1)
        monitor.write(1, {**FIGURES, "epoch": 0.5, "lr": 1e-3})
        monitor.say(1, "warning", "a long message " * 20)
    first, second = screen.file.getvalue().splitlines()
    shown = r"step 1/10  epoch 0\.50  loss 2\.000  dino/lnK 0\.900  lr 1\.0e-03  \d+ img/s  6 min left"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d  {shown}", first)  # 40 s for one step, and nine are left
    assert re.fullmatch(r"\d\d:\d\d:\d\d  warning: (a long message ){20}", second)


def test_all_tensors_come_over_in_one_transfer(monkeypatch):
    transfers = []
    whole = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self) or whole(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("one wait per figure"))
    figures = {"a": torch.tensor(1.0, requires_grad=True), "lr": 0.5, "b": torch.tensor([2.0]), "c": torch.tensor(3)}
    assert to_numbers(figures) == {"a": 1.0, "lr": 0.5, "b": 2.0, "c": 3.0}
    assert len(transfers) == 1


def test_what_is_not_finite_is_null_and_said(tmp_path):
    screen = console()
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen) as monitor:
        monitor.write(1, {"loss": torch.tensor(float("nan")), "x": float("inf"), "name": "kept", "none": None})
    [line] = read_lines(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["x"], line["name"], line["none"]) == (None, None, "kept", None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "not finite" in screen.file.getvalue()


def test_a_resumed_run_repeats_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Monitor(path, RunSize(10, 0, 8), console()) as monitor:
        for step in range(1, 7):
            monitor.write(step, FIGURES)
            monitor.evaluated(step, {"knn": step / 10})
            monitor.say(step, "warning", "[bold] something")
    with path.open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    with Monitor(path, RunSize(10, 4, 8), console()) as monitor:
        monitor.write(5, FIGURES)
        assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5]
        monitor.rewind(2)  # a rollback
        monitor.write(3, FIGURES)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert [line["step"] for line in read_lines(tmp_path / "evaluations.jsonl")] == [1, 2]
    assert [line["step"] for line in read_lines(tmp_path / "events.jsonl")] == [1, 2, 3, 4, 5, 6]  # a history
    assert not list(tmp_path.glob("*.tmp"))


def test_a_torn_line_never_meets_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but for its end
    cut_lines(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    before = path.stat().st_mtime_ns
    cut_lines(path, 5)
    assert path.stat().st_mtime_ns == before  # nothing to cut, nothing written
    cut_lines(tmp_path / "missing.jsonl", 5)
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_cut_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cut_lines(path, 1)
    assert len(read_lines(path)) == 2


def test_a_failing_sink_is_said_once_and_dropped(tmp_path):
    got, closed = [], []

    def fails(step, numbers):
        got.append(("bad", step))
        raise ConnectionError("no network [here]")

    sinks = [
        Sink("bad", fails, lambda: closed.append("bad")),
        Sink("good", lambda step, numbers: got.append((step, dict(numbers))), lambda: closed.append("good")),
    ]
    screen = console()
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen, sinks=sinks) as monitor:
        for step in (1, 2, 3):
            monitor.write(step, {**FIGURES, "word": "kept out of curves"})
        monitor.evaluated(3, {"knn": 0.5})
    assert screen.file.getvalue().count("no network [here]") == 1
    assert [entry for entry in got if entry[0] == "bad"] == [("bad", 1)]
    good = [entry for entry in got if entry[0] != "bad"]
    assert [step for step, _ in good] == [1, 2, 3, 3]
    assert good[0][1]["loss"] == 2.0
    assert not {"word", "step", "time"} & set(good[0][1])
    assert good[3][1] == {"knn": 0.5}
    assert closed == ["good"]


def test_a_full_disk_stops_neither_the_run_nor_the_later_lines(tmp_path, monkeypatch):
    screen = console()
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen) as monitor:
        monitor.write(1, FIGURES)
        whole = module.Path.open
        monkeypatch.setattr(module.Path, "open", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        monitor.write(2, FIGURES)
        monitor.write(3, FIGURES)
        monkeypatch.setattr(module.Path, "open", whole)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "torn')
        monitor.write(4, FIGURES)
    assert screen.file.getvalue().count("No space left") == 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 4]


def test_only_one_process_speaks(tmp_path):
    screen = console()
    sink = Sink("never", lambda *_: pytest.fail("written"), lambda: None)
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen, active=False, sinks=[sink]) as monitor:
        monitor.advance(1)
        assert monitor.write(1, FIGURES) == {}
        monitor.evaluated(1, {"knn": 0.1})
        monitor.say(1, "warning", "nothing")
    assert screen.file.getvalue() == ""
    assert not list(tmp_path.iterdir())


def test_waiting_for_data_is_said_once_with_what_to_change(tmp_path, clock):
    screen = console()
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), screen) as monitor:
        for step in range(1, 8):
            with monitor.waiting():
                clock.seconds += 1
            clock.seconds += 3
            monitor.write(step, FIGURES)
    assert screen.file.getvalue().count("25% of the time was spent waiting") == 1
    [event] = read_lines(tmp_path / "events.jsonl")
    assert (event["step"], event["kind"]) == (3, "warning")


def test_peak_memory_is_of_this_process():
    found = peak_memory_bytes(torch.device("cpu"))
    assert 1e7 < found < 1e12


def test_tensorboard_gets_the_figures(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sinks = make_sinks(tmp_path, 0, None, {}, pytest.fail)
    assert [sink.name for sink in sinks] == ["tensorboard"]
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), console(), sinks=sinks) as monitor:
        monitor.write(3, FIGURES)
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(3, 2.0)]


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    stub = SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for _ in range(2):
        make_sinks(tmp_path, 0, "groceries", {"lr": 1}, pytest.fail)[-1].write(5, {"loss": 1.0})
    assert started[0]["id"] == started[1]["id"]
    assert (started[0]["project"], started[0]["config"]) == ("groceries", {"lr": 1})
    assert logged == [(5, {"loss": 1.0})] * 2


def test_wandb_asked_for_and_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        make_sinks(tmp_path, 0, "groceries", {}, pytest.fail)


def test_a_sink_that_cannot_start_is_said_and_left_out(tmp_path, monkeypatch):
    def no_network(**_):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=no_network))
    said = []
    assert "wandb" not in [sink.name for sink in make_sinks(tmp_path, 0, "groceries", {}, said.append)]
    assert said == ["warning: wandb cannot be used in this run (ConnectionError: no network)"]


def test_every_line_is_json_for_strict_readers(tmp_path):
    with Monitor(tmp_path / "metrics.jsonl", RunSize(10, 0, 8), console()) as monitor:
        monitor.write(1, {"loss": float("-inf")})

    def refuse(word):
        raise ValueError(word)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
