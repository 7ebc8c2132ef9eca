"""The losses against the official code's numbers (tests/data/README.md) and against slow plain definitions."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from training.losses import (
    batch_norm_center,
    center_targets,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    sinkhorn_targets,
    softmax_center,
    update_center,
)
from training.schedules import cosine, linear_then_constant
from training.student_teacher import DinoHead

ORACLE = Path(__file__).parents[1] / "data" / "losses.npz"
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def oracle():
    with np.load(ORACLE) as entries:
        return {key: torch.from_numpy(np.asarray(entries[key])) for key in entries}


def check(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.double(), theirs.double(), **(tolerance or CLOSE))


def test_sinkhorn_matches_the_official_code(oracle):
    check(sinkhorn_knopp(oracle["dino/teacher_logits"], 0.07), oracle["dino/sinkhorn_t0.07"])
    check(sinkhorn_knopp(oracle["ibot/teacher_logits_masked"], 0.07), oracle["ibot/sinkhorn_t0.07"])
    sharp = sinkhorn_knopp(oracle["dino/teacher_logits"], 0.04)  # where the official float32 gives NaN
    check(sharp, oracle["dino/sinkhorn_t0.04_in_float64"], rtol=1e-4, atol=1e-6)


def test_softmax_center_matches_the_official_code(oracle):
    logits = oracle["dino/teacher_logits"]
    check(softmax_center(logits, torch.zeros(1, 512), 0.05), oracle["dino/softmax_center_step0_t0.05"])
    center = oracle["dino/center_after_1"]
    check(softmax_center(logits, center, 0.05), oracle["dino/softmax_center_step1_t0.05"])


def test_center_matches_the_official_code(oracle):
    center = update_center(torch.zeros(1, 512), oracle["dino/teacher_logits"])
    check(center, oracle["dino/center_after_1"].view(1, 512))


def test_dino_loss_matches_the_official_code(oracle):
    students = [oracle[f"dino/student_logits_{i}"] for i in range(4)]
    loss = dino_loss(students, oracle["dino/sinkhorn_t0.07"], 0.1)
    check(loss, oracle["dino/loss_sum_over_pairs_sinkhorn_t0.07"])


def test_ibot_loss_matches_the_official_code(oracle):
    loss = ibot_loss(oracle["ibot/student_logits_masked"], oracle["ibot/sinkhorn_t0.07"], oracle["ibot/masks"], 0.1)
    check(loss, oracle["ibot/loss_masked"])


def test_koleo_loss_and_gradient_match_the_official_code(oracle):
    x = oracle["koleo/input"].clone().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    check(loss, oracle["koleo/loss"])
    check(x.grad, oracle["koleo/grad"])


def test_head_matches_the_official_code(oracle):
    prefix = "head/param/"
    head = DinoHead(64, 512, hidden_dim=96, bottleneck_dim=48)
    head.load_state_dict({key.removeprefix(prefix): value for key, value in oracle.items() if key.startswith(prefix)})
    check(head(oracle["head/input"]), oracle["head/output"])


def test_schedule_matches_the_official_code(oracle):
    ours = cosine(4e-3, 1e-6, 1000, warmup=100)
    np.testing.assert_allclose(ours, oracle["schedule/lr_4e-3_1e-6_total1000_warmup100"].numpy(), rtol=1e-12)


def plain_sinkhorn(logits, temp, n_iterations):
    """The definition in float64: scale prototypes, then samples, again and again."""
    q = torch.exp(logits.double() / temp)
    n, k = q.shape
    q = q / q.sum()
    for _ in range(n_iterations):
        for column in range(k):
            q[:, column] = q[:, column] / q[:, column].sum() / k
        for row in range(n):
            q[row] = q[row] / q[row].sum() / n
    return q * n if n_iterations else torch.softmax(logits.double() / temp, dim=1)


@pytest.mark.parametrize("n_iterations", [0, 1, 3])
def test_sinkhorn_is_its_definition(n_iterations):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    check(sinkhorn_knopp(logits, 0.3, n_iterations), plain_sinkhorn(logits, 0.3, n_iterations), rtol=1e-5, atol=1e-7)


def test_sinkhorn_survives_logits_that_overflow_float32():
    probs = sinkhorn_knopp(torch.tensor([[50.0, 0.0, -50.0], [49.0, 3.0, 0.0]]), 0.04)
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(2))


def over_ranks(functions, reduce):
    """Run one function per rank, each given a callable that reduces a tensor over all of them, as threads."""
    barrier, given = threading.Barrier(len(functions)), {}

    def run(rank, function):
        def combine(x):
            given[rank] = x
            barrier.wait(timeout=10)
            result = reduce(torch.stack([given[i] for i in range(len(functions))]))
            barrier.wait(timeout=10)
            return result

        return function(combine)

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, range(len(functions)), functions))


def logsumexp(x):
    return x.logsumexp(dim=0)


def total(x):
    return x.sum(dim=0)


def teacher_logits(rows=12, k=9):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(5)) * 2


def test_sinkhorn_of_micro_batches_and_ranks_is_that_of_the_whole_batch():
    logits = teacher_logits()
    expected = sinkhorn_knopp(logits, 0.2)
    parts = logits.split([4, 0, 8])
    check(torch.cat(sinkhorn_knopp(parts, 0.2)), expected)
    ranks = [[logits[:3], logits[3:4]], [logits[:0]], [logits[4:]]]  # one has nothing
    functions = [lambda combine, parts=parts: torch.cat(sinkhorn_knopp(parts, 0.2, combine=combine)) for parts in ranks]
    check(torch.cat(over_ranks(functions, logsumexp)), expected)


def test_sinkhorn_keeps_the_shape_and_its_input():
    logits = teacher_logits()
    before = logits.clone()
    probs = sinkhorn_knopp(logits.view(2, 6, 9), 0.2)
    check(probs, sinkhorn_knopp(logits, 0.2).view(2, 6, 9))
    assert torch.equal(logits, before)


def test_sinkhorn_of_samples_and_prototypes_on_far_apart_levels():
    logits = teacher_logits() + torch.arange(12.0).unsqueeze(1) * 20 - torch.arange(9.0) * 30
    exact = logits.double() / 0.04
    u = torch.zeros(12, 1)
    for _ in range(3):
        v = (exact - u).logsumexp(0, keepdim=True)
        u = (exact - v).logsumexp(1, keepdim=True)
    check(sinkhorn_knopp(logits, 0.04), (exact - u - v).exp(), rtol=2e-3, atol=1e-6)  # scores to 6,000 in float32


def test_sinkhorn_in_pieces(monkeypatch):
    expected = sinkhorn_knopp(teacher_logits(k=700), 0.2)
    for module in ("losses", "kernels"):
        monkeypatch.setattr(f"training.{module}.chunk_elements", lambda device: 2000)  # 2 rows, or 256 columns
    check(sinkhorn_knopp(teacher_logits(k=700), 0.2), expected)


def test_sinkhorn_without_rows():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).shape == (0, 5)
    targets = sinkhorn_targets([torch.zeros(0, 5)], 0.1)[0]
    assert float(ibot_loss(torch.zeros(0, 5), targets, torch.zeros(3, 4, dtype=torch.bool), 0.1)) == 0


@pytest.mark.parametrize("n_iterations", [0, 1, 3])
def test_targets_left_as_logits_are_the_same(n_iterations):
    logits = teacher_logits().view(2, 6, 9)
    parts = [logits[:, :2], logits[:, 2:]]
    for written, left in zip(
        sinkhorn_knopp(parts, 0.1, n_iterations), sinkhorn_targets(parts, 0.1, n_iterations), strict=True
    ):
        check(left.probs(), written)
        student = torch.randn(3, written.shape[1], 9)
        check(dino_loss(student, left, 0.1), dino_loss(student, written, 0.1))
        check(dino_loss(student, left[1], 0.1), dino_loss(student, written[1], 0.1))
    center = teacher_logits(1)
    check(center_targets(logits, center, 0.1).probs(), softmax_center(logits, center, 0.1))


def test_center_of_micro_batches_and_ranks():
    logits, center = teacher_logits(), teacher_logits(1)
    expected = 0.8 * center + 0.2 * logits.mean(dim=0)
    check(update_center(center, logits.view(3, 4, 9), 0.8), expected)
    ranks = [[logits[:3], logits[3:4]], [logits[:0]], [logits[4:]]]
    functions = [lambda add, parts=parts: update_center(center, parts, 0.8, sum_over_ranks=add) for parts in ranks]
    for result in over_ranks(functions, total):
        check(result, expected)
    assert torch.equal(update_center(center, logits[:0]), center)


def test_batch_norm_center_is_its_definition():
    logits = teacher_logits() * torch.arange(1.0, 10) + 5
    mean_variance = float(logits.double().var(dim=0, correction=0).mean())
    normed = torch.nn.functional.batch_norm(logits.double(), None, None, training=True, eps=1e-5 * mean_variance)
    check(batch_norm_center(logits, 0.7), (normed * mean_variance**0.5 / 0.7).softmax(dim=-1), rtol=1e-4, atol=1e-6)
    expected = batch_norm_center(logits, 0.7)
    ranks = [[logits[:3], logits[3:4]], [logits[:0]], [logits[4:]]]
    functions = [
        lambda add, parts=parts: torch.cat(batch_norm_center(parts, 0.7, sum_over_ranks=add)) for parts in ranks
    ]
    check(torch.cat(over_ranks(functions, total)), expected)


def test_batch_norm_center_does_not_depend_on_level_and_scale():
    logits = teacher_logits()
    moved = batch_norm_center(logits * 0.01 + torch.arange(9.0) * 0.01, 0.001)
    check(moved, batch_norm_center(logits, 0.1), rtol=1e-3, atol=1e-6)


def test_batch_norm_center_of_a_batch_that_does_not_vary_is_uniform():
    for rows in (1, 4):
        check(batch_norm_center(torch.arange(8.0).expand(rows, 8), 0.05), torch.full((rows, 8), 1 / 8))


def test_dino_loss_is_its_definition():
    generator = torch.Generator().manual_seed(1)
    students = torch.randn(3, 5, 8, generator=generator)
    teachers = torch.randn(2, 5, 8, generator=generator).softmax(-1)
    expected = 0.0
    for student in students:
        for teacher in teachers:
            per_image = [
                -sum(float(p) * float(q) for p, q in zip(t, torch.log_softmax(s / 0.1, 0), strict=True))
                for s, t in zip(student, teacher, strict=True)
            ]
            expected += sum(per_image) / len(per_image)
    assert math.isclose(float(dino_loss(students, teachers, 0.1)), expected, rel_tol=1e-5)
    assert math.isclose(float(dino_loss(list(students), list(teachers), 0.1)), expected, rel_tol=1e-5)


def test_dino_loss_of_a_collapsed_network_is_ln_k():
    loss = dino_loss(torch.zeros(4, 64), torch.full((4, 64), 1 / 64), 0.1)
    assert math.isclose(float(loss), math.log(64), rel_tol=1e-6)


def test_ibot_loss_is_its_definition():
    generator = torch.Generator().manual_seed(2)
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    student = torch.randn(5, 6, generator=generator)
    teacher = torch.randn(5, 6, generator=generator).softmax(-1)
    patch = -(teacher * torch.log_softmax(student / 0.1, -1)).sum(-1)
    expected = (patch[:2].mean() + patch[2:].mean()) / 3  # the unmasked image counts in the denominator
    torch.testing.assert_close(ibot_loss(student, teacher, masks, 0.1), expected)


def test_ibot_loss_without_any_mask_is_zero():
    masks = torch.zeros(3, 4, dtype=torch.bool)
    assert float(ibot_loss(torch.zeros(0, 6), torch.zeros(0, 6), masks, 0.1)) == 0


def test_ibot_loss_with_the_places_given():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    student, teacher = torch.randn(5, 6), torch.randn(5, 6).softmax(-1)
    places = masks.flatten().nonzero().squeeze(1)
    expected = ibot_loss(student, teacher, masks, 0.1)
    torch.testing.assert_close(ibot_loss(student, teacher, masks, 0.1, selected=places), expected)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = ibot_loss(student[order], teacher[order], masks, 0.1, selected=places[order])
    torch.testing.assert_close(shuffled, expected)


def test_losses_under_autocast_are_float32():
    student, teacher = torch.randn(4, 33), torch.randn(4, 33).softmax(-1)
    expected = dino_loss(student, teacher, 0.1), sinkhorn_knopp(teacher, 0.1), koleo_loss(student)
    with torch.autocast("cpu", torch.bfloat16):
        found = dino_loss(student, teacher, 0.1), sinkhorn_knopp(teacher, 0.1), koleo_loss(student)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_koleo_loss_over_ranks_is_that_of_all_rows():
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(4)).requires_grad_()
    koleo_loss(whole).backward()
    ranks = [(0, 3), (3, 7)]
    rows = whole.detach().clone().requires_grad_()
    losses = [koleo_loss(rows[start:end], rows, start) for start, end in ranks]
    loss = (3 * losses[0] + 4 * losses[1]) / 7
    loss.backward()
    torch.testing.assert_close(loss, koleo_loss(whole))
    torch.testing.assert_close(rows.grad, whole.grad)


def test_koleo_loss_of_one_row_is_zero_and_of_rows_not_in_the_pool_an_error():
    assert float(koleo_loss(torch.ones(1, 3))) == 0
    assert float(koleo_loss(torch.ones(1, 3), torch.eye(3), 1)) != 0
    with pytest.raises(ValueError, match="offset=2: the pool has 3 rows, too few for 2 rows from this offset"):
        koleo_loss(torch.ones(2, 3), torch.ones(3, 3), 2)


def test_koleo_loss_is_its_definition():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    unit = [row / row.norm() for row in x]
    distances = [min(float((a - b).norm()) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    assert math.isclose(float(koleo_loss(x)), -sum(map(math.log, distances)) / 6, rel_tol=1e-4)


def test_koleo_loss_of_duplicates_is_finite_even_from_half_precision():
    x = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_schedules():
    lr = cosine(1.0, 0.1, 20, warmup=5)
    assert len(lr) == 20
    assert lr[0] == 0
    assert lr[4] == lr[5] == 1.0
    assert np.all(np.diff(lr[5:]) < 0)
    assert list(linear_then_constant(0.0, 1.0, 5, 3)) == [0.0, 0.5, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="does not fit"):
        cosine(1.0, 0.1, 4, warmup=5)
