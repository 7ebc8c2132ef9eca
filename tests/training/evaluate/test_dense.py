"""Segmentation and depth: metrics and losses against plain loops, files that are refused, heads that learn."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.evaluate import depth, segmentation
from training.evaluate.dense import (
    DenseData,
    HeadTraining,
    Pair,
    TokenSettings,
    find_pairs,
    learning_rates,
    train_head,
)
from training.evaluate.linear import batch_stream

TINY = ViTConfig(embed_dim=24, depth=2, num_heads=2, img_size=28, pos_embed_rule="antialias", layerscale_init=None)
SPEC = PreprocessSpec(resize=56, crop=None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DinoVisionTransformer(TINY).eval()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Bright left part (class 1, 2 m), dark right part (class 0, 6 m), at several places and sizes; a strip unknown."""
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for kind in ("images", "masks", "depth"):
            (folder / kind / split / "deep").mkdir(parents=True)
        for i in range(n):
            height, width = 60, 80 + 30 * (i % 2)
            left = np.arange(width) < rng.integers(25, 60)
            photo = np.where(left, 220, 30)[None, :, None] + rng.integers(0, 20, (height, width, 3))
            mask = np.broadcast_to(left, (height, width)).astype(np.uint8).copy()
            mask[:4] = 255
            metres = np.where(mask == 1, 2.0, 6.0)
            metres[:4] = 0
            Image.fromarray(photo.astype(np.uint8)).save(folder / "images" / split / "deep" / f"{i}.jpg")
            Image.fromarray(mask).save(folder / "masks" / split / "deep" / f"{i}.png")
            if i % 2:
                np.save(folder / "depth" / split / "deep" / f"{i}.npy", metres)
            else:
                Image.fromarray((1000 * metres).astype(np.uint16)).save(folder / "depth" / split / "deep" / f"{i}.png")
    return folder


def make(model, folder, kind, split="train", memory_bytes=10**9, n_blocks=1):
    suffixes, read = {
        "masks": (segmentation.SUFFIXES, segmentation.read_mask),
        "depth": (depth.SUFFIXES, depth.read_depth),
    }[kind]
    pairs = find_pairs(folder, split, kind, suffixes)
    return DenseData(model, pairs, SPEC, read, TokenSettings(n_blocks, kind == "depth"), memory_bytes=memory_bytes)


def test_held_out_images_and_their_maps_may_be_in_folders_of_any_known_name(scenes, tmp_path):
    shutil.copytree(scenes / "images", tmp_path / "images")
    shutil.copytree(scenes / "masks", tmp_path / "masks")
    (tmp_path / "images" / "val").rename(tmp_path / "images" / "Validation")
    (tmp_path / "masks" / "val").rename(tmp_path / "masks" / "test")
    pairs = find_pairs(tmp_path, "val", "masks", segmentation.SUFFIXES)
    assert [(pair.image.parts[-3:], pair.target.parts[-3:]) for pair in pairs] == [
        (("Validation", "deep", f"{i}.jpg"), ("test", "deep", f"{i}.png")) for i in range(3)
    ]
    assert len(find_pairs(tmp_path, "train", "masks", segmentation.SUFFIXES)) == 6


def test_tokens_are_the_models_and_memory_changes_nothing(model, scenes):
    kept, anew = make(model, scenes, "depth", n_blocks=2), make(model, scenes, "depth", memory_bytes=0, n_blocks=2)
    for index, pair in enumerate(kept.pairs):
        tokens, target = kept[index]
        again, same = anew[index]
        assert torch.equal(tokens, again)
        assert torch.equal(target, same)
        h, w = tokens.shape[:2]
        assert target.shape == (14 * h, 14 * w)
        from training.evaluate.features import read_pixels

        pixels = torch.from_numpy(read_pixels(pair.image, SPEC))[None]
        with torch.no_grad():
            layers = model.get_intermediate_layers(pixels, n=2, return_class_token=True, reshape=True)
        plain = torch.cat([torch.cat((p[0], c[0][:, None, None].expand_as(p[0]))) for p, c in layers])  # [F, h, w]
        torch.testing.assert_close(tokens, plain.permute(1, 2, 0))


