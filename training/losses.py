"""The three losses of DINOv2 and the two ways to turn teacher logits into targets.

DINO (arXiv 2104.14294) asks that crops of one photo agree on a soft assignment to K prototypes; iBOT (arXiv 2111.07832)
asks the same of each masked patch; KoLeo (arXiv 1806.03198) spreads the embeddings of a batch. Definitions as in
facebookresearch/dinov2, `dinov2/loss/`. Two deliberate differences, neither visible in the value: everything is
float32 whatever the network computed in, and Sinkhorn-Knopp works on logarithms, since `exp(logit / 0.04)` leaves
float32 once a logit passes 3.5.

Legend: B images, K prototypes, N patches per image, M masked patches of the batch, S student views, T teacher views.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """Teacher targets that use all prototypes equally often: alternate scaling of prototypes and samples.

    With Q = exp(logits / temp) the definition is, n times: divide each prototype's column by its sum and by K, then
    each sample's row by its sum and by B; at the end rows sum to one. Only two vectors change, so only they are
    iterated: log Q = logits / temp - u[sample] - v[prototype]. Constants (K, B) cancel in the last row scaling.

    Args:
        logits: [B, K], any float type.
        temp: the teacher's temperature.
        n_iterations: rounds; 3 in the paper.

    Returns:
        float32 [B, K], rows sum to one.
    """
    scores = logits.float() / temp
    u = scores.new_zeros(scores.shape[0], 1)
    for _ in range(n_iterations):
        v = torch.logsumexp(scores - u, dim=0, keepdim=True)  # [1, K]
        u = torch.logsumexp(scores - v, dim=1, keepdim=True)  # [B, 1]
    if n_iterations == 0:
        return scores.softmax(dim=-1)
    return (scores - u - v).exp()


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Teacher targets by centering and sharpening (DINO): softmax((logits - center) / temp), float32 [B, K]."""
    return ((logits.float() - center) / temp).softmax(dim=-1)


def _views(x: Tensor | Sequence[Tensor]) -> Tensor:
    """One view [B, K], stacked views [S, B, K] or a sequence of views, as stacked float32."""
    if isinstance(x, Tensor):
        return (x if x.dim() == 3 else x.unsqueeze(0)).float()
    return torch.stack([view.float() for view in x])


def dino_loss(
    student_logits: Tensor | Sequence[Tensor], teacher_probs: Tensor | Sequence[Tensor], student_temp: float
) -> Tensor:
    """Cross-entropy of every student view against every teacher view: summed over pairs, mean over images.

    Args:
        student_logits: one view [B, K], or S of them as [S, B, K] or a sequence.
        teacher_probs: targets, one view [B, K] or T of them; rows sum to one.
        student_temp: the student's temperature.

    Returns:
        scalar: sum over S x T pairs of mean over B of -sum_k p log softmax(logits / student_temp).
    """
    student, targets = _views(student_logits) / student_temp, _views(teacher_probs).sum(dim=0)
    # -sum_k p (s_k - lse(s)) = mass * lse(s) - p.s: no second [S, B, K] array of log-probabilities.
    cross = targets.sum(dim=-1) * torch.logsumexp(student, dim=-1) - torch.einsum("sbk,bk->sb", student, targets)
    return cross.mean(dim=1).sum()


def ibot_loss(student_logits: Tensor, teacher_probs: Tensor, masks: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy on masked patches: mean over an image's masked patches, then over all images, masked or not.

    Args:
        student_logits, teacher_probs: [M, K], the masked patches in the order of `masks`, row-major.
        masks: bool [B, N] with M True entries.
        student_temp: the student's temperature.
    """
    student, targets = student_logits.float() / student_temp, teacher_probs.float()
    cross = targets.sum(dim=-1) * torch.logsumexp(student, dim=-1) - (student * targets).sum(dim=-1)  # [M]
    per_image = masks.sum(dim=-1).clamp(min=1)  # [B]
    weights = (1.0 / per_image).unsqueeze(-1).expand_as(masks)[masks]  # [M]
    return (cross * weights).sum() / masks.shape[0]


def koleo_loss(x: Tensor) -> Tensor:
    """Minus the mean log distance of each L2-normalised row of `x` [B, D] to its nearest other row.

    In float32: half precision turns near-duplicates into infinities. 0 for a batch of one, which has no neighbour.
    """
    if x.shape[0] < 2:
        return x.float().sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), eps=EPS, dim=-1)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
        return -(F.pairwise_distance(x, x[nearest], eps=EPS) + EPS).log().mean()
