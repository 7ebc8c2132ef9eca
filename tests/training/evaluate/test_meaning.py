"""Figures that would be the same for every model, against all that models could answer; numbers that are not finite."""

from itertools import product

import pytest
import torch

from training.evaluate.knn import knn_accuracy, neighbours_for, with_labels
from training.evaluate.linear import ProbeSettings, evaluate_linear
from training.evaluate.logistic import FitSettings, evaluate_logistic, fit_logistic
from training.evaluate.meaning import (
    NoMeaning,
    check_classification,
    check_finite,
    check_leave_one_out,
    few_val_images,
    not_finite,
    usable_ks,
)
from training.evaluate.retrieval import score, score_classes


def has_meaning(check, *args):
    try:
        check(*args)
    except NoMeaning:
        return False
    return True


@pytest.mark.parametrize("train", [[0], [0, 0], [0, 1], [1, 1, 2], [0, 1, 2]])
def test_a_classification_means_something_if_two_classifiers_can_differ(train):
    """A classifier may answer any class of train for each image of val."""
    for val in [*product(range(4), repeat=1), *product(range(4), repeat=2)]:
        answers = product(set(train), repeat=len(val))
        accuracies = {sum(a == b for a, b in zip(answer, val, strict=True)) for answer in answers}
        assert has_meaning(check_classification, torch.tensor(train), torch.tensor(val)) == (len(accuracies) > 1)


def test_leave_one_out_means_something_if_two_classifiers_can_differ():
    """A classifier may answer the class of any other image."""
    for labels in [x for n in (1, 2, 3, 4) for x in product(range(3), repeat=n)]:
        answers = product(*({c for j, c in enumerate(labels) if j != i} for i in range(len(labels))))
        accuracies = {sum(a == b for a, b in zip(answer, labels, strict=True)) for answer in answers}
        assert has_meaning(check_leave_one_out, torch.tensor(labels)) == (len(accuracies) > 1), labels


@pytest.mark.parametrize("seed", range(8))
def test_recall_is_left_out_exactly_if_every_ranking_has_the_same(seed):
    """Each query may rank the database in any order."""
    g = torch.Generator().manual_seed(seed)
    n, ks = 5, (1, 2, 3, 4, 5, 9)
    relevant, ignored = [], []
    for _ in range(2):
        order = torch.randperm(n, generator=g)
        n_relevant = int(torch.randint(0, 4, (1,), generator=g))
        n_ignored = int(torch.randint(0, n - n_relevant, (1,), generator=g))
        relevant.append(order[:n_relevant])
        ignored.append(order[n_relevant : n_relevant + n_ignored])
    if not any(map(len, relevant)):
        relevant[0] = torch.tensor([i for i in range(n) if i not in ignored[0]][:1])
    scored = [(len(r), n - len(r) - len(i)) for r, i in zip(relevant, ignored, strict=True) if len(r)]
    # In the worst ranking of a query, the relevant images are the last; in the best, they are the first.
    differ = {k for k in ks if any(others >= k for _, others in scored)}
    if not any(others for _, others in scored):
        with pytest.raises(NoMeaning, match="ranks only relevant images: every model would score 100 %"):
            score(torch.eye(2, 3), torch.rand(n, 3, generator=g), relevant, ignored, ks=ks)
        return
    found = score(torch.eye(2, 3), torch.rand(n, 3, generator=g), relevant, ignored, ks=ks)
    assert set(found.recall) == differ
    assert len(found.notes) == (len(differ) < len(ks))


def test_retrieval_of_a_single_class_is_refused():
    with pytest.raises(NoMeaning, match="each of the 4 queries ranks only relevant images"):
        score_classes(torch.eye(4), torch.zeros(4, dtype=torch.long))


def test_a_map_without_any_usable_k_is_still_a_figure():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    found = score_classes(features, torch.tensor([0, 0, 1]), ks=(5, 10))
    assert found.recall == {}
    assert found.mean_ap == 1.0
    assert found.notes[0].startswith("recall@k for k=5 and 10 is left out: a query ranks at most 1 images")


