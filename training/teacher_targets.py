"""A compact form of the student's targets: the teacher's logits and two vectors that turn them into targets.

Legend: K prototypes, B rows of targets.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """Targets in the form exp(logits / temp - u - v), with one u per row and one v per prototype.

    Targets of Sinkhorn-Knopp and of centering have this form (`training/losses.py`). The array of targets is computed
    only when it is needed.
    """

    logits: Tensor  # [..., B, K], any float type
    u: Tensor  # float32 [..., B]
    v: Tensor  # float32 [K]
    temp: float

    def __getitem__(self, index: Any) -> "TeacherTargets":
        """Return the targets of some rows. `index` selects from the leading dimensions [..., B]."""
        return TeacherTargets(self.logits[index], self.u[index], self.v, self.temp)

    def probs(self) -> Tensor:
        """Compute the targets as an array: float32 [..., B, K]."""
        return (self.logits.float() / self.temp).sub_(self.u.unsqueeze(-1)).sub_(self.v).exp_()
