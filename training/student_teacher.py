"""The student, its teacher, and the heads of both.

The teacher is an exponential moving average (EMA) of the student. It computes the targets and gets no gradient. At the
end of a run, its backbone becomes the checkpoint. A head maps a token to logits over K prototypes (arXiv 2104.14294).
A head has three linear layers, the last of which has a small output (the bottleneck). L2 normalisation and a final
linear layer with weight normalisation follow. The parameters have the same names as in Meta's code,
`dinov2/layers/dino_head.py`.

Legend: D width of the backbone, K prototypes, n tokens, b images of a micro-batch, V local crops per image, N patches
of a global crop, M selected patches, G and L sides of global and local crops.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ViTConfig
from model.vit import DinoVisionTransformer
from training.distributed import local


class PrototypeLayer(nn.Module):
    """A linear layer without bias that computes logits over the prototypes.

    The weight has one row per prototype. `weight_v` gives the direction of each row, and `weight_g` its length, which
    is 1 at first.
    """

    def __init__(self, in_dim: int, n_prototypes: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, in_dim))
        self.weight_g = nn.Parameter(torch.ones(n_prototypes, 1))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        # torch's fused kernel saves time, because the K x 256 weights are larger than the logits of most steps.
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DinoHead(nn.Module):
    """A head that maps n tokens [n, D] to logits over K prototypes, [n, K].

    As long as the prototypes have length 1 (see `PrototypeLayer`), the logits are cosines.
    """

    def __init__(self, in_dim: int, n_prototypes: int, hidden_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, n_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        return self.last_layer(F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12))


class Output(NamedTuple):
    """The output of a student or a teacher for one micro-batch of b images."""

    cls: Tensor  # [2b, D] class tokens of the global crops, before the head
    global_logits: Tensor  # [2b, K]
    local_logits: Tensor | None  # [V*b, K]; None if there are no local crops
    patch_logits: Tensor  # [M, K] for the selected patches


class Network(nn.Module):
    """A backbone with a head for DINO's loss and a head for iBOT's loss.

    If `shared_head` is True, both losses use the same head, as in DINOv2's short recipe.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        n_prototypes: int,
        hidden_dim: int,
        bottleneck_dim: int,
        shared_head: bool,
        drop_path_rate: float,
        ibot_bottleneck_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = DinoVisionTransformer(config, drop_path_rate=drop_path_rate)
        self.dino_head = DinoHead(config.embed_dim, n_prototypes, hidden_dim, bottleneck_dim)
        ibot_dim = bottleneck_dim if ibot_bottleneck_dim is None else ibot_bottleneck_dim
        self.own_ibot_head = None if shared_head else DinoHead(config.embed_dim, n_prototypes, hidden_dim, ibot_dim)

    def forward(self, globals_: Tensor, locals_: Tensor | None, hidden: Tensor | None, selected: Tensor) -> Output:
        """Compute the class tokens and the logits of one micro-batch of b images.

        Args:
            globals_: two global crops of each image, [2b, 3, G, G].
            locals_: V local crops of each image, [V*b, 3, L, L], or None. The teacher gets no local crops.
            hidden: bool [2b, N] for N patches per global crop, True for patches that are replaced with the mask token.
                If it is None, no patch is replaced.
            selected: the positions, among all 2b * N patches, of the M patches to compute logits for, int64 [M].
        """
        features = self.backbone.forward_features(globals_, hidden)
        cls = features["x_norm_clstoken"]
        tokens = [cls]
        if locals_ is not None:
            tokens.append(self.backbone.forward_features(locals_)["x_norm_clstoken"])
        patches = features["x_norm_patchtokens"].flatten(0, 1).index_select(0, selected)
        if self.own_ibot_head is None:
            tokens.append(patches)
        # A single call of the head normalises the K x 256 weights of its last layer only once.
        logits = self.dino_head(torch.cat(tokens)).split([len(kind) for kind in tokens])
        patch_logits = logits[-1] if self.own_ibot_head is None else self.own_ibot_head(patches)
        return Output(cls, logits[0], None if locals_ is None else logits[1], patch_logits)


def make_teacher(student: Network) -> Network:
    """Return a frozen copy of the student in evaluation mode, in which drop path has no effect."""
    return copy.deepcopy(student).eval().requires_grad_(False)


@torch.no_grad()
def update_teacher(student: Network, teacher: Network, momentum: float) -> None:
    """Update all parameters of the teacher in place: teacher = momentum * teacher + (1 - momentum) * student.

    If the networks are sharded, each rank updates its own slices.
    """
    mine = [local(parameter) for parameter in teacher.parameters()]
    torch._foreach_lerp_(mine, [local(parameter) for parameter in student.parameters()], 1 - momentum)
