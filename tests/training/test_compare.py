"""DINO beside DINOv2: one recipe twice, the same questions to both, and every figure where it comes from."""

import copy
import json
import math
import os
import signal
import statistics
import threading
import time
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import cli
from tests.arithmetic import SETTINGS
from training import compare as module
from training.compare import DINO, arguments, compare, config_of, judge, photos_to_judge, run_apart, stability, trained
from training.ending import Interrupted, RunStopped
from training.evaluate.knn import evaluate_knn
from training.evaluate.logistic import evaluate_logistic
from training.evaluate.robustness import CHANGES, robustness
from training.pages.compare_page import NETWORKS, RUNS, page, rows
from training.recipe import RECIPES
from training.setup import make_network
from training.train import train
from training.watch.monitor import read_lines

TINY = """
vit = { embed_dim = 16, depth = 2, num_heads = 2, img_size = 28, layerscale_init = 1.0 }
global_size = 28
local_size = 14
n_local = 2
cache_size = 32
n_prototypes = 32
head_hidden_dim = 16
head_bottleneck_dim = 8
batch_size = 8
epochs = 3
eval_resize = 28
eval_crop = 28
precision = "fp32"
device = "cpu"
held_out_share = 0.2
"""
OVERRIDES = ["log_every=1", "eval_every_epochs=1", "seed=3"]
QUIET = Console(quiet=True)


