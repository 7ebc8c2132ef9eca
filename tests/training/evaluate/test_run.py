"""From a model's name and a folder to a report, for every task, and through the command line."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from cli import evaluate as cli_eval
from model.artifact import bundled_artifact, read_manifest
from model.checkpoint import save_checkpoint
from model.config import ViTConfig
from model.vit import DinoVisionTransformer
from training.evaluate import depth, segmentation, tasks
from training.evaluate.backbone import load_backbone, spec_for
from training.evaluate.dense import HeadTraining
from training.evaluate.features import compute_features
from training.evaluate.knn import evaluate_knn
from training.evaluate.linear import CODE_LRS, PAPER_LRS, ProbeSettings
from training.evaluate.logistic import FitSettings
from training.evaluate.run import evaluate, print_report, write_json
from training.evaluate.settings import make_settings

TINY = ViTConfig(embed_dim=16, depth=4, num_heads=2, img_size=28, pos_embed_rule="antialias")
PREPROCESS = {"resize": 28, "crop": 28}

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("eval")(cli_eval.evaluate)
app.command("other")(lambda: None)  # with one command typer would take "eval" for an argument
runner = CliRunner()


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, DinoVisionTransformer(TINY).state_dict(), TINY, {"preprocess": PREPROCESS})
    return path


@pytest.fixture
def colours(tmp_path):
    """Three classes that even a random network tells apart, and one broken photo."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for channel, name in enumerate(("red", "green", "blue")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n):
                photo = rng.integers(0, 60, (30 + i, 40, 3), dtype=np.uint8)
                photo[:, :, channel] += 180
                Image.fromarray(photo).save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data" / "train" / "red" / "broken.jpg").write_bytes(b"no photo")
    return tmp_path / "data"


def dense_folder(folder):
    for split in ("train", "val"):
        for kind in ("images", "masks", "depth"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(2):
            left = np.broadcast_to(np.arange(40) < 20 + 5 * i, (30, 40))
            Image.fromarray(np.where(left[..., None], 230, 20).repeat(3, 2).astype(np.uint8)).save(
                folder / "images" / split / f"{i}.png"
            )
            Image.fromarray(left.astype(np.uint8)).save(folder / "masks" / split / f"{i}.png")
            Image.fromarray(np.where(left, 2000, 5000).astype(np.uint16)).save(folder / "depth" / split / f"{i}.png")
    return folder


def test_backbones_by_name(checkpoint, tmp_path):
    own = load_backbone(str(checkpoint))
    assert (own.spec.resize, own.spec.crop, own.model.training) == (28, 28, False)
    bundled, auto = load_backbone(str(bundled_artifact())), load_backbone("auto", data_dir=tmp_path)
    named = load_backbone(read_manifest(bundled_artifact()).name, data_dir=tmp_path)
    assert bundled.fingerprint == auto.fingerprint == named.fingerprint == read_manifest(bundled_artifact()).fingerprint
    assert bundled.spec == read_manifest(bundled_artifact()).preprocess
    with pytest.raises(ValueError, match="no_such_model"):
        load_backbone("no_such_model")
    assert load_backbone(str(tmp_path)).fingerprint == own.fingerprint  # the folder of a run
    with pytest.raises(ValueError, match="not an artifact"):
        load_backbone(str(bundled_artifact().parent))
    foreign = tmp_path / "foreign.pth"
    torch.save({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="add --arch"):
        load_backbone(str(foreign))
    with pytest.raises(ValueError, match="not the weights of a DINOv2 backbone"):
        load_backbone(str(foreign), arch="dinov2_vits14")


def test_auto_is_the_newest_artifact_of_the_data_folder(tmp_path):
    bundled = bundled_artifact()
    for name, created in (("older", "2030-01-01T00:00:00+00:00"), ("newer", "2030-01-02T00:00:00+00:00")):
        folder = shutil.copytree(bundled, tmp_path / "artifacts" / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"name": name, "created": created}))
    assert load_backbone("auto", data_dir=tmp_path).name.startswith("newer-")


