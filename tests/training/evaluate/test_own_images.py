"""The measures on a run's own images are their plain definitions."""

import math

import pytest
import torch

from training.evaluate.own_images import KS, own_accuracy, view_likelihood


def features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def test_own_accuracy_is_the_mean_of_leave_one_out_over_k():
    tokens = features(30)
    labels = (tokens[:, 0] > 0).long()
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    right = []
    for k in KS:
        for query in range(30):
            cosine = unit @ unit[query]
            others = sorted((row for row in range(30) if row != query), key=lambda row: -float(cosine[row]))[:k]
            votes = [sum(math.exp(float(cosine[row]) / 0.07) for row in others if labels[row] == c) for c in (0, 1)]
            right.append(votes.index(max(votes)) == int(labels[query]))
    assert own_accuracy(tokens, labels) == pytest.approx(sum(right) / len(right))


def test_own_accuracy_of_few_images_uses_all_of_them():
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert own_accuracy(tokens, torch.tensor([0, 0, 1, 1])) == 1.0
    assert own_accuracy(tokens, torch.tensor([0, 1, 0, 1])) == 0.0
    with pytest.raises(ValueError, match="1 images: leave-one-out needs"):
        own_accuracy(tokens[:1], torch.tensor([0]))


def test_view_likelihood_is_the_plain_mean_log_probability():
    first, second = features(5, 1), features(5, 2)
    expected = 0.0
    for row in range(5):
        cosines = [float(torch.cosine_similarity(first[row], other, dim=0)) / 0.1 for other in second]
        expected += (cosines[row] - math.log(sum(math.exp(value) for value in cosines))) / 5
    assert view_likelihood(first, second) == pytest.approx(expected, rel=1e-5)


def test_view_likelihood_of_a_collapsed_network_is_that_of_a_guess():
    same = torch.ones(7, 3)
    assert view_likelihood(same, same) == pytest.approx(-math.log(7))
    apart = torch.eye(7)
    assert -0.01 < view_likelihood(apart, apart) < 0
    assert view_likelihood(3 * apart, 5 * apart) == pytest.approx(view_likelihood(apart, apart))


def test_views_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"views of shapes \[2, 6\] and \[3, 6\]"):
        view_likelihood(features(2), features(3))
