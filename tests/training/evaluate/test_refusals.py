"""Evaluations that must end with an error, or leave something out and say so, from the data to the command."""

import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from cli import evaluate as cli_eval
from model.checkpoint import save_checkpoint
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.dataset import photos_of
from training.data.sources import open_source
from training.evaluate import depth, run, segmentation
from training.evaluate.backbone import Backbone
from training.evaluate.dense import HeadTraining, train_head
from training.evaluate.features import FeatureCache, cached_features, compute_features
from training.evaluate.knn import evaluate_knn
from training.evaluate.meaning import NoMeaning
from training.evaluate.robustness import robustness
from training.evaluate.run import evaluate
from training.evaluate.settings import SETTINGS

TINY = ViTConfig(embed_dim=16, depth=2, num_heads=2, img_size=28, pos_embed_rule="antialias")
SPEC = PreprocessSpec(resize=28, crop=28)
COLOURS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}
QUICK = {"linear": {"blocks": 1, "iterations": 5, "batch_size": 8}, "logistic": {"held_out": 0.3}, "knn": {"k": 1}}
BROKEN = "blocks.1.norm1.weight"

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("eval")(cli_eval.evaluate)
app.command("other")(lambda: None)  # with one command typer would take "eval" for an argument


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DinoVisionTransformer(TINY).eval()


@pytest.fixture
def backbone(model):
    return Backbone("tiny", model, SPEC, "0" * 64)


@pytest.fixture
def broken(model):
    """The same network with one weight that is NaN."""
    copy = DinoVisionTransformer(TINY).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.get_parameter(BROKEN)[3] = torch.nan
    return Backbone("broken", copy, SPEC, "1" * 64)


