"""Trainings and comparisons on images of which some have no label."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.fixture
def tars(tmp_path):
    """Return a folder with train.tar and val.tar: two classes, and one image in each tar that has no label."""
    rng = np.random.default_rng(0)
    (tmp_path / "tars").mkdir()
    for split, n in (("train", 6), ("val", 3)):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as file:
            for name in [*(f"{label}/{i}.png" for label in ("red", "blue") for i in range(n)), "lost.png"]:
                pixels = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
                pixels[..., 2 if name.startswith("blue") else 0] += 180
                Image.fromarray(pixels).save(tmp_path / "image.png")
                file.add(tmp_path / "image.png", name)
    return tmp_path / "tars"


def test_a_training_finishes_with_its_knn_and_its_report(tars, tmp_path):
    out = tmp_path / "run"
    settings = {**TINY, "data": str(tars), "out": out, "epochs": 1, "eval_every_epochs": 1}
    loop.train(TrainConfig.model_validate(settings), QUIET)
    assert set(json.loads((out / "knn.json").read_text())["cls"]) == {"1", "10"}  # 12 images with a label: no k of 20
    assert (out / "report.html").is_file()
    assert read_lines(out / "evaluations.jsonl")[0]["knn_cls_10"] >= 0


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
