"""A compact form of the targets for the student: the teacher's logits, and two vectors that turn them into targets.

Legend: K prototypes, B rows of targets.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """Targets in the form exp(logits / temp - u - v), with one number u per row and one number v per prototype.

    Targets of Sinkhorn-Knopp and of the moving centre have this form (`training/losses.py`). `probs` computes the array
    of targets when it is needed.
    """

    logits: Tensor  # [..., B, K], any float type
    u: Tensor  # float32 [..., B]
    v: Tensor  # float32 [K]
    temp: float

    def __getitem__(self, index: Any) -> "TeacherTargets":
        """Return the targets of the rows that `index` selects. The last dimension (prototypes) cannot be indexed."""
        return TeacherTargets(self.logits[index], self.u[index], self.v, self.temp)

    def probs(self) -> Tensor:
        """Compute the array of targets, float32, with the shape of `logits`."""
        return (self.logits.float() / self.temp).sub_(self.u.unsqueeze(-1)).sub_(self.v).exp_()
