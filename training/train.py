"""The loop: photos in, checkpoint out.

Per step (facebookresearch/dinov2, `dinov2/train/ssl_meta_arch.py`): the teacher looks at two large crops of each photo
and gives targets; the student looks at the same two with patches masked, and at several small ones; its class tokens
must agree with the teacher's of the other crops (DINO), its masked patches with what the teacher sees there (iBOT), and
its embeddings must spread (KoLeo). The teacher then follows the student slowly.

All randomness of a step is drawn from (seed, step): a stopped run goes on as if it had not stopped.

Legend: B photos per step, V views, N patches of a global crop, K prototypes, M masked patches.
"""

import copy
import json
import math
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.artifact import WEIGHTS, load_artifact
from model.checkpoint import load_checkpoint, load_state_dict_file, save_checkpoint
from model.config import ViTConfig
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.crops import crop_views, make_crops
from training.dataset import PhotoCache, Split, batch_indices, load_photos, split_folder
from training.evaluate.knn import Pooling, evaluate_knn, extract_features
from training.monitor import Monitor
from training.optimizer import make_optimizer
from training.provenance import provenance
from training.state import Parts, load_state, save_state
from training.step import make_schedules, train_step
from training.student_teacher import Network, make_teacher
from training.whiten import whiten

WHITENING_PHOTOS = 10_000  # enough for the covariance of the widest model's 1,536 dimensions


def check_finite(parts: Parts, terms: dict[str, Tensor], done: int) -> None:
    """Refuse to save what cannot be resumed.

    Raises:
        FloatingPointError: the loss, or a weight of student or teacher, is not finite.
    """
    if not math.isfinite(terms["loss"].item()):
        raise FloatingPointError(f"step {done}: the loss is {terms['loss'].item()}; a lower lr may help")
    weights = [*parts.student.parameters(), *parts.teacher.parameters()]
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise FloatingPointError(f"step {done}: a weight is not finite; a lower lr may help")


def check_same_data(config: TrainConfig, facts: dict[str, Any]) -> None:
    """Refuse to go on with other photos: their order is part of what a resumed run repeats.

    Raises:
        ValueError: the checkpoint beside the state was trained on photos with another digest.
    """
    path = config.out / "checkpoint.safetensors"
    if path.exists() and load_checkpoint(path)[2].get("data_sha256") != facts["data_sha256"]:
        raise ValueError(
            f"the photos in {config.data} are not those of the run in {config.out}: files were added, removed or "
            "changed; choose another out folder, or remove this one to start anew"
        )


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def make_autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 for matrix products where asked, or where `auto` and the device multiplies it natively."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and native))


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """The attention to train with.

    On a CPU the fused kernel's backward pass is a quarter of the step at the 10 to 65 tokens of small crops; plain
    matrix products take a third of that.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def initial_weights(path: Path, config: ViTConfig) -> dict[str, Tensor]:
    """The backbone of a checkpoint or artifact, to start from.

    Raises:
        ValueError: neither of the two, damaged, or of another shape than `config`.
    """
    if path.is_dir():
        # What loading makes on the way does not belong into the artifact.
        with tempfile.TemporaryDirectory() as derived:
            found = load_artifact(path, derived_dir=Path(derived)).manifest.config
        weights = load_state_dict_file(path / WEIGHTS)
    else:
        weights, found, _ = load_checkpoint(path)
    if found != config:
        raise ValueError(f"init={path} is another network than the run's: {found}, not {config}")
    return weights


def make_parts(config: TrainConfig, device: torch.device) -> Parts:
    """Student, teacher and optimizer at step 0, a function of the seed and of `config.init`."""
    torch.manual_seed(config.seed)
    student = Network(
        config.vit_config,
        n_prototypes=config.n_prototypes,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        shared_head=config.shared_head,
        drop_path_rate=config.drop_path,
    ).to(device)
    if config.init is not None:
        student.backbone.load_state_dict(initial_weights(config.init, config.vit_config))
    teacher = make_teacher(student)
    if config.compile:
        for network in (student, teacher):
            for block in network.backbone.blocks:
                block.compile()
    optimizer = make_optimizer(
        student,
        layer_decay=config.layer_decay,
        patch_embed_lr_mult=config.patch_embed_lr_mult,
        betas=config.betas,
    )
    return Parts(student, teacher, optimizer)


def released_backbone(config: TrainConfig, teacher: Network, photos: PhotoCache) -> DinoVisionTransformer:
    """What a finished run gives away: the teacher's backbone, whitened if asked for (the teacher itself stays)."""
    if config.whiten is None:
        return teacher.backbone
    backbone = copy.deepcopy(teacher.backbone)
    sample = photos.paths[:: math.ceil(len(photos) / WHITENING_PHOTOS)]
    whiten(backbone, extract_features(backbone, sample, config.eval_spec)["cls"], config.whiten)
    return backbone


