"""k-NN in blocks, logistic regression against scikit-learn, the linear probe against a single head trained alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.evaluate import logistic
from training.evaluate.knn import knn_accuracy, nearest
from training.evaluate.linear import (
    CODE_LRS,
    PAPER_LRS,
    Head,
    ProbeSettings,
    _make_group,
    batch_stream,
    evaluate_linear,
    stack_features,
    train_heads,
)
from training.evaluate.logistic import (
    C_GRID,
    accuracy,
    evaluate_logistic,
    fit_logistic,
    logistic_loss,
    split_off,
)


def blobs(n, dim, n_classes, seed=0, spread=1.0):
    """Features around one centre a class, and labels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % n_classes
    return centres[labels] + spread * torch.randn(n, dim, generator=g), labels


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (50, 3), (1, 50), (1024, 65_536)])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_blocks_change_nothing(rows, columns, leave_one_out):
    train, labels = blobs(40, 6, 4)
    test, test_labels = (train, labels) if leave_one_out else blobs(23, 6, 4, seed=1)
    cosine = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    if leave_one_out:
        cosine.fill_diagonal_(-2)
    plain = cosine.topk(9, dim=1)
    values, indices = nearest(train, test, 9, leave_one_out=leave_one_out, rows=rows, columns=columns)
    torch.testing.assert_close(values, plain.values)
    assert torch.equal(indices, plain.indices)
    whole = knn_accuracy(train, labels, test, test_labels, (1, 5, 99), leave_one_out=leave_one_out)
    parts = knn_accuracy(
        train, labels, test, test_labels, (1, 5, 99), leave_one_out=leave_one_out, rows=rows, columns=columns
    )
    assert whole == parts


@pytest.mark.parametrize("c", [1e-6, 1e-2, 100.0])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_logistic_is_scikit_learns(c, n_classes):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the reference implementation")
    x, y = blobs(120, 7, n_classes, spread=1.5)
    x = x * torch.logspace(-0.5, 0.5, 7) + 3  # badly scaled and off the origin
    ours = fit_logistic(x, y, c, n_classes, tolerance=1e-10)
    reference = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=1000, solver="newton-cg")
    if n_classes == 2:  # their one weight vector w is our +-w/2, on which the same penalty is half as large
        reference.C = 2 * c
        reference.fit(x.double().numpy(), y.numpy())
        weight = torch.from_numpy(np.concatenate((-reference.coef_, reference.coef_)) / 2)
        bias = torch.from_numpy(np.concatenate((-reference.intercept_, reference.intercept_)) / 2)
    else:
        reference.fit(x.double().numpy(), y.numpy())
        weight, bias = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
    theirs = logistic_loss(weight, bias, x.double(), y, c).item()
    found = logistic_loss(ours.weight, ours.bias, x.double(), y, c).item()
    assert found <= theirs + 1e-9
    assert found == pytest.approx(theirs, abs=1e-6)
    torch.testing.assert_close(ours.weight, weight, rtol=1e-2, atol=1e-4 * float(weight.abs().max()) + 1e-9)
    torch.testing.assert_close(ours.logits(x).softmax(1), (x.double() @ weight.T + bias).softmax(1), atol=2e-3, rtol=0)


def test_logistic_from_another_start_ends_at_the_same_place():
    x, y = blobs(60, 5, 3)
    cold = fit_logistic(x, y, 1.0, 3, tolerance=1e-10)
    warm = fit_logistic(x, y, 1.0, 3, start=fit_logistic(x, y, 0.01, 3), tolerance=1e-10)
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-6, rtol=1e-5)
    plain = (x.double() @ cold.weight.T + cold.bias).argmax(1) == y
    assert accuracy(cold, x, y, rows=7) == pytest.approx(plain.double().mean().item())


