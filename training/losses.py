"""DINOv2's three losses and the three ways to turn teacher logits into targets.

DINO (arXiv 2104.14294) makes crops of one image agree on a soft assignment to K prototypes. iBOT (arXiv 2111.07832)
does the same for each masked patch. KoLeo (arXiv 1806.03198) pushes the embeddings in a batch apart. The losses are
defined as in facebookresearch/dinov2, `dinov2/loss/`, but two details of the computation differ. All losses are
computed in float32, regardless of the network's precision. Sinkhorn-Knopp uses logarithms in its first round, because
`exp(logit / 0.04)` overflows float32 if a logit is larger than about 3.5.

A batch may be a list of micro-batches and may be spread over ranks. Operations over ranks are passed in as callables,
so this module does not depend on how ranks communicate. Every rank must call these operations the same number of times,
even if it has no masked patch.

Legend: B images, K prototypes, N patches per image, M masked patches of the batch, S student views, T teacher views,
D width of an embedding.
"""

from collections.abc import Callable, Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from training.kernels import chunk_elements, soft_cross_entropy
from training.teacher_targets import TeacherTargets

EPS = 1e-8
LEAST_VARIANCE = 1e-5  # added to a prototype's variance, as a share of the mean variance over prototypes
OverRanks = Callable[[Tensor], Tensor]
"""A function that combines the tensors of all ranks and returns the same result on every rank."""


def _alone(x: Tensor) -> Tensor:
    return x


@overload
def sinkhorn_knopp(
    logits: Tensor, temp: float, n_iterations: int = 3, *, combine: OverRanks | None = None
) -> Tensor: ...
@overload
def sinkhorn_knopp(
    logits: Sequence[Tensor], temp: float, n_iterations: int = 3, *, combine: OverRanks | None = None
) -> list[Tensor]: ...
@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor | Sequence[Tensor], temp: float, n_iterations: int = 3, *, combine: OverRanks | None = None
) -> Tensor | list[Tensor]:
    """Compute teacher targets with Sinkhorn-Knopp, so that a batch uses all prototypes about equally often.

    The matrix Q = exp(logits / temp) has B rows, one per sample, and K columns, one per prototype. Each of the
    `n_iterations` rounds divides every column by its sum and by K, and then every row by its sum and by B. At the end,
    each row is scaled to sum to one. Together, these divisions multiply each row and each column by one factor, so the
    logarithm of the result is logits / temp - u[sample] - v[prototype], and a round only has to update the vectors u
    and v. The constants K and B cancel when the rows are scaled at the end.

    Args:
        logits: the teacher's logits [..., K] of any float type, or a sequence of such tensors, one for each
            micro-batch. All micro-batches are scaled as one batch. A micro-batch may be empty.
        temp: the teacher's temperature.
        n_iterations: the number of rounds, which is 3 in the paper.
        combine: a function that computes the log-sum-exp of a float32 tensor [1, K] over the ranks.

    Returns:
        the targets, float32 [..., K], with rows that sum to one, or a list of such tensors if `logits` is a sequence.
    """
    batches = [logits] if isinstance(logits, Tensor) else logits
    pieces, _, row_factors, _, column_factor = _scale(batches, temp, n_iterations, combine or _alone)
    for piece, factor in zip(pieces, row_factors, strict=True):
        for rows, factors in zip(_row_chunks(piece), _row_chunks(factor, piece.shape[1]), strict=True):
            rows.mul_(factors).mul_(column_factor)
    probs = [piece.view(batch.shape) for piece, batch in zip(pieces, batches, strict=True)]
    return probs[0] if isinstance(logits, Tensor) else probs


@torch.no_grad()
def sinkhorn_targets(
    logits: Sequence[Tensor], temp: float, n_iterations: int = 3, *, combine: OverRanks | None = None
) -> list[TeacherTargets]:
    """Compute the targets of `sinkhorn_knopp` in a compact form, without storing the array of targets.

    The arguments are the same as for `sinkhorn_knopp`, but `logits` must be a sequence of micro-batches [..., K] for K
    prototypes.

    Returns:
        for each micro-batch, the logits [..., K], u [...] (one value per sample) and v [K] (one value per prototype).
        The targets are exp(logits / temp - u - v).
    """
    _, us, row_factors, v, column_factor = _scale(logits, temp, n_iterations, combine or _alone)
    v = (v - column_factor.log())[0]  # [K]
    return [
        TeacherTargets(batch, (u - factor.log()).view(batch.shape[:-1]), v, temp)
        for batch, u, factor in zip(logits, us, row_factors, strict=True)
    ]


