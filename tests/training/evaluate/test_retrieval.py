"""Average precision and the junk rule against plain loops, hand-made rankings, the ground truth's mistakes."""

import json

import pytest
import torch
import torch.nn.functional as F

from training.evaluate.meaning import NoMeaning
from training.evaluate.retrieval import (
    GroundTruth,
    Query,
    average_precision,
    positions_without,
    read_ground_truth,
    score,
    score_classes,
    score_setup,
)


def plain_ap(ranking, relevant, ignored, rule):
    """Walk down the ranking; junk is passed over as if it were not there."""
    found = place = 0
    area = 0.0
    for item in ranking:
        if item in ignored:
            continue
        if item in relevant:
            before = found / place if place else 1.0
            found += 1
            at = found / (place + 1)
            area += (before + at) / 2 if rule == "trapezoid" else at
        place += 1
    return area / len(relevant)


def test_average_precision_by_hand():
    assert average_precision(torch.tensor([0, 1]), 2) == 1.0
    # relevant at places 2 and 4 of 1, 2, 3, 4: precision 0, then 1/2; 1/3, then 2/4
    assert average_precision(torch.tensor([1, 3]), 2) == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
    assert average_precision(torch.tensor([1, 3]), 2, "mean") == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision(torch.tensor([0]), 4) == 0.25  # three are never found


def test_ignored_photos_leave_the_ranking():
    relevant = torch.tensor([False, True, False, True])
    ignored = torch.tensor([True, False, True, False])
    assert positions_without(relevant, ignored).tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["trapezoid", "mean"])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_score_is_its_definition(rule, block_bytes):
    g = torch.Generator().manual_seed(0)
    queries, database = torch.randn(6, 4, generator=g), torch.randn(25, 4, generator=g)
    relevant, ignored = [], []
    for i in range(6):
        order = torch.randperm(25, generator=g)
        relevant.append(order[: i + 1] if i else order[:0])  # the first query has none and does not count
        ignored.append(order[10 : 10 + i])
    found = score(queries, database, relevant, ignored, ks=(1, 3), rule=rule, block_bytes=block_bytes)
    aps, hits = [], {1: 0, 3: 0}
    for i in range(1, 6):
        cosine = [float(F.cosine_similarity(queries[i], row, dim=0)) for row in database]
        ranking = sorted(range(25), key=lambda j: -cosine[j])
        good, out = set(relevant[i].tolist()), set(ignored[i].tolist())
        aps.append(plain_ap(ranking, good, out, rule))
        left = [j for j in ranking if j not in out]
        for k in hits:
            hits[k] += bool(good & set(left[:k]))
    assert found.queries == 5
    assert found.mean_ap == pytest.approx(sum(aps) / 5)
    assert found.recall == {k: pytest.approx(n / 5) for k, n in hits.items()}


def line(*angles):
    angles = torch.tensor(angles)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_the_setups_of_revisited_oxford_and_paris():
    """One query at angle 0; the database by rising angle: junk, hard, other, easy, other."""
    truth = GroundTruth(
        queries=[Query(image="q", easy=["e"], hard=["h"], junk=["j"])], database=["j", "h", "o1", "e", "o2"]
    )
    queries, database = line(0.0), line(0.1, 0.2, 0.3, 0.4, 0.5)
    easy = score_setup(truth, "easy", queries, database)  # left: o1, e, o2
    assert easy.mean_ap == pytest.approx((0 + 1 / 2) / 2)
    assert easy.recall == {1: 0.0}  # two images are not relevant, so any order has a relevant one among the first 5
    assert easy.notes == [
        "recall@k for k=5 and 10 is left out: a query ranks at most 2 images that are not relevant, so every model "
        "would score 100 %"
    ]
    medium = score_setup(truth, "medium", queries, database)  # left: h, o1, e, o2
    assert medium.mean_ap == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    hard = score_setup(truth, "hard", queries, database)  # left: h, o1, o2
    assert hard.mean_ap == 1.0
    only_junk = GroundTruth(queries=[Query(image="q", junk=["j"])], database=["j"])
    with pytest.raises(NoMeaning, match="no query has a relevant image"):
        score_setup(only_junk, "easy", queries, database[:1])


@pytest.mark.parametrize(("relevant", "ap"), [(0, 1.0), (1, 0.5), (2, 1 / 3)])
def test_equal_database_images_rank_in_the_order_of_the_database(relevant, ap):
    found = score(line(0.0), line(0.3, 0.3, 0.3, 1.0), [torch.tensor([relevant])], [torch.tensor([3])], rule="mean")
    assert found.mean_ap == pytest.approx(ap)


def test_recall_at_k_looks_at_k_places():
    database = line(0.1, 0.2, 0.3, 0.4)
    found = score(line(0.0), database, [torch.tensor([2])], [torch.tensor([], dtype=torch.long)], ks=(1, 2, 3))
    assert found.recall == {1: 0.0, 2: 0.0, 3: 1.0}


def test_class_folders_leave_the_query_out():
    features = line(0.0, 0.1, 1.0, 1.1, 3.0)
    found = score_classes(features, torch.tensor([0, 0, 1, 1, 2]))  # the last has no mate
    assert (found.mean_ap, found.recall[1], found.queries) == (1.0, 1.0, 4)
    found = score_classes(features[:4], torch.tensor([0, 1, 0, 1]))
    assert found.recall == {1: 0.0}
    with pytest.raises(ValueError, match="no query has a relevant image"):
        score_classes(features, torch.arange(5))


def test_class_folders_take_the_plain_mean_of_the_precision():
    # The mates of the outer two come second, those of the inner two third; by the trapezoid rule it is half of that.
    found = score_classes(line(0.0, 0.1, 0.21, 0.29), torch.tensor([0, 1, 0, 1]), ks=(1, 2))
    assert found.mean_ap == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found.recall == {1: 0.0, 2: 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a ground truth"),
        (json.dumps({"queries": [], "database": ["a"]}), "1 or more entries"),
        (json.dumps({"queries": [{"image": "q", "easi": []}], "database": ["a"]}), "easi=.*: is unknown here"),
        (json.dumps({"queries": [{"image": "q"}], "database": ["a", "a"]}), "names an image twice"),
        (
            json.dumps({"queries": [{"image": "q", "box": [0, 0, 1, 1, 1]}], "database": ["a"]}),
            r"queries.0.box=.*: must have 4 or fewer entries$",
        ),
        (
            json.dumps({"queries": [{"image": "q", "box": [0, 0, 1, float("nan")]}], "database": ["a"]}),
            r"queries.0.box.3=nan: must be a finite number$",
        ),
        (json.dumps({"queries": [{"image": "q", "easy": ["b"]}], "database": ["a"]}), "not in the database, e.g. b"),
        (
            json.dumps({"queries": [{"image": "q", "easy": ["a"], "junk": ["a"]}], "database": ["a"]}),
            "labels an image twi",
        ),
    ],
)
def test_ground_truth_mistakes(tmp_path, text, words):
    path = tmp_path / "truth.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_ground_truth(path)
    with pytest.raises(ValueError, match="No such file"):
        read_ground_truth(tmp_path / "other.json")