@pytest.mark.parametrize(("fits", "all_but_one"), [(0, True), (1, True), (2, True), (2, False), (3, False)])
def test_only_as_many_tokens_are_kept_as_fit(model, tmp_path, fits, all_but_one):
    rng = np.random.default_rng(0)
    pairs = [Pair(tmp_path / f"{i}.png", tmp_path / f"{i}-mask.png") for i in range(3)]
    for pair in pairs:
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(pair.image)
        Image.fromarray(rng.integers(0, 3, (56, 56), dtype=np.uint8)).save(pair.target)
    read = []

    def read_target(path):
        read.append(path.name)
        return segmentation.read_mask(path)

    one = 4 * 4 * 24 * 4 + 56 * 56  # float32 tokens and a uint8 map
    spare = one - 1 if all_but_one else 0  # bytes
    data = DenseData(model, pairs, SPEC, read_target, TokenSettings(1, with_cls=False), memory_bytes=fits * one + spare)
    assert data.memory_left == spare
    read.clear()
    for index in range(3):
        data[index]
    assert read == [pair.target.name for pair in pairs[fits:]]


def test_maps_are_resized_to_the_nearest_pixel_by_their_centres(model, tmp_path):
    Image.fromarray(np.zeros((60, 110, 3), np.uint8)).save(tmp_path / "image.png")
    mask = np.random.default_rng(0).integers(0, 200, (60, 110), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pairs = [Pair(tmp_path / "image.png", tmp_path / "mask.png")]
    data = DenseData(model, pairs, SPEC, segmentation.read_mask, TokenSettings(1, with_cls=False), memory_bytes=0)
    found = data[0][1]
    height, width = found.shape
    assert (height, width) == (56, 98)
    rows = [int((y + 0.5) * 60 / height) for y in range(height)]
    columns = [int((x + 0.5) * 110 / width) for x in range(width)]
    assert np.array_equal(found, mask[np.ix_(rows, columns)])


class Fixed:
    """Tokens and maps as given, in the place of `DenseData`."""

    def __init__(self, tokens, maps):
        self.tokens, self.maps = tokens, maps
        self.pairs = [Pair(Path(f"{i}.jpg"), Path(str(i))) for i in range(len(maps))]

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        return self.tokens[index], self.maps[index]

    def read_target(self, path):
        return self.maps[int(path.name)]


def test_a_head_is_trained_by_adamw_with_the_learning_rates_and_batches_of_the_protocol():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(2, 3, 4, generator=generator) for _ in range(5)]
    targets = [torch.randn(2, 3, generator=generator) for _ in range(5)]
    training = HeadTraining(iterations=30, batch_size=2, lr=0.05, weight_decay=0.3, seed=4)

    def head():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(4, 1)).eval()

    def loss_of(network, x, y):
        found = torch.cat([network(t)[..., 0] for t in x])
        return (found - torch.cat(y)).square().mean()

    ours, plain = head(), head()
    last = train_head(ours, Fixed(tokens, targets), lambda x, y: loss_of(ours, x, y), training)
    optimizer = torch.optim.AdamW(plain.train().parameters(), lr=0.0, weight_decay=0.3)
    stream = batch_stream(5, 2, 4)
    for lr in learning_rates(training):
        optimizer.param_groups[0]["lr"] = lr
        index = next(stream).tolist()
        optimizer.zero_grad()
        loss = loss_of(plain, [tokens[i] for i in index], [targets[i] for i in index])
        loss.backward()
        optimizer.step()
    assert last == pytest.approx(loss.item(), rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert not ours.training


def test_the_figures_of_segmentation_are_those_of_one_confusion_matrix(monkeypatch):
    masks = [torch.tensor([[0, 0, 0, 0, 1, 255]]).byte(), torch.tensor([[1, 1, 3, 3]]).byte()]
    predicted = [torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.tensor([[1, 0, 3, 0]])]
    answers = iter(predicted)
    monkeypatch.setattr(segmentation, "train_head", lambda *args: 0.25)
    monkeypatch.setattr(segmentation, "predict", lambda logits, size: next(answers))
    data = Fixed([torch.zeros(1, 2, 4)] * 2, masks)
    report = segmentation.evaluate_segmentation(data, data, HeadTraining(1, 1, 1.0, 0.0, 0))
    assert report.iou[:2] == pytest.approx([3 / 6, 2 / 4])
    assert math.isnan(report.iou[2])  # neither there nor predicted where anything is labelled
    assert report.iou[3] == pytest.approx(1 / 2)
    assert report.mean_iou == pytest.approx((3 / 6 + 2 / 4 + 1 / 2) / 3)
    assert report.pixel_accuracy == pytest.approx(6 / 9)
    assert report.mean_accuracy == pytest.approx((3 / 4 + 2 / 3 + 1 / 2) / 3)
    assert report.loss == 0.25


def test_segmentation_learns_and_repeats_itself(model, scenes):
    train, val = make(model, scenes, "masks"), make(model, scenes, "masks", "val")
    told = []
    training = HeadTraining(40, 4, 2e-2, 1e-3, seed=0)
    report = segmentation.evaluate_segmentation(train, val, training, advance=told.append)
    assert sum(told) == 40
    assert report.mean_iou > 0.85
    assert len(report.iou) == 2
    assert report.pixel_accuracy > 0.9
    assert report == segmentation.evaluate_segmentation(train, val, training)
    untrained = segmentation.evaluate_segmentation(train, val, HeadTraining(1, 4, 1e-9, 0, seed=0))
    assert untrained.mean_iou < report.mean_iou - 0.2
    with pytest.raises(ValueError, match=r"has class 1, but classes=1 allows 0 to 0"):
        segmentation.evaluate_segmentation(train, val, training, n_classes=1)


def test_the_segmenter_is_batch_norm_and_a_convolution():
    torch.manual_seed(1)
    tokens = torch.randn(3, 4, 5, 6)
    head = segmentation.LinearSegmenter(6, 2).train()
    bn, conv = torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(head.linear.weight[:, :, None, None])
        conv.bias.copy_(head.linear.bias)
    expected = conv(bn(tokens.permute(0, 3, 1, 2)))
    torch.testing.assert_close(torch.stack(head(list(tokens))), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bn.running_var, bn.running_var)


def test_segmentation_loss_counts_labelled_pixels_only():
    torch.manual_seed(0)
    logits = [torch.randn(3, 2, 2), torch.randn(3, 2, 3)]
    masks = [torch.randint(0, 3, (5, 6)).byte(), torch.full((4, 4), 255).byte()]
    masks[0][0] = 255
    large = F.interpolate(logits[0][None], size=(5, 6), mode="bilinear")[0].log_softmax(0)
    losses = [-large[int(masks[0][y, x]), y, x] for y in range(1, 5) for x in range(6)]
    torch.testing.assert_close(segmentation.segmentation_loss(logits, masks), torch.stack(losses).mean())
    assert segmentation.segmentation_loss(logits[1:], masks[1:]) == 0


def test_predict_in_parts_is_the_argmax():
    logits = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = F.interpolate(logits[None], size=(20, 17), mode="bilinear")[0].argmax(0)
    for at_once in (1, 3, 7, 16):
        assert torch.equal(segmentation.predict(logits, (20, 17), at_once), plain)


@pytest.mark.parametrize("at_once", [1, 16, 19, 30])
def test_of_equal_logits_the_first_class_is_predicted(at_once):
    logits = torch.full((24, 2, 3), -1.0)
    logits[[0, 20]] = 2.0
    assert (segmentation.predict(logits, (2, 3), at_once) == 0).all()  # nothing is enlarged, so ties stay ties
    logits[0] = -1.0
    logits[[3, 5]] = 2.0
    assert (segmentation.predict(logits, (2, 3), at_once) == 3).all()


def test_iou_is_its_definition():
    g = torch.Generator().manual_seed(0)
    predicted, mask = torch.randint(0, 4, (9, 9), generator=g), torch.randint(0, 4, (9, 9), generator=g).byte()
    mask[mask == 2] = 255  # class 2 does not occur, but is predicted; class 4 is neither
    confusion = segmentation.confusion_matrix(predicted, mask, 5)
    iou = segmentation.iou_of(confusion)
    for c in range(4):
        both = sum(int(p == c and m == c) for p, m in zip(predicted.flatten(), mask.flatten(), strict=True))
        either = sum(
            int(m != 255 and (p == c or m == c)) for p, m in zip(predicted.flatten(), mask.flatten(), strict=True)
        )
        assert iou[c] == pytest.approx(both / either)
    assert iou[2] == 0
    assert math.isnan(iou[4])
    assert confusion.sum() == (mask != 255).sum()
    by_hand = segmentation.iou_of(torch.tensor([[3, 1], [0, 2]]))
    assert by_hand.tolist() == [3 / 4, 2 / 3]


def test_masks_are_read_as_they_are(tmp_path):
    values = np.array([[0, 1, 2], [150, 255, 0]], dtype=np.uint8)
    indexed = Image.fromarray(values, mode="L").convert("P")
    indexed = Image.frombytes("P", (3, 2), values.tobytes())
    indexed.putpalette([i // 3 for i in range(768)])
    indexed.save(tmp_path / "p.png")
    Image.fromarray(values).save(tmp_path / "l.png")
    for name in ("p.png", "l.png"):
        assert np.array_equal(segmentation.read_mask(tmp_path / name), values)
    shifted = segmentation.read_mask(tmp_path / "l.png", zero_is_ignored=True)
    assert shifted.tolist() == [[255, 0, 1], [149, 255, 255]]
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="not one of mode RGB"):
        segmentation.read_mask(tmp_path / "rgb.png")


def test_depth_learns_and_repeats_itself(model, scenes):
    train, val = make(model, scenes, "depth"), make(model, scenes, "depth", "val")
    training = HeadTraining(40, 3, 2e-2, 1e-3, seed=0)
    ranges = {"min_depth": 0.5, "max_depth": 8.0, "n_bins": 32}
    report = depth.evaluate_depth(train, val, training, **ranges)
    untrained = depth.evaluate_depth(train, val, HeadTraining(1, 3, 1e-9, 0, seed=0), **ranges)
    assert report.rmse < 1.5 < untrained.rmse
    assert report.delta1 > untrained.delta1 + 0.3
    assert report.photos == 3
    assert report == depth.evaluate_depth(train, val, training, **ranges)
    with pytest.raises(ValueError, match="must be above 0 and below max_depth"):
        depth.evaluate_depth(train, val, training, min_depth=3, max_depth=2)
    with pytest.raises(ValueError, match="no train map has a depth above min_depth=7 "):
        depth.evaluate_depth(train, val, training, min_depth=7, max_depth=8)


def test_depths_count_above_the_least_and_up_to_the_largest():
    tokens = torch.zeros(1, 2, 4)
    train = Fixed([tokens], [torch.full((2, 4), 3.0)])
    val = Fixed([tokens] * 3, [torch.full((2, 4), metres) for metres in (1.0, 5.0, 5.5)])
    training = HeadTraining(1, 1, 1e-9, 0.0, 0)
    report = depth.evaluate_depth(train, val, training, min_depth=1.0, max_depth=5.0, n_bins=5)
    assert report.photos == 1
    assert report.rmse == pytest.approx(2.0, rel=1e-5)  # all bins weigh the same: 3 m
    assert report.abs_rel == pytest.approx(2 / 5, rel=1e-5)


def test_depth_of_a_token_is_the_expectation_of_its_bins():
    head = depth.LinearDepth(5, 1.0, 4.0, n_bins=4, seed=3)
    with torch.no_grad():
        head.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    token = torch.randn(5, generator=torch.Generator().manual_seed(1))
    logits = head.linear(token).tolist()
    weights = [max(0.0, v) + 0.1 for v in logits]
    expected = sum(w / sum(weights) * bin_ for w, bin_ in zip(weights, (1.0, 2.0, 3.0, 4.0), strict=True))
    metres = head(token.expand(2, 3, 5), (9, 11))
    torch.testing.assert_close(metres, torch.full((9, 11), expected))


def test_depth_losses_are_their_definitions():
    g = torch.Generator().manual_seed(0)
    p, d = 1 + torch.rand(6, 7, generator=g), 1 + torch.rand(6, 7, generator=g)
    known = torch.rand(6, 7, generator=g) > 0.2
    e = [
        math.log(a + 1e-3) - math.log(b + 1e-3) for a, b in zip(p.flatten().tolist(), d.flatten().tolist(), strict=True)
    ]
    mean = sum(e) / len(e)
    variance = sum((x - mean) ** 2 for x in e) / len(e)
    expected = math.sqrt(variance + 0.15 * mean**2)
    assert depth.scale_invariant_loss(p.flatten(), d.flatten()).item() == pytest.approx(expected, rel=1e-4)
    total = 0.0
    for s in (1, 2, 4, 8):
        rows, columns, part, count = range(0, 6, s), range(0, 7, s), 0.0, 0
        for y in rows:
            for x in columns:
                count += int(known[y, x])
                for other in ((y + s, x), (y, x + s)):
                    if other[0] < 6 and other[1] < 7 and known[y, x] and known[other]:
                        part += abs(e[y * 7 + x] - e[other[0] * 7 + other[1]])
        total += part / max(1, count)
    assert depth.gradient_loss(p, d, known).item() == pytest.approx(total, rel=1e-4)
    exact = p.clone().requires_grad_()
    depth.scale_invariant_loss(exact, p).backward()
    assert exact.grad.isfinite().all()


def test_depth_metrics_by_hand():
    rmse, abs_rel, delta1 = depth.depth_metrics(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 4.1]))
    assert rmse == pytest.approx(math.sqrt((0 + 1 + 0.81) / 3))
    assert abs_rel == pytest.approx((0 + 1 + 0.9 / 4.1) / 3)
    assert delta1 == pytest.approx(2 / 3)
    assert depth.depth_metrics(torch.tensor([1.25, 2.0]), torch.tensor([1.0, 2.5])) == (
        pytest.approx(math.sqrt((0.0625 + 0.25) / 2)),
        pytest.approx((0.25 + 0.2) / 2),
        0.0,  # a factor of 1.25 is not within it
    )