def _scale(
    batches: Sequence[Tensor], temp: float, n_iterations: int, combine: OverRanks
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Run the rounds of Sinkhorn-Knopp on micro-batches [..., K], each of which is flattened to b rows [b, K].

    The first round uses logarithms, because the logits of different samples may differ by thousands. It computes v, the
    log of the sum of each column of exp(logits / temp), and u, the maximum of logits / temp - v in each row. It then
    stores the matrix P = exp(logits / temp - u - v). The largest value in each row of P is 1, so values that underflow
    are negligible. The first row factors scale each row of P to sum to one. Each further round only multiplies P by
    vectors: it updates the column factors, and then the row factors.

    Returns:
        five values. The first three are lists with one tensor for each micro-batch: P [b, K], u [b, 1] and the row
        factors [b, 1]. The last two are v [1, K] and the column factors [1, K], which all micro-batches share. The
        targets are row factor * P * column factor.
    """
    batches = [batch.flatten(0, -2) for batch in batches]
    k, device = batches[0].shape[1], batches[0].device
    with torch.autocast(device.type, enabled=False):
        v = torch.zeros(1, k, device=device)
        if n_iterations > 0:
            v = combine(torch.stack([_column_logsumexp(batch, temp) for batch in batches]).logsumexp(dim=0))
        pieces = [torch.empty(batch.shape, device=device) for batch in batches]
        us, row_factors = [], []
        for batch, piece in zip(batches, pieces, strict=True):
            chunks = list(zip(_row_chunks(batch), _row_chunks(piece), strict=True))
            tops = [torch.div(x.float(), temp, out=p).sub_(v).amax(dim=1, keepdim=True) for x, p in chunks]
            sums = [p.sub_(top).exp_().sum(dim=1, keepdim=True) for (_, p), top in zip(chunks, tops, strict=True)]
            us.append(torch.cat(tops))
            row_factors.append(torch.cat(sums).reciprocal_())
        column_factor = torch.ones_like(v)
        for _ in range(n_iterations - 1):
            total = torch.zeros_like(v)
            for piece, factor in zip(pieces, row_factors, strict=True):
                total += factor.T @ piece
            column_factor = (v - combine(v + total.log())).exp()
            row_factors = [(piece @ column_factor.T).reciprocal_() for piece in pieces]
    return pieces, us, row_factors, v, column_factor


def _row_chunks(x: Tensor, columns: int = 0) -> Sequence[Tensor]:
    """Split `x` into chunks of at most `chunk_elements` / `columns` rows, but at least one row.

    If `columns` is 0, the number of columns of `x` is used instead.
    """
    return torch.split(x, max(1, chunk_elements(x.device) // (columns or x.shape[1])))


def _column_logsumexp(batch: Tensor, temp: float) -> Tensor:
    """Compute the log of the sum of exp(batch / temp) over the rows of `batch` [b, K], and return it as float32 [1, K].

    The result is -inf if `batch` has no rows.
    """
    columns = max(256, chunk_elements(batch.device) // max(1, len(batch)))
    return torch.cat(
        [(x.float() / temp).logsumexp(dim=0, keepdim=True) for x in torch.split(batch, columns, dim=1)], dim=1
    )


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Compute DINO's targets softmax((logits - center) / temp) over K prototypes, float32 [..., K]."""
    return ((logits.float() - center) / temp).softmax(dim=-1)


@torch.no_grad()
def center_targets(logits: Tensor, center: Tensor, temp: float) -> TeacherTargets:
    """Compute the targets of `softmax_center` in a compact form, without storing the array of targets.

    Returns:
        the logits [..., K] for K prototypes, u [...] (one value per sample) and v [K] (one value per prototype). The
        targets are exp(logits / temp - u - v).
    """
    v = center.flatten() / temp  # [K]
    rows = _row_chunks(logits.flatten(0, -2))
    u = torch.cat([(x.float() / temp).sub_(v).logsumexp(dim=1) for x in rows])
    return TeacherTargets(logits, u.view(logits.shape[:-1]), v, temp)


@torch.no_grad()
def update_center(
    center: Tensor,
    logits: Tensor | Sequence[Tensor],
    momentum: float = 0.9,
    *,
    sum_over_ranks: OverRanks | None = None,
) -> Tensor:
    """Compute the next moving centre: momentum * center + (1 - momentum) * mean of the batch (DINO, section 3.1).

    Args:
        center: the current centre, float32 [1, K] for K prototypes. It is zero at the first step.
        logits: the teacher's logits [..., K], or a sequence of such tensors, one for each micro-batch. If there are no
            rows on any rank, the centre does not change.
        momentum: the weight of the current centre.
        sum_over_ranks: a function that computes the sum of a float32 vector over the ranks.

    Returns:
        the next centre, float32 [1, K].
    """
    mean, count = _batch_mean([logits] if isinstance(logits, Tensor) else logits, sum_over_ranks or _alone)
    return torch.where(count > 0, center.lerp(mean, 1 - momentum), center)


@overload
def batch_norm_center(logits: Tensor, temp: float, *, sum_over_ranks: OverRanks | None = None) -> Tensor: ...
@overload
def batch_norm_center(
    logits: Sequence[Tensor], temp: float, *, sum_over_ranks: OverRanks | None = None
) -> list[Tensor]: ...
@torch.no_grad()
def batch_norm_center(
    logits: Tensor | Sequence[Tensor], temp: float, *, sum_over_ranks: OverRanks | None = None
) -> Tensor | list[Tensor]:
    """Compute teacher targets by batch normalisation of the teacher's logits, which replaces the moving centre.

    The logits of each prototype are normalised to mean 0 and variance 1 over the batch, as in arXiv 1502.03167 (with
    the biased variance), but without a learned scale and shift. The DINO papers do not define this method. Here all
    logits are also multiplied by the square root of the variance averaged over the prototypes, so that the temperature
    has the same effect as with Sinkhorn-Knopp and the moving centre. `LEAST_VARIANCE` times this average is added to
    each variance. Without this, logits that hardly vary over the batch would be amplified. A fixed constant would not
    work, because the scale of the logits is not known in advance.

    Args:
        logits: the teacher's logits [..., K] for K prototypes, of any float type, or a sequence of such tensors, one
            for each micro-batch. All micro-batches are normalised as one batch.
        temp: the teacher's temperature.
        sum_over_ranks: a function that computes the sum of a float32 vector over the ranks. It is called twice.

    Returns:
        the targets, float32 [..., K], with rows that sum to one, or a list of such tensors if `logits` is a sequence.
    """
    batches = [logits] if isinstance(logits, Tensor) else logits
    total = sum_over_ranks or _alone
    mean, count = _batch_mean(batches, total)
    squares = [(batch.flatten(0, -2).float() - mean).square_().sum(dim=0) for batch in batches]
    variance = total(torch.stack(squares).sum(dim=0)) / count.clamp(min=1)  # [K]
    mean_variance = variance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    scale = (variance / mean_variance + LEAST_VARIANCE).rsqrt_().div_(temp)
    probs = [(batch.float() - mean).mul_(scale).softmax(dim=-1) for batch in batches]
    return probs[0] if isinstance(logits, Tensor) else probs


def _batch_mean(batches: Sequence[Tensor], total: OverRanks) -> tuple[Tensor, Tensor]:
    """Compute the mean of the rows [K] in all micro-batches [..., K] on all ranks.

    Returns:
        two values: the mean, float32 [1, K] (0 if there are no rows), and the number of rows as a scalar tensor.
    """
    rows = [batch.flatten(0, -2).float() for batch in batches]
    count = rows[0].new_full((1,), sum(map(len, rows)))
    sums = total(torch.cat([torch.stack([x.sum(dim=0) for x in rows]).sum(dim=0), count]))  # [K + 1]
    return (sums[:-1] / sums[-1].clamp(min=1)).unsqueeze(0), sums[-1]


def dino_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_probs: Tensor | Sequence[Tensor] | TeacherTargets,
    student_temp: float,
) -> Tensor:
    """Compute DINO's loss: the cross-entropy of every student view with every teacher view.

    The loss is summed over the pairs of views and averaged over images.

    Args:
        student_logits: the student's logits for B images and K prototypes: [B, K] for one view, and [S, B, K] or a
            sequence of S tensors [B, K] for S views.
        teacher_probs: the teacher's targets p: [B, K] for one view, and [T, B, K] or a sequence of T tensors [B, K] for
            T views. Each row sums to one.
        student_temp: the student's temperature.

    Returns:
        a scalar. For each of the S x T pairs, -sum_k p log softmax(logits / student_temp) is averaged over the B
        images, and these averages are summed.
    """
    student = student_logits if isinstance(student_logits, Tensor) else torch.stack(list(student_logits))
    targets = teacher_probs if isinstance(teacher_probs, Tensor | TeacherTargets) else torch.stack(list(teacher_probs))
    cross = soft_cross_entropy(student.flatten(0, -2), targets, student_temp)  # [S * B]
    return cross.sum() / student.shape[-2]


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor | TeacherTargets,
    masks: Tensor,
    student_temp: float,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """Compute iBOT's loss: the mean cross-entropy of each image's masked patches, averaged over the images.

    An image without masked patches counts as 0 in this average.

    Args:
        student_logits: the student's logits [M, K] over K prototypes, with a row for each of the M masked patches, in
            the row-major order of `masks`.
        teacher_probs: the targets [M, K] of the same patches.
        masks: bool [B, N] for B images of N patches, with M True entries.
        student_temp: the student's temperature.
        selected: the positions of the True entries in the flattened masks, int64 [M]. By default they are computed
            from `masks`. The host then has to wait for the GPU, if one is used.

    Returns:
        a scalar.
    """
    cross = soft_cross_entropy(student_logits, teacher_probs, student_temp)  # [M]
    image = (masks.flatten().nonzero().squeeze(1) if selected is None else selected) // masks.shape[1]  # [M]
    weights = 1.0 / masks.sum(dim=-1).clamp(min=1)  # [B]
    return (cross * weights[image]).sum() / masks.shape[0]