def test_logistic_chooses_c_on_a_share_of_train_only():
    train, labels = blobs(100, 4, 3)
    val, val_labels = blobs(30, 4, 3, seed=5)
    told = []
    grid = (1e-6, 1e-1, 10.0)
    report = evaluate_logistic(train, labels, val, val_labels, c_grid=grid, advance=told.append)
    assert list(report.sweep) == list(grid)
    assert len(told) == 3
    kept, aside = split_off(100, 0.1, 0)
    assert len(aside) == 10
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(100))
    for c in grid:
        model = fit_logistic(train[kept], labels[kept], c, 3, tolerance=1e-9)
        assert report.sweep[c] == pytest.approx(accuracy(model, train[aside], labels[aside]))
    assert report.c == max(grid, key=lambda c: report.sweep[c])
    best = fit_logistic(train, labels, report.c, 3, tolerance=1e-9)
    assert report.accuracy == pytest.approx(accuracy(best, val, val_labels))
    assert report == evaluate_logistic(train, labels, val, val_labels, c_grid=grid)


def test_the_last_fit_is_of_all_training_images(monkeypatch):
    train, labels = blobs(50, 4, 3)
    rows, fit = [], logistic.fit_logistic
    monkeypatch.setattr(logistic, "fit_logistic", lambda x, *args, **more: rows.append(len(x)) or fit(x, *args, **more))
    evaluate_logistic(train, labels, train, labels, c_grid=(0.1, 1.0), fit=logistic.FitSettings(held_out_share=0.2))
    assert rows == [40, 40, 50]


def test_of_equally_good_values_of_c_the_smallest_is_taken():
    train, labels = blobs(60, 4, 3, spread=1e-3)
    report = evaluate_logistic(
        train, labels, train, labels, c_grid=(10.0, 0.1, 1.0), fit=logistic.FitSettings(held_out_share=0.2)
    )
    assert list(report.sweep) == [0.1, 1.0, 10.0]
    assert set(report.sweep.values()) == {1.0}
    assert report.c == 0.1


def test_the_share_set_aside_is_drawn_by_the_seed():
    sets = [split_off(100, 0.25, seed)[1].tolist() for seed in range(4)]
    assert all(len(set(aside)) == 25 and aside == sorted(aside) for aside in sets)
    assert len({tuple(aside) for aside in sets}) == 4
    assert split_off(100, 0.25, 2)[1].tolist() == sets[2]
    assert [len(part) for part in split_off(5, 0.1, 0)] == [4, 1]  # one at least


def test_grids_are_those_of_the_protocol():
    assert len(C_GRID) == 45
    assert C_GRID[0] == pytest.approx(1e-6)
    assert C_GRID[-1] == pytest.approx(1e5)
    assert (len(CODE_LRS), min(CODE_LRS), max(CODE_LRS)) == (13, 1e-5, 0.1)
    assert (len(PAPER_LRS), min(PAPER_LRS), max(PAPER_LRS)) == (13, 1e-4, 0.5)


def test_logistic_refuses():
    x, y = blobs(6, 2, 2)
    with pytest.raises(ValueError, match="c=0 must be above 0"):
        fit_logistic(x, y, 0, 2)
    with pytest.raises(ValueError, match="at least 2 training images, found 1"):
        evaluate_logistic(x[:1], y[:1], x, y)
    with pytest.raises(ValueError, match="c_grid is empty"):
        evaluate_logistic(x, y, x, y, c_grid=())


def probe_data():
    n, blocks, dim = 50, 4, 3
    cls, labels = blobs(n * blocks, dim, 5)
    return torch.roll(cls, 1, 0).view(n, blocks, dim), blobs(n, dim, 5, seed=3)[0], torch.arange(n) % 5, labels


