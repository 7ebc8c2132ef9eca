"""Trainings and comparisons on images of which some have no label."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load_checkpoint
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from tests.training.tiny import QUIET, TINY
from training import train as loop
from training.compare import judge
from training.config import TrainConfig
from training.data.dataset import photos_of
from training.data.sources import open_source
from training.watch.monitor import read_lines


def write_tar(path, labels, n):
    """Write a tar with `n` images of each label, and one image that has no label."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name in [*(f"{label}/{i}.png" for label in labels for i in range(n)), "lost.png"]:
            pixels = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
            pixels[..., 2 if name.startswith("blue") else 0] += 180
            Image.fromarray(pixels).save(path.with_suffix(".png"))
            file.add(path.with_suffix(".png"), name)
    path.with_suffix(".png").unlink()


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "tars" / "train.tar", ("red", "blue"), 6)
    write_tar(tmp_path / "tars" / "val.tar", ("red", "blue"), 3)
    return tmp_path / "tars"


def test_a_training_finishes_with_its_knn_and_its_report(tars, tmp_path):
    out = tmp_path / "run"
    settings = {**TINY, "data": str(tars), "out": out, "epochs": 1, "eval_every_epochs": 1}
    path = loop.train(TrainConfig.model_validate(settings), QUIET)
    assert set(load_checkpoint(path)[2]["knn"]["cls"]) == {"1", "10"}  # 12 images with a label: no k of 20
    assert (out / "report.html").is_file()
    assert read_lines(out / "evaluations.jsonl")[0]["knn_cls_10"] >= 0


def test_a_training_whose_held_out_images_have_other_classes_has_no_knn_of_zero(tars, tmp_path):
    write_tar(tars / "val.tar", ("green",), 3)
    out = tmp_path / "run"
    settings = {**TINY, "data": str(tars), "out": out, "epochs": 1, "eval_every_epochs": 1}
    path = loop.train(TrainConfig.model_validate(settings), QUIET)
    assert load_checkpoint(path)[2]["knn"] == {}
    assert not [line for line in read_lines(out / "evaluations.jsonl") if "knn_cls_10" in line]


def test_a_comparison_leaves_out_images_without_a_label_and_says_why_it_has_no_accuracy(tars, tmp_path):
    torch.manual_seed(0)
    vit = ViTConfig(embed_dim=16, depth=1, num_heads=2, img_size=28)
    model, spec = DinoVisionTransformer(vit).eval(), PreprocessSpec(resize=28, crop=28)
    train, held_out = (photos_of(open_source(tars / f"{split}.tar", tmp_path)) for split in ("train", "val"))
    found = judge(model, train, held_out, spec, has_classes=True)
    clean = judge(model, train[:-1], held_out[:-1], spec, has_classes=True)
    assert [photo.label for photo in (train[-1], held_out[-1])] == [None, None]
    assert found["knn"] == clean["knn"]
    assert list(found["knn"]["cls"]) == ["10"]
    assert found["logistic"] == clean["logistic"]
    assert found["robustness"]["photos"] == clean["robustness"]["photos"] + 1
    blue = [photo for photo in train if photo.label == "blue"]
    alone = judge(model, blue, held_out, spec, has_classes=True)
    assert "knn" not in alone
    assert alone["left_out"].startswith("the 6 images of train have 1 class")
