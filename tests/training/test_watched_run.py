"""What a run watches and keeps: its measure, its best checkpoint, early ends, stops, signals and the report."""

import io
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from model.checkpoint import load_checkpoint
from tests.training.tiny import QUIET, TINY
from training import plan as planning
from training import release
from training import run as actions
from training import train as loop
from training.__main__ import main
from training.config import TrainConfig
from training.ending import STOPPED_STATUS, Interrupted, RunStopped
from training.measuring import Evaluation, choose_measure
from training.recipe import load_config
from training.setup import make_network
from training.state import find_state
from training.watch.measure import KNN, OWN, RETRIEVAL, VIEWS
from training.watch.monitor import read_lines
from training.watch.sentinels import Verdict


def make_images(folder, classes, n=9):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 30)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "of_classes", ("apples", "pears", "plums"))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("unlabelled") / "flat", ("one",), n=48)


def config(data, out, **changes):
    return TrainConfig.model_validate({"data": data, "out": out, **TINY, **changes})


def measured_as(values, monkeypatch):
    """Let the measure of a run have these values, one in each evaluation, whatever the network."""
    steps = iter(values)

    def evaluated(backbone, data, spec, measure):
        value = next(steps)
        return Evaluation({"cls": {1: value}}, {}, value, 10**9)

    monkeypatch.setattr(actions, "evaluate_backbone", evaluated)
    monkeypatch.setattr(release, "evaluate_backbone", lambda *arguments: Evaluation({"cls": {1: 0.123}}))


def evaluations(out):
    return [(line["step"], line["knn_cls_1"]) for line in read_lines(out / "evaluations.jsonl")]


def screen():
    return Console(file=io.StringIO(), width=80, record=True)


# The best checkpoint


def test_the_best_checkpoint_is_released_and_the_last_one_kept(images, tmp_path, monkeypatch):
    measured_as([0.5, 0.7, 0.9, 0.6], monkeypatch)
    out = tmp_path / "run"
    path = loop.train(config(images, out, eval_every_epochs=1, on_measure="warn"), QUIET)
    assert path == out / "checkpoint.best.safetensors"
    weights, _, facts = load_checkpoint(path)
    assert (facts["steps"], facts["measure"], facts["knn"]) == (6, {"own_knn": 0.9}, {"cls": {"1": 0.9}})
    last, _, last_facts = load_checkpoint(out / "checkpoint.safetensors")
    assert (last_facts["steps"], last_facts["knn"]) == (9, {"cls": {"1": 0.6}})
    assert not torch.equal(weights["norm.weight"], last["norm.weight"])
    assert evaluations(out) == [(0, 0.5), (3, 0.7), (6, 0.9), (9, 0.6)]  # T9: the last one is in the log too
    assert json.loads((out / "knn.json").read_text()) == {"cls": {"1": 0.9}}


def test_a_model_below_its_start_is_never_released(images, tmp_path, monkeypatch):
    measured_as([0.9, 0.8, 0.7, 0.6], monkeypatch)
    out, shown = tmp_path / "run", screen()
    path = loop.train(config(images, out, eval_every_epochs=1, on_measure="warn"), shown)
    _, _, facts = load_checkpoint(path)
    assert facts["steps"] == 0
    text = shown.export_text()
    assert "90.0% at the start, 90.0% released" in text
    assert "training did not help: the released checkpoint is the network that the run started from" in text


def test_a_killed_run_keeps_the_best_of_its_first_part(images, tmp_path, monkeypatch):
    settings = {"eval_every_epochs": 1, "on_measure": "warn", "save_every_minutes": 1e6}
    out = tmp_path / "run"
    measured_as([0.5, 0.9], monkeypatch)
    one_step = loop.train_step

    class PulledError(Exception):
        pass

    def pulled(*arguments):
        if arguments[4] == 4:
            raise PulledError
        return one_step(*arguments)

    monkeypatch.setattr(loop, "train_step", pulled)
    with pytest.raises(PulledError):
        loop.train(config(images, out, **settings), QUIET)
    kept, _, _ = load_checkpoint(out / "checkpoint.best.safetensors")
    monkeypatch.setattr(loop, "train_step", one_step)
    measured_as([0.6, 0.7], monkeypatch)
    weights, _, facts = load_checkpoint(loop.train(config(images, out, **settings), QUIET))
    assert facts["steps"] == 3
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert evaluations(out) == [(0, 0.5), (3, 0.9), (6, 0.6), (9, 0.7)]


