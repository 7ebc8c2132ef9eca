"""From a model's name and a folder to a report, for every task, and through the command line."""

import io
import json
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
from training.evaluate.backbone import load_backbone, spec_for
from training.evaluate.knn import evaluate_knn
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
    with pytest.raises(ValueError, match="not an artifact"):
        load_backbone(str(tmp_path))
    foreign = tmp_path / "foreign.pth"
    torch.save({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="add --arch"):
        load_backbone(str(foreign))
    with pytest.raises(ValueError, match="not the weights of a DINOv2 backbone"):
        load_backbone(str(foreign), arch="dinov2_vits14")


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