def test_depth_files(tmp_path):
    Image.fromarray(np.array([[0, 256], [512, 65535]], dtype=np.uint16)).save(tmp_path / "d.png")
    assert depth.read_depth(tmp_path / "d.png", units_per_metre=256).tolist() == [[0, 1], [2, 65535 / 256]]
    np.save(tmp_path / "d.npy", np.array([[1.5, np.nan, -1, np.inf]]))
    assert depth.read_depth(tmp_path / "d.npy").tolist() == [[1.5, 0, 0, 0]]
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"\[H, W\], not \[3\]"):
        depth.read_depth(tmp_path / "flat.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        depth.read_depth(tmp_path / "objects.npy")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "gray.png")
    with pytest.raises(ValueError, match="16-bit gray PNG, not one of mode L"):
        depth.read_depth(tmp_path / "gray.png")


def test_broken_files_are_skipped_and_missing_maps_refused(model, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    for name in "abc":
        Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "images/train" / f"{name}.png")
        Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "masks/train" / f"{name}.png")
    (tmp_path / "images/train/a.png").write_bytes(b"broken")
    (tmp_path / "masks/train/b.png").write_bytes(b"broken")
    data = make(model, tmp_path, "masks")
    assert [Path(s.name).parts[-3:] for s in data.skipped] == [
        ("images", "train", "a.png"),
        ("masks", "train", "b.png"),
    ]
    assert [pair.image.name for pair in data.pairs] == ["c.png"]
    (tmp_path / "images/train/c.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of 3 pairs could be read"):
        make(model, tmp_path, "masks")
    (tmp_path / "masks/train/c.png").unlink()
    with pytest.raises(ValueError, match=r"1 images of .* have no file with their name and \.png .*c\.png"):
        find_pairs(tmp_path, "train", "masks", (".png",))


def test_learning_rate_rises_and_falls_to_zero():
    rates = learning_rates(HeadTraining(400, 1, 2.0, 0, 0))
    assert len(rates) == 400
    assert rates[:3] == pytest.approx([2 / 15, 4 / 15, 6 / 15])
    assert max(rates) == rates[14] == rates[15] == 2.0
    assert rates[-1] == pytest.approx(2 / 385)
    assert learning_rates(HeadTraining(1, 1, 2.0, 0, 0)) == [2.0]