def test_a_whitened_best_checkpoint_is_made_from_the_trained_one_each_time(images, tmp_path, monkeypatch):
    measured_as([0.5, 0.9, 0.6], monkeypatch)
    out, settings = tmp_path / "run", {"eval_every_epochs": 1, "on_measure": "warn", "epochs": 2}
    trained, _, _ = load_checkpoint(loop.train(config(images, out, **settings), QUIET))
    for _ in range(2):
        whitened, _, facts = load_checkpoint(loop.train(config(images, out, **settings, whiten=0.1), QUIET))
        assert (facts["whitened"], facts["steps"], facts["knn"]) == (True, 3, {"cls": {"1": 0.123}})
    assert not torch.equal(whitened["norm.weight"], trained["norm.weight"])
    again, _, _ = load_checkpoint(loop.train(config(images, out, **settings), QUIET))
    assert all(torch.equal(again[name], trained[name]) for name in trained)


def test_the_evaluations_of_a_whitened_run_see_whitened_backbones(images, tmp_path, monkeypatch):
    seen = []

    def evaluated(backbone, data, spec, measure):
        seen.append(backbone.norm.weight.clone())
        return Evaluation({"cls": {1: 0.5}}, {}, 0.5, 10**9)

    monkeypatch.setattr(actions, "evaluate_backbone", evaluated)
    out = tmp_path / "run"
    loop.train(config(images, out, eval_every_epochs=1, on_measure="warn", epochs=1, whiten=0.1), QUIET)
    last, _, _ = load_checkpoint(out / "checkpoint.safetensors")
    assert len(seen) == 2
    assert torch.equal(seen[-1], last["norm.weight"])


def test_a_run_ends_early_if_nothing_gets_better_and_stays_ended(images, tmp_path, monkeypatch):
    measured_as([0.5, 0.8, 0.7, 0.75, 0.9], monkeypatch)
    out = tmp_path / "run"
    settings = {"eval_every_epochs": 1, "on_measure": "warn", "epochs": 6, "patience": 2}
    _, _, facts = load_checkpoint(loop.train(config(images, out, **settings), QUIET))
    assert [step for step, _ in evaluations(out)] == [0, 3, 6, 9]
    assert facts["steps"] == 3
    shown = screen()
    _, _, facts = load_checkpoint(loop.train(config(images, out, **settings), shown))  # measures nothing again
    assert facts["steps"] == 3
    assert "80.0% released" in shown.export_text()
    assert find_state(out)[0].step == 9


# The measure


def test_images_without_classes_are_measured_by_views(unlabelled, tmp_path):
    """T8: nothing was measured, and nothing said so."""
    shown, out = screen(), tmp_path / "run"
    settings = {"held_out_share": 0.5, "evaluations": 2, "epochs": 2, "on_measure": "warn"}
    loop.train(config(unlabelled, out, eval_every_epochs=None, **settings), shown)
    lines = read_lines(out / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert {"view_certainty", "retrieval_1", "held_out_rankme_share", "held_out_loss"} <= lines[0].keys()
    assert all(-1 < line["view_certainty"] <= 1 for line in lines)
    words = "measured during the run: retrieval of held-out images by another view of them (24 images)"
    assert words in shown.export_text()
    best = max(lines, key=lambda line: (line["retrieval"], line["step"]))
    assert load_checkpoint(out / "checkpoint.best.safetensors")[2]["steps"] == best["step"]


def test_a_run_that_measures_nothing_says_why_and_releases_its_last_checkpoint(unlabelled, tmp_path):
    shown = screen()
    path = loop.train(config(unlabelled, tmp_path / "run", epochs=1), shown)
    assert path.name == "checkpoint.safetensors"
    assert "a measure without classes needs 20 held-out images (there are 4; held_out_share)" in shown.export_text()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("knn", "measure='knn' cannot be computed: the training images have one class"),
        ("views", "measure='views' needs 20 held-out images, and there are 4"),
    ],
)
def test_a_measure_that_the_images_do_not_allow_is_refused(unlabelled, tmp_path, wanted, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config(unlabelled, tmp_path / "run", measure=wanted), QUIET)