def test_values_of_k_above_the_number_of_neighbours_are_named():
    assert usable_ks((1, 10), 10, figure="f", reason="r") == ((1, 10), [])
    assert usable_ks((5, 20, 100, 200), 12, figure="f", reason="r") == (
        (5,),
        ["f for k=20, 100 and 200 is left out: r"],
    )
    assert neighbours_for((1, 20), 12) == ((1,), ["k-NN for k=20 is left out: an image has only 12 neighbours"])
    with pytest.raises(NoMeaning, match="k=20 and 30 is left out: an image has only 12 neighbours, and no other k"):
        neighbours_for((20, 30), 12)


def test_a_val_set_smaller_than_the_number_of_classes_is_noted():
    assert few_val_images(81, 81) == []
    assert few_val_images(8, 81) == [
        "val has 8 images for 81 classes: at least 73 classes are not tested, and one image changes the accuracy by "
        "12.5 percentage points"
    ]


def test_a_tensor_that_is_not_finite_is_named_with_the_number_of_its_values():
    fine = {"a": torch.ones(3), "b": torch.arange(4)}
    assert not_finite(fine) is None
    broken = fine | {"c": torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])}
    assert not_finite(broken) == "c contains 3 of 4 values that are NaN or infinite"
    with pytest.raises(ValueError, match="c contains 3 of 4 values"):
        check_finite(**broken)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_evaluations_of_features_refuse_values_that_are_not_finite(bad):
    features, labels = torch.rand(8, 3), torch.arange(8) % 2
    broken = features.clone()
    broken[5, 1] = bad
    with pytest.raises(ValueError, match="test contains 1 of 24 values that are NaN or infinite"):
        knn_accuracy(features, labels, broken, labels, [1])
    with pytest.raises(ValueError, match="train contains 1 of 24 values"):
        knn_accuracy(broken, labels, features, labels, [1])
    with pytest.raises(ValueError, match="queries contains 1 of 24 values"):
        score_classes(broken, labels)
    with pytest.raises(FloatingPointError, match="logistic regression with C=1 failed: weight contains"):
        fit_logistic(broken, labels, 1.0, 2)
    with pytest.raises(FloatingPointError, match="all 2 heads of the linear probe have weights that are NaN"):
        evaluate_linear(
            torch.cat((broken, broken), dim=1),
            labels,
            torch.cat((features, features), dim=1),
            labels,
            depth=1,
            settings=ProbeSettings(lrs=(0.1,), blocks=(1,), iterations=3),
        )


def test_a_head_that_diverged_has_no_accuracy_and_is_listed():
    """At the larger rate, the product of weights and features exceeds the range of float32."""
    features, labels = 1e18 * torch.rand(20, 4), torch.arange(20) % 2
    settings = ProbeSettings(lrs=(1e-30, 1e20), blocks=(1,), avgpools=(False,), iterations=20)
    report = evaluate_linear(features, labels, features, labels, depth=1, settings=settings)
    assert [head.lr for head in report.accuracy] == [1e-30]
    assert [head.lr for head in report.diverged] == [1e20]
    assert report.best.lr == 1e-30


def test_probes_refuse_what_says_nothing():
    features = torch.rand(10, 4)
    one, two, others = torch.zeros(10, dtype=torch.long), torch.arange(10) % 2, 2 + torch.arange(10) % 2
    few = ProbeSettings(blocks=(1,), lrs=(0.1,), iterations=1, batch_size=2)
    for probe in (evaluate_logistic, lambda *args: evaluate_linear(*args, depth=1, settings=few)):
        with pytest.raises(NoMeaning, match="the 10 images of train have 1 class"):
            probe(features, one, features, two)
        with pytest.raises(NoMeaning, match="no class of the 10 images of val is among the 2 classes of train"):
            probe(features, two, features, others)
    with pytest.raises(NoMeaning, match="val has no image with a label"):
        evaluate_logistic(features, two, features[:0], two[:0])


def test_the_penalty_of_logistic_regression_is_not_chosen_without_a_common_class():
    features, alone = torch.rand(6, 4), torch.arange(6)  # each image is alone in its class
    with pytest.raises(NoMeaning, match="no class of the 2 images of the part of train to choose C is among the 4"):
        evaluate_logistic(features, alone, features, alone, fit=FitSettings(held_out_share=0.34))


class Image:
    def __init__(self, label):
        self.label = label


def test_images_without_a_label_are_counted():
    images = [Image("a"), Image(None), Image("b"), Image(None)]
    assert with_labels(images, "train") == (
        [images[0], images[2]],
        ["2 of 4 images of train have no label and are left out"],
    )
    assert with_labels(images[::2], "train") == (images[::2], [])