def test_settings_that_do_not_apply_are_refused():
    with pytest.raises(ValueError, match="lr is not a setting of knn; it has resize, crop"):
        make_settings("knn", {"lr": 1})
    with pytest.raises(ValueError, match="iterations=0"):
        make_settings("linear", {"iterations": 0})
    with pytest.raises(ValueError, match="use the whole image"):
        make_settings("depth", {"crop": 224})
    with pytest.raises(ValueError, match="must be at least 1"):
        make_settings("knn", {"k": [0]})
    with pytest.raises(ValueError, match="unknown task 'cluster': choose one of knn, logistic"):
        make_settings("cluster", {})


def test_more_blocks_than_the_model_has_are_named_with_the_option(checkpoint, colours):
    with pytest.raises(ValueError, match=r"linear uses the last 5 blocks, but the model has 4: set blocks=N"):
        evaluate("linear", load_backbone(str(checkpoint)), colours, {"blocks": (1, 5)})
    with pytest.raises(ValueError, match="segmentation uses the last 5 blocks"):
        evaluate("segmentation", load_backbone(str(checkpoint)), colours, {"blocks": 5})


def test_sizes(checkpoint):
    own = load_backbone(str(checkpoint)).spec
    assert spec_for(own, make_settings("knn", {})) == own
    assert spec_for(own, make_settings("knn", {"crop": 0, "resize": 42})).model_dump()["crop"] is None
    assert spec_for(own, make_settings("segmentation", {"resize": 42})).resize == 42
    padded = spec_for(own, make_settings("knn", {"fit": "pad"}))
    assert (padded.fit, padded.crop, padded.resize) == ("pad", own.crop, None)
    whole = spec_for(padded, make_settings("segmentation", {}))
    assert (whole.fit, whole.crop, whole.resize) == ("crop", None, own.crop)
    with pytest.raises(ValueError, match="fit=pad: segmentation and depth use the whole image"):
        make_settings("segmentation", {"fit": "pad"})
    with pytest.raises(ValueError, match="must be a multiple"):
        spec_for(own, make_settings("knn", {"crop": 20}))


def test_knn_is_what_the_loop_reports(checkpoint, colours):
    backbone = load_backbone(str(checkpoint))
    report = evaluate("knn", backbone, colours, {"k": (1, 5), "pooling": "mean"})
    assert [Path(s.name).name for s in report.skipped] == ["broken.jpg"]
    (colours / "train" / "red" / "broken.jpg").unlink()
    train, val = (sorted((colours / split).rglob("*.png")) for split in ("train", "val"))
    expected = evaluate_knn(backbone.model, train, val, backbone.spec, ks=(1, 5))["mean"]
    assert report.figures["accuracy"] == {"1": expected[1], "5": expected[5]}
    assert report.protocol["train_photos"] == 18
    assert report.protocol["preprocess"]["crop"] == 28
    alone = evaluate("knn", backbone, colours / "train", {"k": (1,)})
    assert alone.protocol["split"] == "leave-one-out"


@pytest.mark.parametrize(
    ("task", "given"),
    [("logistic", {}), ("linear", {"iterations": 20, "batch_size": 8}), ("retrieval", {"pooling": "mean"})],
)
def test_tasks_on_class_folders(checkpoint, colours, task, given, tmp_path):
    told = {}

    def track(what, total):
        told[what] = [total, 0]

        def advance(count):
            told[what][1] += count

        return advance

    report = evaluate(task, load_backbone(str(checkpoint)), colours, given, cache=tmp_path / "cache", track=track)
    assert all(total == done for total, done in told.values())
    again = evaluate(task, load_backbone(str(checkpoint)), colours, given, cache=tmp_path / "cache")
    assert report == again
    assert len(report.skipped) == 1
    if task == "linear":
        assert len(report.figures["heads"]) == 52
        assert len(report.rows) == 4
        assert sum(row[-1].endswith("*") for row in report.rows) == 1
    write_json(report, tmp_path / "out" / "report.json")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["protocol"]["seed"] == 0


class CalledError(Exception):
    """What an evaluation was called with."""

    def __init__(self, args, more):
        super().__init__()
        self.given, self.more = args, more


