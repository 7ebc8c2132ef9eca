"""The measure of a run: one value, computed on held-out images, that says how good the features are.

The run is stopped if the measure falls too far, the checkpoint with the best value is released, and a run may end early
if no better value appears (training/watch/sentinels.py). `training/measuring.py` computes the measures.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """The measure of a run. Its values are from 0 to 1, and higher values are better.

    `name` is the key in evaluations.jsonl, and `words` names the measure in messages.
    """

    name: str
    words: str


KNN = Measure("knn_cls_10", "the k-NN accuracy on held-out images")
VIEWS = Measure("view_certainty", "view matching on held-out images")
RETRIEVAL = Measure("retrieval", "retrieval of held-out images by another view of them")
OWN = Measure("own_knn", "the k-NN accuracy of leave-one-out on the run's own images")
