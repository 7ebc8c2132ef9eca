"""k-NN against a plain loop, and features that come back in the order of the photos."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.all_features import extract_features
from model.config import ViTConfig
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from training.data.dataset import read_photo
from training.evaluate.knn import evaluate_knn, knn_accuracy, labels_of

TINY = ViTConfig(embed_dim=16, depth=1, num_heads=2, img_size=28, pos_embed_rule="antialias")


def plain_knn(train, train_labels, test, k, skip_self=False):
    predictions = []
    for i, query in enumerate(test):
        scored = [
            (float(query @ row / query.norm() / row.norm()), int(label))
            for j, (row, label) in enumerate(zip(train, train_labels, strict=True))
            if not (skip_self and i == j)
        ]
        votes = {}
        for similarity, label in sorted(scored, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / 0.07)
        predictions.append(max(votes, key=votes.get))
    return predictions


@pytest.mark.parametrize("k", [1, 3, 10])
def test_knn_is_its_definition(k):
    g = torch.Generator().manual_seed(k)
    train, test = torch.randn(30, 4, generator=g), torch.randn(12, 4, generator=g)
    train_labels, test_labels = torch.randint(0, 4, (30,), generator=g), torch.randint(0, 4, (12,), generator=g)
    right = np.mean(np.array(plain_knn(train, train_labels, test, k)) == test_labels.numpy())
    assert knn_accuracy(train, train_labels, test, test_labels, [k])[k] == pytest.approx(right)
    right = np.mean(np.array(plain_knn(train, train_labels, train, k, skip_self=True)) == train_labels.numpy())
    left_out = knn_accuracy(train, train_labels, train, train_labels, [k], leave_one_out=True)
    assert left_out[k] == pytest.approx(right)


def test_more_neighbours_than_photos_means_all():
    train = torch.eye(3)
    assert knn_accuracy(train, torch.arange(3), train, torch.arange(3), [10]) == {10: 1.0}


@pytest.fixture
def folder(tmp_path):
    """Two classes that even a random network tells apart: red images and blue ones, of several shapes."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for name, channel in (("red", 0), ("blue", 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                photo = rng.integers(0, 60, (30 + i, 40, 3), dtype=np.uint8)
                photo[:, :, channel] += 180
                Image.fromarray(photo).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_features_are_in_the_order_of_the_photos_whatever_their_sizes(folder):
    torch.manual_seed(0)
    model = DinoVisionTransformer(TINY).train()
    spec = PreprocessSpec(resize=28, crop=None)
    paths = sorted(folder.rglob("*.png"))
    features = extract_features(model, paths, spec, batch_size=4)
    assert model.training
    model.eval()
    for i in (0, 5, 11):
        out = model.forward_features(torch.from_numpy(preprocess(read_photo(paths[i]), spec))[None])
        torch.testing.assert_close(features["cls"][i], out["x_norm_clstoken"][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features["mean"][i], out["x_norm_patchtokens"][0].mean(0), atol=1e-5, rtol=1e-4)
    halves = features["cls+mean"].view(len(paths), 2, -1).norm(dim=2)
    torch.testing.assert_close(halves, torch.ones_like(halves))


def test_labels_are_folder_names_and_agree_between_splits(folder):
    train, val = sorted((folder / "train").rglob("*.png")), sorted((folder / "val").rglob("*.png"))
    numbers, classes = labels_of(train)
    again, same = labels_of(val, classes)
    assert classes == same == {"blue": 0, "red": 1}
    assert numbers.tolist() == [0] * 6 + [1] * 6
    assert again.tolist() == [0] * 3 + [1] * 3


def test_evaluate_knn(folder):
    torch.manual_seed(0)
    train, val = sorted((folder / "train").rglob("*.png")), sorted((folder / "val").rglob("*.png"))
    found = evaluate_knn(DinoVisionTransformer(TINY), train, val, PreprocessSpec(resize=28, crop=28), ks=(1, 5))
    assert found["mean"] == {1: 1.0, 5: 1.0}
    assert set(found) == {"cls", "mean", "cls+mean"}


def test_an_image_that_cannot_be_read_takes_no_label_from_its_neighbours(folder):
    (folder / "train" / "blue" / "3.png").write_bytes(b"broken")
    (folder / "val" / "blue" / "0.png").write_bytes(b"broken")
    torch.manual_seed(0)
    train, val = sorted((folder / "train").rglob("*.png")), sorted((folder / "val").rglob("*.png"))
    found = evaluate_knn(DinoVisionTransformer(TINY), train, val, PreprocessSpec(resize=28, crop=28), ks=(1, 3))
    assert found["mean"] == {1: 1.0, 3: 1.0}