def called_with(monkeypatch, module, name, *asked):
    """The arguments with which `evaluate(*asked)` calls `module.name`."""

    def call(*args, **more):
        more.pop("advance", None)
        raise CalledError(args, more)

    monkeypatch.setattr(module, name, call)
    with pytest.raises(CalledError) as caught:
        evaluate(*asked)
    return caught.value.given, caught.value.more


def test_the_settings_of_knn_reach_it(checkpoint, colours, monkeypatch):
    backbone = load_backbone(str(checkpoint))
    given = {"k": (2, 3), "pooling": "cls+mean"}
    (train, _, val, _, ks), more = called_with(monkeypatch, tasks, "knn_accuracy", "knn", backbone, colours, given)
    assert (train.shape, val.shape, ks, more) == ((18, 32), (9, 32), (2, 3), {})
    alone, more = called_with(monkeypatch, tasks, "knn_accuracy", "knn", backbone, colours / "val", {"k": (1,)})
    assert more == {"leave_one_out": True}
    assert alone[0] is alone[2]
    assert alone[1] is alone[3]


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_the_settings_of_logistic_regression_reach_it(checkpoint, colours, monkeypatch, pooling):
    backbone = load_backbone(str(checkpoint))
    given = {"held_out": 0.3, "seed": 5, "tolerance": 1e-3, "iterations": 7, "pooling": pooling}
    args, more = called_with(monkeypatch, tasks, "evaluate_logistic", "logistic", backbone, colours, given)
    assert more == {"fit": FitSettings(held_out_share=0.3, seed=5, tolerance=1e-3, max_iterations=7)}
    paths = sorted((colours / "val").rglob("*.png"))
    torch.testing.assert_close(args[2], compute_features(backbone.model, paths, backbone.spec).pooled(pooling))
    assert args[0].shape == (18, args[2].shape[1])


@pytest.mark.parametrize(("grid", "lrs"), [("code", CODE_LRS), ("paper", PAPER_LRS)])
def test_the_settings_of_the_linear_probe_reach_it(checkpoint, colours, monkeypatch, grid, lrs):
    given = {"grid": grid, "blocks": (1, 3), "iterations": 6, "batch_size": 4, "seed": 5}
    backbone = load_backbone(str(checkpoint))
    args, more = called_with(monkeypatch, tasks, "evaluate_linear", "linear", backbone, colours, given)
    settings = ProbeSettings(lrs=lrs, blocks=(1, 3), avgpools=(False, True), iterations=6, batch_size=4, seed=5)
    assert more == {"depth": 3, "settings": settings}
    assert [part.shape for part in (args[0], args[2])] == [(18, 64), (9, 64)]


@pytest.mark.parametrize("task", ["logistic", "linear"])
def test_without_a_split_the_seed_draws_the_share_to_score(checkpoint, colours, monkeypatch, task):
    backbone, name = load_backbone(str(checkpoint)), f"evaluate_{task}"
    labels = {}
    for seed, share in ((1, 0.25), (1, 0.5), (2, 0.5)):
        given = {"seed": seed, "held_out": share}
        args, _ = called_with(monkeypatch, tasks, name, task, backbone, colours / "train", given)
        labels[seed, share] = args[3].tolist()
        assert len(args[3]) in (int(19 * share), int(19 * share) - 1)  # one of all images is broken
    assert labels[1, 0.5] != labels[2, 0.5]


DENSE = {"iterations": 3, "batch_size": 5, "lr": 0.07, "weight_decay": 0.02, "seed": 9, "resize": 42, "blocks": 2}
DENSE_TRAINING = HeadTraining(3, 5, 0.07, 0.02, 9)


def test_the_settings_of_segmentation_reach_it(checkpoint, tmp_path, monkeypatch):
    asked = "segmentation", load_backbone(str(checkpoint)), dense_folder(tmp_path / "scenes")
    given = {**DENSE, "classes": 4, "zero_is_ignored": True}
    (train, val, training), more = called_with(monkeypatch, segmentation, "evaluate_segmentation", *asked, given)
    assert (training, more) == (DENSE_TRAINING, {"n_classes": 4})
    assert train[0][0].shape == (3, 4, 32)  # two blocks of 16, no class token
    assert set(train[0][1].flatten().tolist()) == set(val[0][1].flatten().tolist()) == {0, 255}
    (train, _, training), more = called_with(monkeypatch, segmentation, "evaluate_segmentation", *asked, {})
    assert (training, more) == (HeadTraining(4000, 16, 1e-3, 1e-3, 0), {"n_classes": None})
    assert set(train[0][1].flatten().tolist()) == {0, 1}