# Stops


def stopped_run(images, out, monkeypatch):
    measured_as([0.9, 0.1], monkeypatch)
    with pytest.raises(RunStopped, match=r"the noise of 1000000000 images. The run stops; its checkpoints are kept"):
        loop.train(config(images, out, eval_every_epochs=1), QUIET)


def test_a_stopped_run_is_not_repeated_but_resumes_with_other_checks(images, tmp_path, monkeypatch):
    """T3: the advice was refused, and the same command stopped at the same step."""
    out = tmp_path / "run"
    stopped_run(images, out, monkeypatch)
    assert "the k-NN accuracy" in json.loads((out / "stopped.json").read_text())["reason"]
    assert (out / "report.html").exists()  # T9: there was no report after a stop
    with pytest.raises(RunStopped, match=r"a check stopped this run, and would stop it again.*on_measure=warn"):
        loop.train(config(images, out, eval_every_epochs=1), QUIET)
    measured_as([0.1, 0.95, 0.2], monkeypatch)
    _, _, facts = load_checkpoint(loop.train(config(images, out, eval_every_epochs=1, on_measure="warn"), QUIET))
    assert facts["steps"] == 6
    assert not (out / "stopped.json").exists()


def test_a_damaged_note_of_a_stop_does_not_block_a_run(images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_run(images, out, monkeypatch)
    (out / "stopped.json").write_text("{")
    measured_as([0.9, 0.9, 0.9], monkeypatch)
    loop.train(config(images, out, eval_every_epochs=1), QUIET)


def test_the_stop_of_a_check_has_its_own_status(images, tmp_path, monkeypatch, capsys):
    measured_as([0.9, 0.1], monkeypatch)
    recipe = tmp_path / "tiny.toml"
    settings = {**TINY, "eval_every_epochs": 1}
    vit = ", ".join(f"{key} = {value}" for key, value in settings.pop("vit").items())
    recipe.write_text(f"vit = {{ {vit} }}\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    command = ["training", "--data", str(images), "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    for words in ("it lost more than 5 points", "a check stopped this run"):
        monkeypatch.setattr("sys.argv", command)
        assert main() == STOPPED_STATUS == 3
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_saves_the_run(images, tmp_path, monkeypatch, number, name, status):
    one_step, out = loop.train_step, tmp_path / "run"

    def signalled(*arguments):
        if arguments[4] == 4:
            os.kill(os.getpid(), number)
        return one_step(*arguments)

    monkeypatch.setattr(loop, "train_step", signalled)
    with pytest.raises(Interrupted, match=f"stopped by {name}; the state after step 5 of 9 is saved") as stopped:
        loop.train(config(images, out, save_every_minutes=1e6), QUIET)
    assert stopped.value.status == status
    assert find_state(out)[0].step == 5
    assert (out / "report.html").exists()
    monkeypatch.setattr(loop, "train_step", one_step)
    loop.train(config(images, out), QUIET)
    assert find_state(out)[0].step == 9


# Before the start


def test_a_dry_run_tells_what_a_run_needs_and_writes_nothing(images, tmp_path):
    shown, out = screen(), tmp_path / "run"
    loop.dry_run(config(images, out), shown)
    text = shown.export_text()
    for words in ("25 images; 9 steps of 8 images (3 epochs)", "estimated time", "estimated memory", "estimated disk"):
        assert re.search(rf"^\d\d:\d\d:\d\d  .*{re.escape(words)}", text, re.M)
    assert not out.exists()


def test_a_run_is_the_same_with_and_without_an_estimate(images, tmp_path):
    runs = [config(images, tmp_path / str(estimate), estimate=estimate, epochs=1) for estimate in (False, True)]
    plain, estimated = (load_checkpoint(loop.train(run, QUIET))[0] for run in runs)
    assert all(torch.equal(plain[name], estimated[name]) for name in plain)


def test_hours_choose_the_epochs_and_a_resumed_run_keeps_them(images, tmp_path):
    out = tmp_path / "run"
    settings = {**TINY, "data": images, "out": out, "hours": 1e-3, "measure": "none"}
    loop.train(TrainConfig.model_validate(settings), QUIET)
    chosen = find_state(out)[0]
    assert chosen.memory["chosen"]["epochs"] != TINY["epochs"]
    loop.train(TrainConfig.model_validate({**settings, "hours": 5e-3}), QUIET)  # the run is over: nothing changes
    assert find_state(out)[0].step == chosen.step


def test_too_little_time_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"hours=1e-09 is too short: a run of one step takes .*; give at least hours="):
        loop.dry_run(config(images, tmp_path / "run", hours=1e-9), QUIET)


# Continuing


CROPS = ["global_size=28", "local_size=14", "n_local=2", "cache_size=32", "precision=fp32", "log_every=5", "epochs=2"]


def continued(images, out, init, *more):
    overrides = [f"init={init}", *CROPS, "estimate=false", "head_hidden_dim=16", "head_bottleneck_dim=8", *more]
    return load_config("continue", images, out, overrides)


def test_continue_takes_the_network_of_its_start_and_settings_for_its_images(images, tmp_path):
    first = loop.train(config(images, tmp_path / "first", epochs=1), QUIET)
    made = continued(images, tmp_path / "run", first)
    assert (made.vit_config.embed_dim, made.vit_config.depth) == (16, 2)
    assert (made.eval_resize, made.eval_crop) == (28, 28)
    shown = screen()
    loop.train(made, shown)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["batch_size"], settings["n_prototypes"], settings["epochs"]) == (16, 256, 2.0)
    text = shown.export_text()
    assert "chosen for 25 images: batch_size=16" in text
    assert "warning: 25 images are too few to continue on (at least 50)" in text
    loop.train(made, QUIET)  # the same command finds the same settings