@pytest.mark.parametrize(("blocks", "avgpool"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_heads_trained_together_are_heads_trained_alone(blocks, avgpool, lr):
    """Against torch's modules, autograd, SGD and cosine schedule, for one head."""
    cls, mean, labels, _ = probe_data()
    features = stack_features(cls, mean)
    iterations, batch, lrs = 40, 16, (1e-3, 0.05, 0.3)
    together = train_heads(
        features, labels, 5, depth=4, settings=ProbeSettings(lrs=lrs, iterations=iterations, batch_size=batch, seed=7)
    )[blocks, avgpool]

    x = cls[:, -blocks:].flatten(1)
    x = torch.cat((x, mean), 1) if avgpool else x
    alone = torch.nn.Linear(x.shape[1], 5)
    start = _make_group(blocks, avgpool, 1, 5, 4, features, 7)
    with torch.no_grad():
        alone.weight.copy_(start.weight[:, 0].T)
        alone.bias.zero_()
    optimizer = torch.optim.SGD(alone.parameters(), lr=lr * batch / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    stream = batch_stream(50, batch, 7)
    for _ in range(iterations):
        index = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(alone(x[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(together.weight[:, lrs.index(lr)].T, alone.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.bias[lrs.index(lr)], alone.bias.detach(), atol=1e-5, rtol=1e-4)


def test_heads_begin_small_and_alike_for_all_learning_rates():
    group = _make_group(4, True, 3, 7, 4, torch.zeros(2, 5 * 40), seed=2)
    assert group.weight.shape == (200, 3, 7)
    assert float(group.weight.std()) == pytest.approx(0.01, rel=0.1)  # as the original's
    assert torch.equal(group.weight[:, 0], group.weight[:, 2])
    assert not group.bias.any()
    assert not torch.equal(group.weight, _make_group(4, True, 3, 7, 4, torch.zeros(2, 5 * 40), seed=3).weight)


def test_of_equally_good_heads_the_first_of_the_grid_is_the_best():
    train, labels = blobs(40, 6, 2, spread=1e-3)
    features = torch.cat((train, train), dim=1)
    settings = ProbeSettings(blocks=(1,), lrs=(0.05, 0.1), iterations=200, batch_size=64)
    report = evaluate_linear(features, labels, features, labels, depth=1, settings=settings)
    assert set(report.accuracy.values()) == {1.0}
    assert report.best == Head(1, False, 0.05)


def test_linear_report_has_every_head_and_is_the_same_again():
    cls, mean, labels, _ = probe_data()
    features = stack_features(cls, mean)
    told = []
    probe = ProbeSettings(lrs=(1e-5, 0.1), iterations=30, batch_size=64, seed=1)
    settings = {"depth": 4, "settings": probe}
    report = evaluate_linear(features, labels, features, labels, advance=told.append, **settings)
    assert sum(told) == 30
    assert set(report.accuracy) == {Head(b, a, lr) for b in (1, 4) for a in (False, True) for lr in (1e-5, 0.1)}
    assert report.accuracy[report.best] == max(report.accuracy.values())
    assert report == evaluate_linear(features, labels, features, labels, **settings)
    groups = train_heads(
        features, labels, 5, depth=4, settings=replace(probe, lrs=(0.1,), blocks=(4,), avgpools=(True,))
    )
    group = groups[4, True]
    right = (features @ group.weight[:, 0] + group.bias[0]).argmax(1) == labels
    assert report.accuracy[Head(4, True, 0.1)] == pytest.approx(right.double().mean().item())


def test_batches_are_permutations_one_after_the_other():
    stream = batch_stream(10, 4, seed=3)
    seen = torch.cat([next(stream) for _ in range(10)])
    assert all(sorted(seen[i : i + 10].tolist()) == list(range(10)) for i in (0, 10, 20, 30))
    assert not torch.equal(seen[:10], seen[10:20])
    counts = torch.bincount(next(batch_stream(3, 7, 0)))
    assert sorted(counts.tolist()) == [2, 2, 3]  # two permutations and one image


def test_linear_refuses():
    cls, mean, labels, _ = probe_data()
    features = stack_features(cls, mean)
    with pytest.raises(ValueError, match="from 1 to 3"):
        evaluate_linear(features, labels, features, labels, depth=3)
    with pytest.raises(ValueError, match="iterations=0"):
        evaluate_linear(features, labels, features, labels, depth=4, settings=ProbeSettings(iterations=0))
    with pytest.raises(ValueError, match="found 50 and 0"):
        evaluate_linear(features, labels, features[:0], labels[:0], depth=4)