def save_images(folder, label, n, seed=0):
    rng = np.random.default_rng((seed, len(label)))
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise = rng.integers(-20, 20, (30, 40, 3))
        pixels = np.clip(np.array(COLOURS.get(label, (128, 128, 128))) + noise, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture
def colours(tmp_path):
    for label in COLOURS:
        save_images(tmp_path / "data" / "train", label, 6)
        save_images(tmp_path / "data" / "val", label, 2, seed=1)
    return tmp_path / "data"


def scenes(folder, mask_of=lambda left: left, metres_of=lambda left: np.where(left, 2000, 5000), val=None):
    """Save scenes with a bright left part. `mask_of` and `metres_of` make the maps, and `val` those of val."""
    for split in ("train", "val"):
        of_mask, of_depth = (val or (mask_of, metres_of)) if split == "val" else (mask_of, metres_of)
        for kind in ("images", "masks", "depth"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(2):
            left = np.broadcast_to(np.arange(40) < 20 + 5 * i, (30, 40))
            pixels = np.where(left[..., None], 230, 20).repeat(3, 2).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            Image.fromarray(np.asarray(of_mask(left)).astype(np.uint8)).save(folder / "masks" / split / f"{i}.png")
            Image.fromarray(np.asarray(of_depth(left)).astype(np.uint16)).save(folder / "depth" / split / f"{i}.png")
    return folder


def tar_of(folder, path, without_label=0):
    """Pack class folders into a tar, with a few images that are in no folder and so have no label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for image in sorted(folder.rglob("*.png")):
            file.add(image, str(image.relative_to(folder)))
        for i in range(without_label):
            file.add(sorted(folder.rglob("*.png"))[i], f"lost{i}.png")
    return path


# NaN


@pytest.mark.parametrize("task", SETTINGS)
def test_nan_weights_end_every_task_with_the_image_and_the_tensor(broken, colours, tmp_path, task):
    dense = task in ("segmentation", "depth")
    folder = scenes(tmp_path / "scenes") if dense else colours
    with pytest.raises(ValueError, match=rf"the features of .*0\.png are NaN.*{BROKEN} contains 1 of 16 values"):
        evaluate(task, broken, folder, {"iterations": 2} if dense else QUICK.get(task))


def test_the_command_ends_with_status_2_and_names_the_tensor(broken, colours, tmp_path):
    path, out = tmp_path / "broken.safetensors", tmp_path / "report.json"
    save_checkpoint(path, broken.model.state_dict(), TINY, {"preprocess": {"resize": 28, "crop": 28}})
    result = invoke(path, "--task", "knn", "--data", colours, "--out", out)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert BROKEN in result.stderr
    assert not out.exists()


def test_features_that_are_not_finite_are_neither_returned_nor_stored(model, broken, colours, tmp_path):
    paths = sorted(colours.rglob("*.png"))
    cache = FeatureCache(tmp_path / "cache", "digest")
    for compute in (compute_features, lambda *args: cached_features(cache, *args)):
        with pytest.raises(ValueError, match=r"the features of .*blue/0\.png are NaN"):
            compute(broken.model, paths, SPEC)
    with pytest.raises(ValueError, match=r"the features of .*blue/0\.png are NaN"):
        robustness(broken.model, paths, SPEC)
    assert not (tmp_path / "cache").exists()
    cached_features(cache, model, paths, SPEC)
    [file] = (tmp_path / "cache").iterdir()
    stored = file.read_bytes()
    file.write_bytes(stored[:-8] + np.array([np.nan, np.nan], np.float32).tobytes())  # by an earlier version
    computed = cached_features(cache, model, paths, SPEC)
    assert torch.isfinite(computed.cls).all()
    assert torch.isfinite(computed.patch_parts["mean"]).all()
    assert file.read_bytes() == stored


def test_features_that_overflow_although_the_weights_are_finite_name_the_image(model, colours):
    large = DinoVisionTransformer(TINY).eval()
    large.load_state_dict(model.state_dict())
    with torch.no_grad():
        large.norm.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"the features of .*0\.png are NaN or infinite, although the weights are fin"):
        compute_features(large, sorted(colours.rglob("*.png")), SPEC)


def test_a_head_with_weights_that_are_not_finite_is_an_error_although_its_last_loss_is_finite():
    """The last step itself may make the weights infinite."""
    head = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(FloatingPointError, match="the head's weight contains 1 of 1 values that are NaN or infinite"):
        train_head(
            head,
            [(torch.ones(1), torch.ones(1))],
            lambda tokens, targets: head(tokens[0]).sum(),
            HeadTraining(iterations=1, batch_size=1, lr=math.inf, weight_decay=0.0, seed=0),
        )


def test_a_figure_that_is_not_finite_is_named(backbone, colours, monkeypatch):
    monkeypatch.setattr("training.evaluate.tasks.knn_accuracy", lambda *_: {1: math.nan})
    with pytest.raises(FloatingPointError, match=r"knn\.accuracy\.1 is nan"):
        evaluate("knn", backbone, colours, {"k": 1})
    run._check_figures({"iou": [0.5, None], "rmse": 1.0}, "depth")
    with pytest.raises(FloatingPointError, match=r"depth\.heads\.1\.rmse is nan"):
        run._check_figures({"heads": [{"rmse": 1.0}, {"rmse": math.nan}]}, "depth")


# Classes


@pytest.mark.parametrize("task", ["knn", "logistic", "linear"])
def test_classifications_without_a_meaning(backbone, colours, tmp_path, task, monkeypatch):
    monkeypatch.setattr("training.evaluate.task_data.cached_features", lambda *_, **__: pytest.fail("computed"))
    one = tmp_path / "one"
    shutil.copytree(colours / "train" / "red", one / "train" / "red")
    shutil.copytree(colours / "val" / "red", one / "val" / "red")
    with pytest.raises(NoMeaning, match="the 6 images of train have 1 class, but a classification needs at least 2"):
        evaluate(task, backbone, one, QUICK[task])
    other = tmp_path / "other"
    shutil.copytree(colours / "train", other / "train")
    save_images(other / "val", "grey", 3)
    with pytest.raises(NoMeaning, match=r"no class of the 3 images of val is among the 3 classes of train.* 0.0 %"):
        evaluate(task, backbone, other, QUICK[task])
    if task == "knn":
        with pytest.raises(NoMeaning, match="the 6 images of the data have 1 class"):
            evaluate(task, backbone, one / "train")
        for label in COLOURS:
            save_images(tmp_path / "alone", label, 1)
        with pytest.raises(NoMeaning, match="each of the 3 images is alone in its class: every model would score 0"):
            evaluate(task, backbone, tmp_path / "alone")
    else:
        with pytest.raises(ValueError, match=r"18 images are too few to hold out a share of 0\.01"):
            evaluate(task, backbone, colours / "train", {**QUICK[task], "held_out": 0.01})


def test_a_class_that_vanishes_with_its_broken_images_is_noticed(backbone, colours):
    for label in ("green", "blue"):
        for path in (colours / "train" / label).iterdir():
            path.write_bytes(b"broken")
    with pytest.raises(NoMeaning, match="the 6 images of train have 1 class"):
        evaluate("knn", backbone, colours, {"k": 1})


def test_k_above_the_number_of_neighbours_is_left_out_with_a_note(backbone, colours):
    note = "k-NN for k=20 and 100 is left out: an image has only 18 neighbours"
    report = evaluate("knn", backbone, colours, {"k": [1, 18, 20, 100]})
    assert list(report.figures["accuracy"]) == ["1", "18"]
    assert [row[0] for row in report.rows] == ["1", "18"]
    assert report.notes == report.as_json()["notes"] == [note]
    alone = evaluate("knn", backbone, colours / "train", {"k": [17, 18]})
    assert list(alone.figures["accuracy"]) == ["17"]
    assert alone.notes == ["k-NN for k=18 is left out: an image has only 17 neighbours"]
    with pytest.raises(NoMeaning, match="k-NN for k=50 is left out: an image has only 18 neighbours, and no other k"):
        evaluate("knn", backbone, colours, {"k": 50})


@pytest.mark.parametrize("task", ["knn", "logistic", "linear"])
def test_a_val_part_with_fewer_images_than_classes_has_a_note(backbone, colours, task):
    shutil.rmtree(colours / "val" / "red")
    (colours / "val" / "blue" / "1.png").unlink()
    (colours / "val" / "green" / "1.png").unlink()
    report = evaluate(task, backbone, colours, QUICK[task])
    assert report.notes[0].startswith("val has 2 images for 3 classes: at least 1 classes are not tested")
    assert report.protocol["val_photos"] == 2


def test_retrieval_of_one_class_is_refused_and_a_recall_of_100_percent_left_out(backbone, colours, monkeypatch):
    report = evaluate("retrieval", backbone, colours / "train", {"k": [1, 12, 13]})
    assert report.columns == ("relevant", "queries", "mAP", "recall@1", "recall@12")
    assert list(report.figures["same folder"]["recall"]) == ["1", "12"]
    assert report.notes == [
        "same folder: recall@k for k=13 is left out: a query ranks at most 12 images that are not relevant, so every "
        "model would score 100 %"
    ]
    monkeypatch.setattr("training.evaluate.task_data.cached_features", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(NoMeaning, match="the 6 images have 1 class: every model would score 100 %"):
        evaluate("retrieval", backbone, colours / "train" / "red")


def test_setups_of_a_ground_truth_without_a_meaning_are_left_out(backbone, colours, tmp_path):
    names = [f"train/red/{i}.png" for i in range(3)]
    truth = tmp_path / "truth.json"
    query = {"image": "val/red/0.png", "easy": names[:1], "junk": names[1:2]}
    truth.write_text(json.dumps({"queries": [query], "database": names}))
    report = evaluate("retrieval", backbone, colours, {"ground_truth": str(truth), "k": [1, 5]})
    assert [row[0] for row in report.rows] == ["easy", "medium"]
    assert report.notes[0] == "hard is left out: no query has a relevant image in the database"
    truth.write_text(json.dumps({"queries": [{**query, "easy": names, "junk": []}], "database": names}))
    with pytest.raises(NoMeaning, match="easy is left out: each of the 1 queries ranks only relevant images"):
        evaluate("retrieval", backbone, colours, {"ground_truth": str(truth)})


# Masks and depths

ALL = (lambda left: left, lambda left: np.where(left, 2000, 5000))
MASKS = {
    "the masks of train have 1 class (1)": {"mask_of": np.ones_like},
    "the masks of val have only ignored pixels (255)": {"val": (lambda left: np.full(left.shape, 255), ALL[1])},
    "the masks of train have only ignored pixels (255)": {
        "mask_of": lambda left: np.full(left.shape, 255),
        "val": ALL,
    },
    "none of the 1 classes in the masks of val is among the 2 classes": {
        "val": (lambda left: np.full(left.shape, 7), 0)
    },
}


@pytest.mark.parametrize("words", MASKS)
def test_masks_without_a_meaning(backbone, tmp_path, words, monkeypatch):
    maps = dict(MASKS[words])
    if "val" in maps:
        maps["val"] = (maps["val"][0], ALL[1])
    folder = scenes(tmp_path / "scenes", **maps)
    monkeypatch.setattr(segmentation, "fit_segmentation", lambda *_: pytest.fail("trained"))
    with pytest.raises(NoMeaning) as caught:
        evaluate("segmentation", backbone, folder)
    assert words in str(caught.value)


def test_classes_that_only_val_has_are_counted(backbone, tmp_path):
    folder = scenes(tmp_path / "scenes", val=(lambda left: np.where(left, 1, 5), ALL[1]))
    report = evaluate("segmentation", backbone, folder, {"iterations": 2})
    assert report.notes == ["1 classes occur only in the masks of val; their IoU is 0"]
    assert report.figures["iou"][5] == 0
    assert evaluate("segmentation", backbone, scenes(tmp_path / "same"), {"iterations": 2}).notes == []


def test_equal_depths_are_refused_and_maps_without_a_depth_counted(backbone, tmp_path, monkeypatch):
    folder = scenes(tmp_path / "rest", val=(ALL[0], lambda left: np.where(left, 2000, 5000) * int(left[0, 20])))
    report = evaluate("depth", backbone, folder, {"iterations": 2})
    assert report.notes == ["1 of 2 maps of val have no depth in the range and are left out"]
    monkeypatch.setattr(depth, "fit_depth", lambda *_, **__: pytest.fail("trained"))
    flat = scenes(tmp_path / "flat", metres_of=lambda left: np.where(left, 3000, 0))
    with pytest.raises(NoMeaning, match="every known depth in the maps is 3 m: the head would predict it"):
        evaluate("depth", backbone, flat)


# Images without a label


def test_images_without_a_label_are_left_out_of_every_task_with_their_number(backbone, colours, tmp_path):
    tar_of(colours / "train", tmp_path / "tars" / "train.tar", without_label=2)
    tar_of(colours / "val", tmp_path / "tars" / "val.tar", without_label=1)
    expected = [
        "2 of 20 images of train have no label and are left out",
        "1 of 7 images of val have no label and are left out",
    ]
    for task in ("knn", "logistic", "linear"):
        report, clean = (evaluate(task, backbone, data, QUICK[task]) for data in (tmp_path / "tars", colours))
        assert report.notes == expected
        assert report.protocol == clean.protocol
        assert report.rows == clean.rows
    single = tar_of(colours / "train", tmp_path / "single.tar", without_label=2)
    for task in ("knn", "retrieval"):
        report, clean = (evaluate(task, backbone, data, {"k": 1}) for data in (single, colours / "train"))
        assert report.notes == ["2 of 20 images of the data have no label and are left out"]
        assert report.rows == clean.rows


def test_data_without_any_label_is_refused(backbone, tmp_path):
    with tarfile.open(tmp_path / "lost.tar", "w") as file:
        save_images(tmp_path, "red", 1)
        for i in range(6):
            file.add(tmp_path / "red" / "0.png", f"{i}.png")
    for task in ("knn", "retrieval"):
        with pytest.raises(NoMeaning, match="none of the 6 images of the data has a label: put the images of each"):
            evaluate(task, backbone, tmp_path / "lost.tar")


def test_knn_during_a_training_leaves_out_what_has_no_label_and_never_fails_for_it(model, colours, tmp_path):
    def images(split, without_label):
        path = tar_of(colours / split, tmp_path / f"{split}{without_label}.tar", without_label)
        return photos_of(open_source(path, tmp_path / "index"))

    train, test, said = images("train", 1), images("val", 2), []
    found = evaluate_knn(model, train, test, SPEC, (1, 18, 19), said.append)
    assert found == evaluate_knn(model, images("train", 0), images("val", 0), SPEC, (1, 18))
    assert set(found) == {"cls", "mean", "cls+mean"}
    assert said == [
        "1 of 19 images of train have no label and are left out",
        "2 of 8 images of the held-out part have no label and are left out",
        "k-NN for k=19 is left out: an image has only 18 neighbours",
    ]
    for few, asked, reason in (
        ([photo for photo in train if photo.label == "red"], test, "the 6 images of train have 1 class"),
        (train, [photo for photo in test if photo.label is None], "the held-out part has no image with a label"),
        (
            [photo for photo in train if photo.label != "red"],
            [p for p in test if p.label == "red"],
            "no class of the 2",
        ),
        ([], test, "train has no image with a label"),
    ):
        said.clear()
        assert evaluate_knn(model, few, asked, SPEC, (1,), said.append) == {}
        assert len(said) == 1
        assert f"no k-NN: {reason}" in said[0]
    said.clear()
    assert evaluate_knn(model, train, test, SPEC, (50,), said.append) == {}
    assert "no k-NN: k-NN for k=50 is left out: an image has only 18 neighbours, and no other k was given" in said[-1]


# Paths and notes


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_paths_that_cannot_be_written_are_found_before_the_model_is_loaded(tmp_path, colours, monkeypatch, option):
    monkeypatch.setattr("training.evaluate.backbone.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("x")
    bad = {
        "s3://bucket/report.json": "s3://bucket/report.json is an address, but results are written to local files only",
        tmp_path / "file" / "x" / "y": f"{tmp_path / 'file'} is not a folder",
    }
    bad |= {tmp_path: "is a folder: give a file"} if option == "--out" else {tmp_path / "file": "is not a folder"}
    for path, words in bad.items():
        result = invoke("auto", "--task", "knn", "--data", colours, option, path)
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert result.stderr.startswith(f"error: {option} ")


def test_notes_are_printed(model, colours, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, model.state_dict(), TINY, {"preprocess": {"resize": 28, "crop": 28}})
    result = invoke(path, "--task", "knn", "--data", colours, "k=[1, 99]", "--out", tmp_path / "new" / "report.json")
    assert result.exit_code == 0, result.output
    assert "note: k-NN for k=99 is left out: an image has only 18 neighbours" in result.stdout
    assert json.loads((tmp_path / "new" / "report.json").read_text())["notes"]
    refused = invoke(path, "--task", "knn", "--data", colours / "train" / "red")
    assert refused.exit_code == 2
    assert "every model would classify all images alike" in refused.stderr