def koleo_loss(x: Tensor, pool: Tensor | None = None, offset: int = 0) -> Tensor:
    """Compute KoLeo's loss: the negative mean log distance between each row of `x` and its nearest other row.

    Rows are L2-normalised first. All computations are in float32, because in half precision the log distance between
    near-duplicates is infinite.

    Args:
        x: embeddings [B, D].
        pool: the rows [n, D] among which the nearest row is searched. The default is `x`. To search all ranks, pass the
            rows gathered from all ranks, with gradients that flow back to the ranks. If all ranks have the same number
            of rows, the loss and its gradients, averaged over the ranks, are those for all rows.
        offset: the position of `x` in the pool: row i of `x` is row offset + i of the pool. A row is not its own
            nearest row.

    Returns:
        a scalar, which is 0 if the pool has only one row.

    Raises:
        ValueError: the pool does not have rows `offset` to `offset + B - 1`.
    """
    pool = x if pool is None else pool
    if not 0 <= offset <= len(pool) - len(x):
        raise ValueError(f"offset={offset}: the pool has {len(pool)} rows, too few for {len(x)} rows from this offset")
    if len(pool) < 2:
        return x.float().sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        rows = F.normalize(x.float(), eps=EPS, dim=-1)
        others = rows if pool is x else F.normalize(pool.float(), eps=EPS, dim=-1)
        with torch.no_grad():
            similarity = rows @ others.T  # [B, n]
            similarity[:, offset : offset + len(x)].fill_diagonal_(-2)
            nearest = similarity.argmax(dim=1)
        return -(F.pairwise_distance(rows, others[nearest], eps=EPS) + EPS).log().mean()
