"""Measures that choose a checkpoint by a run's own images, for sets of a few hundred images.

If a tenth of 300 images is held out, one image changes the accuracy on the held-out images by three points. The
measures in this file have less noise. In runs that helped, they chose better checkpoints than the k-NN accuracy on the
held-out images. In runs that did harm, the accuracy on the own images rose nevertheless, so a run that is measured with
them also watches RankMe (training/watch/sentinels.py; docs/decisions/0032-continue-on-small-sets.md).

Legend: n images, D features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.evaluate.knn import knn_accuracy

KS = (1, 5, 10, 20)
VIEW_TEMPERATURE = 0.1


def own_accuracy(features: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> float:
    """Compute the k-NN accuracy of leave-one-out on a run's own images, held out or not, as a mean over values of k.

    Self-supervised training does not use the labels, so the images that were trained on can be classified too. There
    are ten times as many as held-out images. Values of k above n - 1 count as n - 1.

    Args:
        features: features of the n images, [n, D]; they need not be normalised.
        labels: class numbers, [n].
        ks: values of k, the number of neighbours.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} images: leave-one-out needs at least two")
    accuracy = knn_accuracy(features, labels, features, labels, ks, leave_one_out=True)
    return sum(accuracy.values()) / len(accuracy)


def view_likelihood(first: Tensor, second: Tensor, temperature: float = VIEW_TEMPERATURE) -> float:
    """Compute how surely each held-out image is found by another view of itself. No labels are needed.

    Row i of `first` and `second` [n, D] are features of two views of image i. The result is the mean of log p, where p
    is the probability of the right image in a softmax over the cosines. It is 0 at best, and -ln n if all features are
    equal. It changes with every cosine, so it has less noise than the share of images that are found.

    Raises:
        ValueError: the shapes differ, or there are fewer than two images.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"views of shapes {list(first.shape)} and {list(second.shape)}: give two views of two images")
    similarity = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T  # [n, n]
    return -float(F.cross_entropy(similarity / temperature, torch.arange(len(first), device=first.device)))
