"""What a run gives: the average's backbone, its k-NN, pictures of what it sees, the checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint import save_checkpoint
from model.files import write_text
from model.pooling import Pooling
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.crops import crop_views, make_crops
from training.data.dataset import squash
from training.data.run_images import Data
from training.distributed import World, whole
from training.evaluate.features import compute_features
from training.evaluate.knn import evaluate_knn
from training.pages.report import write_report
from training.pages.sheets import picture_sheet, save_sheet, shrunk
from training.state import Parts
from training.whiten import whiten

CHECKPOINT = "checkpoint.safetensors"
WHITENING_PHOTOS = 10_000  # enough for the covariance of the widest model's 1,536 dimensions
SHEET_PHOTOS = 6
GALLERY = 128  # photos that a sheet's neighbours come from


def released_backbone(config: TrainConfig, world: World, parts: Parts) -> DinoVisionTransformer:
    """The average's backbone as a plain network on rank 0's device, whatever the ranks keep of it.

    All ranks must call it; elsewhere it is empty.
    """
    with torch.device("meta"):
        backbone = DinoVisionTransformer(config.vit_config)
    tensors = {}
    for key, value in parts.ema.backbone.state_dict().items():
        tensor = whole(value)
        if world.is_main:  # the others only help to put it together
            tensors[key] = tensor.clone()
    if world.is_main:
        backbone.load_state_dict(tensors, assign=True)
    return backbone.eval().requires_grad_(False)


def report_knn(config: TrainConfig, data: Data, backbone: DinoVisionTransformer) -> dict[Pooling, dict[int, float]]:
    """k-NN of the backbone on the held-out photos; empty if there are none or only one class."""
    return evaluate_knn(backbone, data.known, data.held_out, config.eval_spec) if data.has_classes else {}


def write_checkpoint(
    path: Path, config: TrainConfig, backbone: DinoVisionTransformer, facts: dict[str, Any], step: int
) -> None:
    """A backbone in the format that `dinov2 export` reads."""
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, backbone.state_dict(), config.vit_config, {**facts, "steps": step})


def write_sheet(config: TrainConfig, data: Data, backbone: DinoVisionTransformer, step: int, total: int) -> None:
    """`sheets/step_N.png`: a few training photos with the crops that step would make of them."""
    step_of_gallery = max(1, len(data.known) // GALLERY)
    gallery, names, squares = [], [], list[tuple[Any, float]]()
    for photo in data.known[::step_of_gallery][:GALLERY]:
        try:
            pixels = photo.read()
            square = squash(pixels, config.cache_size)
        except ValueError:  # a streamed photo that is broken: the loader lists it
            continue
        if len(squares) < min(SHEET_PHOTOS, config.batch_size):
            squares.append(square)
        gallery.append(shrunk(pixels, config.eval_spec))
        names.append(photo.label or "")
    if not gallery:  # of many streamed photos, all looked at are broken
        return
    device = backbone.cls_token.device
    images = torch.from_numpy(np.stack([square for square, _ in squares])).to(device)
    aspect = torch.tensor([aspect for _, aspect in squares])
    views = crop_views(config, (step - 1) / total)
    crops = make_crops(config, images, aspect, step - 1, torch.arange(len(squares)), views, device)
    sheet = picture_sheet(
        backbone,
        gallery,
        range(len(squares)),
        config.eval_spec,
        globals_=crops.globals_,
        masks=crops.hidden,
        locals_=crops.locals_,
        names=names,
        title=f"{config.model}, recipe {config.recipe}, step {step} of {total}",
    )
    save_sheet(sheet, config.out / "sheets" / f"step_{step:08}.png")


def finish(
    config: TrainConfig, world: World, data: Data, parts: Parts, facts: dict[str, Any], total: int
) -> tuple[Path, str]:
    """Whitening, k-NN, the last checkpoint, a picture and the report; the checkpoint's path and what to tell people."""
    path = config.out / CHECKPOINT
    backbone = released_backbone(config, world, parts)
    if not world.is_main:
        return path, ""
    if config.whiten is not None:
        sample = data.known[:: math.ceil(len(data.known) / WHITENING_PHOTOS)]
        whiten(backbone, compute_features(backbone, sample, config.eval_spec).pooled("cls"), config.whiten)
    knn = report_knn(config, data, backbone)
    write_text(config.out / "knn.json", json.dumps(knn, indent=1))
    write_checkpoint(path, config, backbone, facts | {"knn": knn, "whitened": config.whiten is not None}, total)
    write_sheet(config, data, backbone, total, total)
    report = write_report(config.out)
    found = f"k-NN on {len(data.held_out)} held-out photos, {config.eval_spec.crop} px: {knn}"
    return path, f"{found if knn else 'no k-NN: one class, or nothing held out'}\nreport: {report}"