def report_knn(config: TrainConfig, backbone: DinoVisionTransformer, split: Split) -> dict[Pooling, dict[int, float]]:
    """k-NN of the backbone on the held-out photos; empty if there are none or only one class."""
    if not split.held_out or len({path.parent for path in split.train}) < 2:
        return {}
    return evaluate_knn(backbone, split.train, split.held_out, config.eval_spec)


def write_checkpoint(config: TrainConfig, backbone: DinoVisionTransformer, facts: dict[str, Any]) -> Path:
    """A backbone in the format that `dinov2 export` reads."""
    path = config.out / "checkpoint.safetensors"
    save_checkpoint(path, backbone.state_dict(), config.vit_config, facts)
    return path


def load_data(config: TrainConfig, console: Console) -> tuple[PhotoCache, Split]:
    """Photos in memory and the split without the unreadable ones, which are listed in `skipped.txt` and counted."""
    split = split_folder(config.data, config.held_out_share, config.seed)
    photos = load_photos(split.train, config.cache_size)
    held_out = load_photos(split.held_out, 32) if split.held_out else None
    skipped = photos.skipped + (held_out.skipped if held_out else [])
    if skipped:
        listing = config.out / "skipped.txt"
        listing.write_text("".join(f"{s.path}: {s.reason}\n" for s in skipped))
        console.print(f"{len(skipped)} files could not be read and are skipped, listed in {listing}; the first:")
        for item in skipped[:5]:
            console.print(f"  {item.path}: {item.reason}", markup=False)
    if len(photos) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} is more than the {len(photos)} readable photos")
    return photos, Split(photos.paths, held_out.paths if held_out else [])


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Run, or go on with, one training run.

    Writes to `config.out`: `checkpoint.safetensors` (teacher backbone), `state.pt` (to resume), `metrics.jsonl`,
    `config.json`, `knn.json`, and `skipped.txt` if files were unreadable.

    Returns:
        the checkpoint's path.

    Raises:
        ValueError: no usable photos, or `config.out` holds a run with other settings or photos.
        FloatingPointError: the loss or a weight is not finite; the last saved state is kept.
    """
    console = console or Console()
    config.out.mkdir(parents=True, exist_ok=True)
    photos, split = load_data(config, console)
    device = pick_device(config.device)
    autocast, parts = make_autocast(config.precision, device), make_parts(config, device)
    steps_per_epoch = len(photos) // config.batch_size
    total = max(1, round(config.epochs * steps_per_epoch))
    schedules = make_schedules(config, total)
    facts = provenance(config, photos.paths)
    settings, state_path = config.model_dump(mode="json"), config.out / "state.pt"
    first = 0
    if state_path.exists():
        check_same_data(config, facts)
        first = load_state(state_path, parts, settings)
    (config.out / "config.json").write_text(json.dumps(settings, indent=1))
    console.print(
        f"{len(photos)} photos to train on, {len(split.held_out)} held out; {total} steps of {config.batch_size} on "
        f"{device}{' in bf16' if autocast.fast_dtype == torch.bfloat16 and autocast._enabled else ''}; "
        f"ViT {asdict(config.vit_config)}" + (f"; resumed after step {first}" if first else "")
    )
    eval_every = round(config.eval_every_epochs * steps_per_epoch)
    last_save = time.monotonic()
    with (
        attention_kernel(device),
        Monitor(config.out / "metrics.jsonl", total, first, config.batch_size, console) as monitor,
    ):
        for step in range(first, total):
            indices = batch_indices(len(photos), config.batch_size, step, config.seed)
            crops = make_crops(
                config,
                photos.pixels[indices],
                photos.aspect[indices],
                step,
                torch.arange(config.batch_size),
                crop_views(config, step / total),
                device,
            )
            terms = train_step(config, parts, schedules, crops, step, autocast)
            done = step + 1
            monitor.advance(done)
            if done % config.log_every == 0 or done == total:
                figures = {name: value.item() for name, value in terms.items()}
                if not math.isfinite(figures["loss"]):
                    raise FloatingPointError(f"loss {figures['loss']} at step {done}: {figures}")
                figures["dino_over_ln_k"] = figures["dino"] / math.log(config.n_prototypes)
                monitor.write(done, {**figures, "lr": float(schedules.lr["head"][step])})
            if time.monotonic() - last_save > 60 * config.save_every_minutes or done == total:
                check_finite(parts, terms, done)
                # The checkpoint first: it tells a resumed run which photos the state belongs to.
                write_checkpoint(config, parts.teacher.backbone, facts | {"steps": done})
                save_state(state_path, parts, done, settings)
                last_save = time.monotonic()
            if eval_every and done % eval_every == 0 and done < total:
                console.print(f"step {done} k-NN {report_knn(config, parts.teacher.backbone, split)}")
    backbone = released_backbone(config, parts.teacher, photos)
    knn = report_knn(config, backbone, split)
    (config.out / "knn.json").write_text(json.dumps(knn, indent=1))
    console.print(f"k-NN on {len(split.held_out)} held-out photos, {config.eval_spec.crop} px: {knn}")
    return write_checkpoint(config, backbone, facts | {"steps": total, "knn": knn})