def test_the_settings_of_depth_reach_it(checkpoint, tmp_path, monkeypatch):
    asked = "depth", load_backbone(str(checkpoint)), dense_folder(tmp_path / "scenes")
    ranges = {"min_depth": 0.5, "max_depth": 6.0, "gradient_weight": 0.25}
    given = {**DENSE, **ranges, "bins": 12, "units_per_metre": 500.0}
    (train, _, training), more = called_with(monkeypatch, depth, "evaluate_depth", *asked, given)
    assert (training, more) == (DENSE_TRAINING, {**ranges, "n_bins": 12})
    assert train[0][0].shape == (3, 4, 64)  # two blocks of 16, each with its class token
    assert set(train[0][1].flatten().tolist()) == {4.0, 10.0}
    (_, _, training), more = called_with(monkeypatch, depth, "evaluate_depth", *asked, {})
    assert training == HeadTraining(4000, 16, 3e-4, 1e-3, 0)
    assert more == {"min_depth": 1e-3, "max_depth": 10.0, "gradient_weight": 0.5, "n_bins": 256}


def test_train_and_val_share_the_memory_of_dense_tasks(checkpoint, tmp_path, monkeypatch):
    backbone, folder = load_backbone(str(checkpoint)), dense_folder(tmp_path / "scenes")
    one = 3 * 4 * 16 * 4 + 42 * 56  # tokens in float32 and the mask at 42 x 56 pixels
    given = {"resize": 42, "memory_gb": 3.5 * one / 1e9}
    (train, val, _), _ = called_with(
        monkeypatch, segmentation, "evaluate_segmentation", "segmentation", backbone, folder, given
    )
    assert train.memory_left == pytest.approx(1.5 * one, abs=1)
    assert val.memory_left == pytest.approx(0.5 * one, abs=1)


@pytest.mark.parametrize("task", ["knn", "segmentation"])
def test_the_precision_reaches_the_backbone(checkpoint, colours, tmp_path, monkeypatch, task):
    backbone, found = load_backbone(str(checkpoint)), []
    module, name = (tasks, "knn_accuracy") if task == "knn" else (segmentation, "evaluate_segmentation")
    folder = colours if task == "knn" else dense_folder(tmp_path / "scenes")
    for precision in ("fp32", "bf16"):
        args, _ = called_with(monkeypatch, module, name, task, backbone, folder, {"precision": precision})
        found.append(args[0] if task == "knn" else args[0][0][0])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, atol=0.1, rtol=0.1)


def test_a_query_is_searched_with_its_box_and_nothing_may_be_missing(checkpoint, colours, tmp_path, monkeypatch):
    names = [str(p.relative_to(colours)) for p in sorted((colours / "train").rglob("*.png"))]
    truth = tmp_path / "truth.json"
    backbone, vectors = load_backbone(str(checkpoint)), []
    for box in ({}, {"box": [0, 0, 20, 20]}):
        query = {"image": "val/red/0.png", "easy": names[:2], **box}
        truth.write_text(json.dumps({"queries": [query], "database": names}))
        given = {"ground_truth": truth, "k": (1, 2), "pooling": "mean"}
        args, more = called_with(monkeypatch, tasks, "score_setup", "retrieval", backbone, colours, given)
        assert more == {"ks": (1, 2)}
        vectors.append(args[2])
    assert not torch.allclose(*vectors, atol=1e-4)
    truth.write_text(json.dumps({"queries": [query], "database": [*names, "train/red/broken.jpg"]}))
    with pytest.raises(ValueError, match=r"1 images of the ground truth cannot be read, e\.g\. .*broken\.jpg"):
        evaluate("retrieval", backbone, colours, {"ground_truth": truth})