def test_a_finished_run_continues_with_its_heads(images, tmp_path):
    """T15: more epochs or more images continue a finished run."""
    first = tmp_path / "first"
    loop.train(config(images, first, epochs=1, n_prototypes=48), QUIET)
    made = continued(images, tmp_path / "run", first)
    assert (made.n_prototypes, made.freeze_backbone, made.freeze_last_layer) == (48, 0.0, 0.0)
    network = make_network(made).state_dict()
    state = torch.load(find_state(first)[0].path, weights_only=True)["ema"]
    heads = [name for name in state if not name.startswith("backbone.")]
    assert heads
    assert all(torch.equal(network[name], state[name]) for name in heads)
    kept, _, _ = load_checkpoint(first / "states" / "best.safetensors")
    assert all(torch.equal(network[f"backbone.{name}"], kept[name]) for name in kept)
    loop.train(made, QUIET)


def test_another_number_of_epochs_in_the_same_folder_says_how_to_continue(images, tmp_path):
    loop.train(config(images, tmp_path / "run", epochs=1), QUIET)
    with pytest.raises(ValueError, match=r"epochs: 1.0 -> 2.0.*choose another out folder and add init="):
        loop.train(config(images, tmp_path / "run", epochs=2), QUIET)


def data_of(n_train, n_held_out, classes=True, divided=False):
    """What `choose_measure` asks of the images of a run."""
    labelled = (n_train, n_held_out) if classes else (0, 0)
    return SimpleNamespace(
        held_out=range(n_held_out),
        labelled_train_sample=range(labelled[0]),
        labelled_held_out=range(labelled[1]),
        has_classes=classes and n_held_out > 0,
        why_no_classes=None if classes else "the training images have no classes",
        divided=divided,
    )


@pytest.mark.parametrize(
    ("data", "continues", "measure", "n_images"),
    [
        (data_of(9_000, 1_000), True, KNN, 1_000),
        (data_of(2_700, 300), True, VIEWS, 300),
        (data_of(2_700, 300), False, OWN, 3_000),
        (data_of(2_640, 296, divided=True), True, KNN, 296),
        (data_of(270, 30, divided=True), True, VIEWS, 30),
        (data_of(90, 10), True, OWN, 100),
        (data_of(90_000, 10_000, classes=False), True, VIEWS, 1_000),
        (data_of(540, 60, classes=False), False, RETRIEVAL, 60),
        (data_of(90, 10, classes=False), True, None, 0),
    ],
)
def test_the_measure_suits_the_images_and_the_start(data, continues, measure, n_images):
    choice = choose_measure("auto", data, continues=continues)
    assert (choice.measure, choice.n_images) == (measure, n_images)


