"""The teacher for distillation: a larger, frozen network that gives the student its targets.

DINOv2's small models learn from the frozen ViT-g with the ordinary losses (arXiv 2304.07193, section 5). These losses
need the teacher's heads. The saved states of this project's runs contain heads, but Meta published its backbones
without heads. A teacher without heads uses some of its own features as prototypes. The prototypes are K class tokens
for DINO's loss and K patch tokens for iBOT's loss. They are computed from crops of training images, then centred and
scaled to unit length. The teacher's logits are the cosines between a centred token and the prototypes. The student
therefore learns the similarities that the teacher computes between an image and K other crops.

Legend: b images of a micro-batch, D width of the teacher, K prototypes.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from model.checkpoint import network_of
from model.config import ViTConfig
from model.convert import finite_problem
from model.loading import read_model
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.crops import Crops
from training.distributed import World, gather_rows
from training.state import FOLDER, find_state
from training.student_teacher import Network, Output


class PrototypeTeacher(nn.Module):
    """A frozen backbone that serves as a teacher without heads. Its prototypes are some of its own features.

    `choose` must set the prototypes before the first forward pass. The inputs and the outputs are the same as for a
    `Network`.
    """

    def __init__(self, backbone: DinoVisionTransformer, n_prototypes: int) -> None:
        super().__init__()
        self.backbone = backbone
        for kind in ("cls", "patch"):
            self.register_buffer(f"{kind}_mean", torch.zeros(backbone.embed_dim))
            self.register_buffer(f"{kind}_prototypes", torch.zeros(n_prototypes, backbone.embed_dim))
        self.eval().requires_grad_(False)

    def _logits(self, kind: str, tokens: Tensor) -> Tensor:
        centred = F.normalize(tokens.float() - self.get_buffer(f"{kind}_mean"), dim=-1)
        return centred @ self.get_buffer(f"{kind}_prototypes").T

    def forward(self, globals_: Tensor, locals_: Tensor | None, hidden: Tensor | None, selected: Tensor) -> Output:
        assert locals_ is None
        assert hidden is None
        features = self.backbone.forward_features(globals_)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        patches = patches.flatten(0, 1).index_select(0, selected)
        return Output(cls, self._logits("cls", cls), None, self._logits("patch", patches))

    @torch.no_grad()
    def choose(self, steps: Iterable[Sequence[Crops]], world: World) -> None:
        """Make prototypes from the global crops of the first training steps. All ranks get the same prototypes.

        The prototypes are ordered by step, view and position in the step's batch. A resumed run therefore has the same
        prototypes in the same order, even if the size of micro-batches or the number of ranks changes, and the
        student's heads still match them.

        Args:
            steps: for each step, this rank's micro-batches. Reading stops after the step that provides the last
                prototype.
            world: this process's rank and the number of ranks.

        Raises:
            ValueError: the steps contain fewer global crops than there are prototypes.
        """
        n_wanted = len(self.get_buffer("cls_prototypes"))
        features_of: dict[str, list[Tensor]] = {"cls": [], "patch": []}
        n_cls = 0
        for micros in steps:
            tokens: dict[str, list[Tensor]] = {"cls": [], "patch": []}  # [2, b, D] of each micro-batch
            n_mine = sum(len(crops.globals_) // 2 for crops in micros)
            at = world.rank * n_mine  # position in the step's batch
            for crops in micros:
                features = self.backbone.forward_features(crops.globals_)
                patches = features["x_norm_patchtokens"]
                # Take as many patches as class tokens, each from another position in its image.
                b = len(patches) // 2
                number = torch.arange(at, at + b, device=patches.device)
                number = torch.cat((number, number + world.size * n_mine))
                picked = patches[torch.arange(2 * b, device=patches.device), (number * 7919) % patches.shape[1]]
                at += b
                tokens["patch"].append(picked.float().unflatten(0, (2, -1)))
                tokens["cls"].append(features["x_norm_clstoken"].float().unflatten(0, (2, -1)))
            for kind, parts in tokens.items():
                mine = torch.cat(parts, dim=1).transpose(0, 1).contiguous()  # [b, 2, D], to gather images in rank order
                features_of[kind].append(gather_rows(world, mine).transpose(0, 1).flatten(0, 1))
            n_cls += len(features_of["cls"][-1])
            if n_cls >= n_wanted:
                break
        if n_cls < n_wanted:
            raise ValueError(f"n_prototypes={n_wanted} is more than the {n_cls} global crops of the run")
        for kind, parts in features_of.items():
            rows = torch.cat(parts)[:n_wanted]
            mean = rows.mean(dim=0)
            self.get_buffer(f"{kind}_mean").copy_(mean)
            self.get_buffer(f"{kind}_prototypes").copy_(F.normalize(rows - mean, dim=-1))


def load_teacher(config: TrainConfig) -> Network | PrototypeTeacher:
    """Load the teacher for distillation onto the CPU.

    The setting `config.teacher` names the teacher. It is the folder of a training run, whose saved states contain
    heads, or a backbone without heads: any source of `model.loading.read_model`.

    Raises:
        ValueError: the teacher does not exist, or its patch size or its heads' number of prototypes differs from the
            student's.
        OSError: a file of the teacher cannot be read.
        model.zoo.DownloadError: published weights cannot be downloaded.
    """
    assert config.teacher is not None
    path = Path(config.teacher)
    if (path / FOLDER).is_dir():
        return _of_run(path, config)
    loaded = read_model(config.teacher, arch=config.teacher_model)
    _check_grid(loaded.config, config)
    return PrototypeTeacher(network_of(loaded), config.n_prototypes)


def _check_grid(vit: ViTConfig, config: TrainConfig) -> None:
    """Check that teacher and student have the same patch size, because iBOT compares them patch by patch.

    Raises:
        ValueError: the patch sizes differ.
    """
    if vit.patch_size != config.vit_config.patch_size:
        raise ValueError(
            f"teacher={config.teacher} has patches of {vit.patch_size} pixels, the student ({config.model}) of "
            f"{config.vit_config.patch_size}: they must be the same"
        )


def teacher_digest(teacher: nn.Module) -> str:
    """Return a digest of the teacher's weights. It does not depend on the file from which the weights were loaded.

    The digest does not cover the prototypes of a `PrototypeTeacher`, because the weights and the images determine
    them.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in teacher.state_dict().items():
        if not name.endswith(("_mean", "_prototypes")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_same_teacher(config: TrainConfig, theirs: str | None, mine: str | None) -> None:
    """Check that a run resumes with the same teacher.

    The teacher's weights may have changed in the meantime, for example because the run that trained it was resumed.

    Args:
        config: the run's settings.
        theirs: the digest of the teacher in the saved state, or None if the run had no teacher.
        mine: the digest of the teacher that was loaded for the resumed run, or None if it has no teacher.

    Raises:
        ValueError: the digests differ.
    """
    if theirs != mine:
        raise ValueError(
            f"teacher={config.teacher} has other weights than this run's teacher had so far; "
            "choose another out folder, or restore the old weights"
        )


def _of_run(path: Path, config: TrainConfig) -> Network:
    """Load the teacher from the folder `path` of another training run.

    The teacher is the moving average of that run's student, including its heads, from the newest complete state.

    Raises:
        ValueError: the folder has no complete state, or the number of prototypes or the patch size differs from
            that in `config`, or a weight is NaN or infinite.
    """
    theirs = TrainConfig.model_validate(json.loads((path / "config.json").read_text()))
    if theirs.n_prototypes != config.n_prototypes:
        raise ValueError(
            f"teacher={path} has {theirs.n_prototypes} prototypes: n_prototypes={config.n_prototypes} must be the same"
        )
    _check_grid(theirs.vit_config, config)
    saved, _ = find_state(path)
    if saved is None:
        raise ValueError(f"teacher={path} has no complete state in {path / FOLDER}")
    network = Network(
        theirs.vit_config,
        n_prototypes=theirs.n_prototypes,
        hidden_dim=theirs.head_hidden_dim,
        bottleneck_dim=theirs.head_bottleneck_dim,
        shared_head=theirs.shared_head or theirs.ibot_weight == 0,
        drop_path_rate=0.0,
        ibot_bottleneck_dim=theirs.ibot_bottleneck_dim,
    )
    tensors = torch.load(saved.path, map_location="cpu", weights_only=True, mmap=True)["ema"]
    for name, tensor in tensors.items():
        if problem := finite_problem(name, tensor.numpy()):
            raise ValueError(f"teacher={path}: in {saved.path.name}, {problem}")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)