def test_as_many_blocks_as_the_model_has_are_not_too_many(checkpoint, colours, monkeypatch):
    backbone = load_backbone(str(checkpoint))
    args, _ = called_with(monkeypatch, tasks, "evaluate_linear", "linear", backbone, colours, {"blocks": (4,)})
    assert args[0].shape == (18, 5 * 16)


def test_retrieval_with_a_ground_truth(checkpoint, colours, tmp_path):
    names = [str(p.relative_to(colours)) for p in sorted((colours / "train").rglob("*.png"))]
    query = {"image": "val/red/0.png", "box": [2, 2, 20, 20], "junk": [names[0]]}
    query["easy"] = [n for n in names if "red" in n][:3]
    query["hard"] = [n for n in names if "red" in n][3:]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"queries": [query], "database": names}))
    backbone = load_backbone(str(checkpoint))
    report = evaluate("retrieval", backbone, colours, {"ground_truth": truth, "pooling": "mean"})
    assert {row[0]: row[2] for row in report.rows} == {"easy": "100.0 %", "medium": "100.0 %", "hard": "100.0 %"}
    query["image"] = "val/red/missing.png"
    truth.write_text(json.dumps({"queries": [query, query], "database": names}))
    with pytest.raises(ValueError, match=r"missing\.png"):
        evaluate("retrieval", backbone, colours, {"ground_truth": truth})


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_dense_tasks(checkpoint, tmp_path, task):
    folder = dense_folder(tmp_path / "scenes")
    report = evaluate(task, load_backbone(str(checkpoint)), folder, {"iterations": 3, "blocks": 4, "resize": 42})
    assert len(report.rows) == 1
    assert report.protocol["preprocess"]["crop"] is None
    assert report.protocol["val_photos"] == 2
    json.dumps(report.as_json(), allow_nan=False)


def test_mistakes_in_the_data(checkpoint, tmp_path):
    backbone = load_backbone(str(checkpoint))
    with pytest.raises(ValueError, match="does not exist"):
        evaluate("knn", backbone, tmp_path / "nowhere")
    folder = tmp_path / "one"
    (folder / "class").mkdir(parents=True)
    for i in range(20):
        Image.fromarray(np.full((30, 30, 3), i, np.uint8)).save(folder / "class" / f"{i}.png")
    for task in ("knn", "logistic"):
        with pytest.raises(ValueError, match="have 1 class"):
            evaluate(task, backbone, folder)


def test_the_command(checkpoint, colours, tmp_path):
    arguments = ["eval", str(checkpoint), "--task", "knn", "--data", str(colours), "k=[1, 3]"]
    out = tmp_path / "knn.json"
    result = runner.invoke(app, [*arguments, "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "skipped" in result.stdout
    assert "protocol: short side 28, crop 28" in result.stdout
    assert list(json.loads(out.read_text())["figures"]["accuracy"]) == ["1", "3"]
    refused = runner.invoke(app, [*arguments, "max_depth=3"])
    assert refused.exit_code == 2
    assert "error: max_depth is not a setting of knn" in refused.stderr
    refused = runner.invoke(app, [*arguments, "resize"])
    assert refused.exit_code == 2
    assert "error: override 'resize' must look like key=value" in refused.stderr


def test_a_single_number_stands_for_a_list():
    assert make_settings("knn", {"k": 20}).k == (20,)
    assert make_settings("linear", {"blocks": 1}).blocks == (1,)
    with pytest.raises(ValueError, match="blocks"):
        make_settings("segmentation", {"blocks": [1, 4]})


def test_every_option_has_help():
    command = typer.main.get_command(app).commands["eval"]
    assert command.help
    assert all(parameter.help for parameter in command.params)


def test_a_long_list_of_skipped_files_is_cut(checkpoint, colours):
    for i in range(25):
        (colours / "train" / "blue" / f"x{i}.jpg").write_bytes(b"")
    report = evaluate("knn", load_backbone(str(checkpoint)), colours)
    console = Console(record=True, width=200, file=io.StringIO())
    print_report(report, console)
    assert "and 6 more" in console.export_text()
