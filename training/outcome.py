"""Produce the results of a run from the backbone of the student's moving average.

The results are the backbone itself, its k-NN accuracy, its checkpoint, and image sheets (pictures that show a few
images with their crops, attention and nearest neighbours). All ranks call `released_backbone`. Only rank 0 calls the
other functions.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint import save_checkpoint
from model.config import ViTConfig
from model.loading import RUN_CHECKPOINTS
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.crops import CropSettings, make_crops
from training.data.dataset import squash
from training.data.run_images import Data
from training.distributed import World, whole
from training.pages.sheets import SheetCrops, picture_sheet, save_sheet, shrunk
from training.state import Parts

BEST, CHECKPOINT = RUN_CHECKPOINTS
SHEET_PHOTOS = 6
GALLERY = 128  # images that are searched for a sheet's neighbours


@dataclass(frozen=True)
class Release:
    """The settings with which a run evaluates its backbone, draws image sheets and writes checkpoints."""

    vit: ViTConfig
    eval_spec: PreprocessSpec
    facts: dict[str, Any]  # the checkpoint's metadata
    whiten: float | None  # shrinkage of the class token's whitening at the end; None: no whitening
    side: int  # side, in pixels, of the squares that a sheet's crops are made from
    title: str  # title of a sheet


def released_backbone(vit: ViTConfig, world: World, parts: Parts) -> DinoVisionTransformer:
    """Copy the backbone of the student's moving average to a network that is not sharded, and return it.

    All ranks must call this function. Rank 0 gets the network on its device. On the other ranks, the returned network
    has no weights.
    """
    with torch.device("meta"):
        backbone = DinoVisionTransformer(vit)
    tensors = {}
    for key, value in parts.ema.backbone.state_dict().items():
        tensor = whole(value)
        if world.is_main:  # the other ranks only contribute their slices
            tensors[key] = tensor.clone()
    if world.is_main:
        backbone.load_state_dict(tensors, assign=True)
    return backbone.eval().requires_grad_(False)


def steps_of(path: Path) -> int | None:
    """Return the number of steps in the metadata of a checkpoint, or None if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            steps = json.loads((file.metadata() or {})["provenance"])["steps"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def write_checkpoint(path: Path, backbone: DinoVisionTransformer, vit: ViTConfig, facts: dict[str, Any]) -> None:
    """Write a backbone and the metadata `facts` to a checkpoint that `dinov2 export` can read."""
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, backbone.state_dict(), vit, facts)


def write_sheet(
    path: Path,
    backbone: DinoVisionTransformer,
    data: Data,
    crop_settings: CropSettings,
    release: Release,
    step: int,
    total: int,
) -> None:
    """Write an image sheet: a picture that shows a few training images and what the backbone computes from them.

    The sheet also shows the crops that the images would get in step `step`. `total` is the number of steps in the run.
    No file is written if none of the images can be read.
    """
    stride = max(1, len(data.train_sample) // GALLERY)
    gallery, names, squares = [], [], list[tuple[Any, float]]()
    for photo in data.train_sample[::stride][:GALLERY]:
        try:
            pixels = photo.read()
            square = squash(pixels, release.side)
        except ValueError:  # a broken streamed image, which the loader lists
            continue
        if len(squares) < min(SHEET_PHOTOS, crop_settings.batch_size):
            squares.append(square)
        gallery.append(shrunk(pixels, release.eval_spec))
        names.append(photo.label or "")
    if not gallery:  # the data is streamed, and every image of the sample is broken
        return
    device = backbone.cls_token.device
    images = torch.from_numpy(np.stack([square for square, _ in squares])).to(device)
    aspect = torch.tensor([aspect for _, aspect in squares])
    phase = crop_settings.phase((step - 1) / total)
    crops = make_crops(crop_settings, images, aspect, step - 1, torch.arange(len(squares)), phase, device)
    sheet = picture_sheet(
        backbone,
        gallery,
        range(len(squares)),
        release.eval_spec,
        SheetCrops(crops.globals_, crops.hidden, crops.locals_),
        names=names,
        title=f"{release.title}, step {step} of {total}",
    )
    save_sheet(sheet, path)