def in_this_process(command):
    train(config_of(command), QUIET)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of three classes, a recipe, and a finished comparison."""
    folder, rng = tmp_path_factory.mktemp("compare"), np.random.default_rng(0)
    for name, colour in (("apples", (200, 40, 40)), ("pears", (60, 180, 60)), ("plums <&>", (90, 40, 160))):
        for i in range(9):
            path = folder / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(-40, 40, (30, 40, 3))
            Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)
    (folder / "tiny.toml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def found(place):
    return run_comparison(place)


def run_comparison(place, out="out", run=in_this_process, overrides=OVERRIDES, console=QUIET):
    recipe = str(place / "tiny.toml")
    return compare(str(place / "photos"), place / out, base=recipe, overrides=overrides, run=run, console=console)


def configs(place, out="out"):
    recipe = str(place / "tiny.toml")
    return {n: config_of(arguments(n, str(place / "photos"), place / out, recipe, OVERRIDES)) for n in RUNS}


def test_the_recipe_dino_is_smoke_and_the_changes():
    smoke, dino = (tomllib.loads((RECIPES / f"{name}.toml").read_text()) for name in ("smoke", "dino"))
    assert dino == smoke | DINO
    assert DINO.keys().isdisjoint(smoke)


def test_the_two_runs_differ_in_the_changes_and_in_nothing_else(tmp_path):
    pair = [config_of(arguments(n, "photos", tmp_path, "smoke", ["epochs=2", "log_every=7"])) for n in RUNS]
    dino, dinov2 = (config.model_dump(exclude={"out"}) for config in pair)
    assert {key: dino[key] for key in dino if dino[key] != dinov2[key]} == DINO
    assert (dino["epochs"], dino["log_every"], dino["on_collapse"]) == (2, 7, "warn")
    assert [config.out for config in pair] == [tmp_path / "dino", tmp_path / "dinov2"]


def test_both_train_before_anything_is_evaluated_and_on_the_same_budget(place, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "measure", lambda *_: calls.append("measure") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_comparison(place, "order", run=lambda command: calls.append(config_of(command)))
    first, second, last = calls
    assert (first.out.name, second.out.name, last) == ("dino", "dinov2", "measure")
    same = ("data", "seed", "epochs", "batch_size", "vit_config", "global_size", "local_size", "n_local", "lr")
    assert all(getattr(first, name) == getattr(second, name) for name in same)


def test_every_figure_is_of_the_run_or_of_its_network(place, found):
    assert json.loads((place / "out" / "compare.json").read_text()) == found
    assert (found["photos"], found["held_out"], found["classes"], found["steps"]) == (22, 5, 3, 6)
    assert found["photos_seen"] == 48
    both = configs(place)
    known, held_out = photos_to_judge(both["dinov2"], place / "index")
    backbones = {name: trained(config) for name, config in both.items()}
    backbones["untrained"] = make_network(both["dinov2"]).backbone
    for name, backbone in backbones.items():
        figures, spec = found["networks"][name], both["dinov2"].eval_spec
        knn = evaluate_knn(backbone.eval(), known, held_out, spec, (10, 20))
        assert figures["knn"] == {p: {str(k): v for k, v in knn[p].items()} for p in ("cls", "mean")}
        assert figures["robustness"]["changes"].keys() == CHANGES.keys()
        assert figures["robustness"] == robustness(backbone, held_out, spec)
        assert 0 < figures["rankme_share"] <= 1
        assert 0 <= figures["logistic"]["accuracy"] <= 1
    cls = [figures["robustness"]["mean"]["cosine"] for figures in found["networks"].values()]
    assert len(set(cls)) == 3
    for name in RUNS:
        lines = read_lines(place / "out" / name / "metrics.jsonl")
        run = found["networks"][name]["run"]
        assert run["lines"] == len(lines) == 6
        assert run["images_per_s"] == statistics.median(line["images_per_s"] for line in lines)
        assert run["peak_memory_bytes"] == max(line["peak_memory_bytes"] for line in lines)
        assert run["seconds"] == pytest.approx(sum(line["seconds"] for line in lines), abs=0.1)
        assert run["dino_over_ln_k"] == pytest.approx(lines[-1]["dino"] / math.log(32))
        assert run["stability"] == stability([line["dino_over_ln_k"] for line in lines])
    assert [line["ibot"] > 0 for line in read_lines(place / "out" / "dinov2" / "metrics.jsonl")] == [True] * 6
    assert [line["ibot"] for line in read_lines(place / "out" / "dino" / "metrics.jsonl")] == [0.0] * 6


def test_the_command_goes_on_and_finds_the_same(place, found, monkeypatch):
    monkeypatch.setattr(module, "run_apart", in_this_process)
    before = {name: (place / "out" / name / "metrics.jsonl").read_text() for name in RUNS}
    command = ["compare", "--data", str(place / "photos"), "--out", str(place / "out")]
    result = CliRunner().invoke(cli.app, [*command, "--base", str(place / "tiny.toml"), *OVERRIDES])
    assert result.exit_code == 0, result.output
    assert "untrained" in result.output
    assert "compare.html" in result.output
    assert json.loads((place / "out" / "compare.json").read_text()) == found
    assert {name: (place / "out" / name / "metrics.jsonl").read_text() for name in RUNS} == before
    refused = CliRunner().invoke(cli.app, [*command, "centering=softmax"])
    assert refused.exit_code == 2
    assert "cannot be set for both" in refused.output


def test_photos_of_one_class_are_compared_without_accuracy(place, found):
    config = configs(place)["dinov2"]
    known, held_out = photos_to_judge(config, place / "index")
    figures = judge(trained(config), known, held_out, config.eval_spec, has_classes=False)
    assert figures.keys() == {"robustness", "rankme_share"}
    without = copy.deepcopy(found)
    for network in without["networks"].values():
        del network["knn"], network["logistic"]
    assert [row for row in rows(found) if row[0] != "accuracy"] == rows(without)


def test_a_linear_classifier_is_asked_too(place, found):
    """Colours of the classes are far apart: a linear classifier on real features tells them."""
    features = torch.eye(3).repeat(5, 1) + 0.01 * torch.arange(15)[:, None]
    labels = torch.arange(3).repeat(5)
    assert evaluate_logistic(features, labels, features, labels, c_grid=module.CS).accuracy == 1
    assert found["networks"]["dinov2"]["logistic"]["c"] in module.CS


def test_stability_by_hand():
    steady = [1.0, 0.5, 0.9, 0.8, 0.7, 0.6]  # falls evenly in the last half, and rises by 0.4 before it
    assert stability(steady) == {"change_std": pytest.approx(0.0, abs=1e-12), "jumps": 1}
    rough = [1.0, 1.0, 0.9, 0.6, 0.8, 0.5]
    assert stability(rough)["change_std"] == pytest.approx(statistics.stdev([0.2, -0.3]))
    assert stability([0.9, 0.94, 0.98])["jumps"] == 0  # 0.04 is not yet a jump
    assert stability([0.9, None, 0.9]) == {"change_std": None, "jumps": 1}
    assert stability([]) == {"change_std": None, "jumps": 0}


def test_the_table_has_a_cell_for_each_network_that_has_the_figure(found):
    table = {(group, name): cells for group, name, cells in rows(found)}
    assert len(table) == 5 + len(CHANGES) + 1 + 2 + 6
    assert all(len(cells) == len(NETWORKS) for cells in table.values())
    knn = [f"{100 * found['networks'][name]['knn']['cls']['20']:.1f} %" for name in NETWORKS]
    assert table["accuracy", "k-NN, class token, k=20"] == knn
    untrained, *trained_ones = table["cost", "peak memory"]
    assert untrained == ""
    assert all(cell.endswith(" MiB") for cell in trained_ones)


def test_the_page_stands_by_itself(place, found):
    text = (place / "out" / "compare.html").read_text()
    for words in (
        "DINO and DINOv2",
        "share of ln K",
        "k-NN during the run, knn_cls_20",
        "JPEG quality 20",
        "ibot_weight",
    ):
        assert words in text
    assert text.count("<svg") == 7  # DINO loss, k-NN at 10 and 20, RankMe, loss, entropy, speed
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    hostile = copy.deepcopy(found) | {"data": "<b>&"}
    assert "<b>&" not in page(hostile, place / "out")
    assert "&lt;b&gt;&amp;" in page(hostile, place / "out")


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        ("smoke", ["centering=softmax", "koleo_weight=0.2"], "centering, koleo_weight: DINO and DINOv2 differ in this"),
        ("tiny", ["teacher=dinov2_vits14"], "has a frozen teacher"),
        ("tiny", ["held_out_share=0"], "0 images are held out"),
        ("tiny", ["no_such=1"], "no_such"),
        ("nothing", [], "unknown recipe 'nothing'"),
    ],
)
def test_what_is_no_comparison_is_refused_before_training(place, tmp_path, base, overrides, message):
    base = str(place / "tiny.toml") if base == "tiny" else base
    with pytest.raises(ValueError, match=message):
        compare(str(place / "photos"), tmp_path, base=base, overrides=overrides, run=pytest.fail, console=QUIET)


def test_a_run_in_a_process_of_its_own(place, monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    command = arguments("dino", str(place / "photos"), place / "apart", str(place / "tiny.toml"), ["epochs=1"])
    run_apart(command)
    lines = read_lines(place / "apart" / "dino" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2]
    assert (place / "apart" / "dino" / "checkpoint.safetensors").exists()


def test_a_run_that_fails_ends_the_comparison(monkeypatch):
    monkeypatch.setattr(module, "START", "import sys; sys.exit(3)")
    with pytest.raises(RunStopped, match="ended with status 3"):
        run_apart([])


def test_sigterm_is_handed_on(monkeypatch, tmp_path):
    ready = tmp_path / "ready"
    monkeypatch.setattr(
        module,
        "START",
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({128 + signal.SIGTERM}))\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
        "time.sleep(60)",
    )

    def press():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(Interrupted, match="run the same command again to resume"):
        run_apart([str(ready)])
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_comparison_exits_as_a_stopped_run(place, monkeypatch):
    def stopped(command):
        raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    monkeypatch.setattr(module, "run_apart", stopped)
    command = ["compare", "--data", str(place / "photos"), "--out", str(place / "stopped")]
    assert CliRunner().invoke(cli.app, [*command, "--base", str(place / "tiny.toml")]).exit_code == 128 + signal.SIGTERM


def test_report_is_written_again(place, found):
    page_of_run = place / "out" / "dinov2" / "report.html"
    page_of_run.unlink()
    result = CliRunner().invoke(cli.app, ["report", str(page_of_run.parent)])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(page_of_run)
    assert page_of_run.exists()
    refused = CliRunner().invoke(cli.app, ["report", str(place / "photos")])
    assert refused.exit_code == 2
    assert "is not a run's folder" in refused.output
