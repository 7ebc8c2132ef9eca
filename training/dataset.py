"""A folder of photos in memory: decoded once, cropped many times.

Ten crops per photo and epoch from JPEGs would decode each photo again and again; a few thousand photos at working size
fit into memory as bytes (3 * side^2 each: 77 kB at 160 pixels), so decoding ends before the first step. Photos are
squashed to squares so that a batch is one tensor; `aspect` keeps their shape (see `training/augment.py`).

A photo that cannot be read never stops a run: it is skipped and listed with the reason.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.preprocess import PreprocessSpec, output_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PhotoCache:
    """Photos in memory: `pixels` uint8 [n, 3, S, S], `aspect` float [n] (width / height), and where each came from."""

    paths: list[Path]
    pixels: Tensor
    aspect: Tensor
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Split:
    """Photos to train on and photos kept for the evaluation."""

    train: list[Path]
    held_out: list[Path]


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, at any depth, sorted.

    Raises:
        ValueError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist or is no folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"no images below {folder}: looked for {', '.join(sorted(SUFFIXES))}")
    return found


def split_folder(folder: Path, held_out_share: float, seed: int) -> Split:
    """Train and held-out photos of a folder.

    A folder with subfolders `train` and `val` is taken at its word. Otherwise a share of all photos, drawn with `seed`,
    is held out and never trained on.
    """
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return Split(find_images(folder / "train"), find_images(folder / "val"))
    paths = find_images(folder)
    order = np.random.default_rng(seed).permutation(len(paths))
    n_held_out = int(len(paths) * held_out_share)
    return Split(
        train=[paths[i] for i in sorted(order[n_held_out:])], held_out=[paths[i] for i in sorted(order[:n_held_out])]
    )


def read_photo(path: Path) -> npt.NDArray[np.uint8]:
    """RGB uint8 [H, W, 3], EXIF orientation applied.

    Raises:
        ValueError: not a readable image; the message says why.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's many ways to say "broken": translated here, at the one border
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _squashed(path: Path, side: int) -> tuple[npt.NDArray[np.uint8], float] | Skipped:
    try:
        photo = read_photo(path)
        height, width = photo.shape[:2]
        output_size(height, width, PreprocessSpec())  # what the evaluation would refuse is no photo to train on
    except ValueError as error:
        return Skipped(path, str(error))
    square = Image.fromarray(photo).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1), width / height


def load_photos(paths: list[Path], side: int) -> PhotoCache:
    """Decode all photos to squares of `side` pixels, in threads (Pillow decodes without the interpreter's lock).

    Raises:
        ValueError: not one photo could be read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda path: _squashed(path, side), paths))
    good = [(path, *r) for path, r in zip(paths, results, strict=True) if not isinstance(r, Skipped)]
    skipped = [r for r in results if isinstance(r, Skipped)]
    if not good:
        raise ValueError(f"none of {len(paths)} files could be read; the first: {skipped[0].path}: {skipped[0].reason}")
    pixels = torch.from_numpy(np.stack([pixels for _, pixels, _ in good]))
    return PhotoCache([path for path, _, _ in good], pixels, torch.tensor([a for _, _, a in good]), skipped)


def batch_indices(n_photos: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The photos [batch_size] of one step: a fresh permutation per epoch, the incomplete last batch dropped.

    A pure function of (seed, step), so a resumed run goes on with exactly the photos that come next.
    """
    steps_per_epoch = n_photos // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(n_photos)
    return torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
