"""The losses against the official code's numbers (when they are there) and, always, against slow plain definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from training.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center
from training.schedules import cosine, linear_then_constant
from training.student_teacher import DinoHead

ORACLE = Path(__file__).parents[3] / "shared" / "oracles" / "losses.npz"
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE.exists():
        pytest.skip(f"the official code's outputs are not at {ORACLE}")
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