def test_the_stop_is_refused_again_although_the_plan_chose_fewer_evaluations(images, tmp_path, monkeypatch):
    """Only the settings that the user and the recipe gave are compared."""
    out = tmp_path / "run"
    settings = {**TINY, "data": images, "out": out, "estimate": True, "eval_every_epochs": None}
    monkeypatch.setattr(planning, "EVALUATION_SHARE", 1e-9)
    measured_as([0.9, 0.1], monkeypatch)
    with pytest.raises(RunStopped, match="it lost more than 5 points"):
        loop.train(TrainConfig.model_validate(settings), QUIET)
    with pytest.raises(RunStopped, match="would stop it again"):
        loop.train(TrainConfig.model_validate(settings), QUIET)


def test_a_refused_resume_leaves_the_note_of_the_stop(images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_run(images, out, monkeypatch)
    with pytest.raises(ValueError, match="from a run with other settings"):
        loop.train(config(images, out, eval_every_epochs=1, on_measure="warn", lr=1e-3), QUIET)
    assert (out / "stopped.json").exists()


def test_after_a_rollback_the_best_checkpoint_is_one_of_the_repeated_steps(images, tmp_path, monkeypatch):
    """The best checkpoint of the steps that are undone is not released."""
    out = tmp_path / "run"
    verdicts = iter([Verdict("collapse", "rollback", 5, 3, "it collapsed")])
    one_line = loop.log_line

    def collapsing(run, step, *arguments):
        verdict = one_line(run, step, *arguments)
        return next(verdicts, verdict) if step == 5 else verdict

    monkeypatch.setattr(loop, "log_line", collapsing)
    measured_as([0.1, 0.2, 0.3, 0.4, 0.9, 0.35, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], monkeypatch)
    epochs = 1 / 3  # an evaluation after each step
    settings = {"eval_every_epochs": epochs, "on_measure": "warn", "save_every_minutes": 1e-9, "keep_states": 9}
    _, _, facts = load_checkpoint(loop.train(config(images, out, **settings), QUIET))
    assert (facts["steps"], facts["measure"]) == (3, {"own_knn": 0.35})


def test_a_dry_run_looks_at_the_place_of_the_run(images, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"out=.*file/run cannot be written: .*file is not a folder"):
        loop.dry_run(config(images, file / "run"), QUIET)


def test_a_finished_run_says_so_and_how_to_train_more(images, tmp_path):
    out, shown = tmp_path / "run", screen()
    loop.train(config(images, out, epochs=1), QUIET)
    settings = (out / "config.json").read_bytes()
    loop.train(config(images, out, epochs=1, workers=2), shown)
    assert "this run is finished (3 steps), and nothing is trained now. To train more" in shown.export_text()
    assert (out / "config.json").read_bytes() == settings


def test_an_evaluation_at_another_size_than_that_of_the_start_is_told(images, tmp_path):
    first = loop.train(config(images, tmp_path / "first", epochs=1), QUIET)
    shown = screen()
    loop.train(config(images, tmp_path / "run", epochs=1, init=first, eval_resize=42, eval_crop=42), shown)
    assert "init was made for images of 28 pixels (short side 28), but this run measures with eval_crop=42" in (
        shown.export_text()
    )


def test_the_end_compares_the_released_checkpoint_with_the_start(images, tmp_path, monkeypatch):
    measured_as([0.5, 0.7, 0.9, 0.6], monkeypatch)
    shown = screen()
    loop.train(config(images, tmp_path / "run", eval_every_epochs=1, on_measure="warn"), shown)
    text = shown.export_text()
    assert "1-NN on 2 held-out images: 50.0% at the start, 90.0% released (+40.0 points; standard error" in text
    assert "released: the checkpoint after step 6, which has the best value" in text
