"""Code for both segmentation and depth: pair images with maps, store patch tokens in memory, and train a small head.

The data is a folder `images/{train,val}/...` and, next to it, a folder of maps with the same names: `masks/` (classes)
or `depth/` (distances). Each image is used whole, without windows, crops or flips, so its tokens never change. It is
resized to sides that are multiples of the patch size, with nearly the same aspect ratio. Tokens are stored in memory up
to a limit. Tokens that exceed the limit are computed again each time they are needed, with the same result.

Legend: h x w patches of an image, H x W pixels of a map, F features of a patch, L blocks, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.folder import split_folder
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.dataset import Skipped, find_images
from training.evaluate.features import Precision, check_features, default_workers, in_order, read_pixels
from training.evaluate.linear import batch_stream
from training.evaluate.meaning import not_finite

Advance = Callable[[int], object]
WARMUP_SHARE = 0.0375  # 1,500 of 40,000 iterations


@dataclass(frozen=True)
class Pair:
    """An image file and the file of its map, which is a segmentation mask or a depth map."""

    image: Path
    target: Path


@dataclass(frozen=True)
class HeadTraining:
    """The settings for training a head with AdamW.

    The learning rate rises linearly to `lr` over the first 3.75 % of the iterations and then falls linearly to zero.
    """

    iterations: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int


def find_pairs(folder: Path, split: str, kind: str, suffixes: Sequence[str]) -> list[Pair]:
    """Return the images below `folder/images/split`, sorted, each with its map (a mask or a depth map).

    The map of an image has the same relative path below `folder/kind/split`, except that its suffix is one of
    `suffixes`. `split` is `train` or `val`. The folder for `val` may have any of the names in `model.folder.HELD_OUT`.

    Raises:
        ValueError: the folders do not exist, there are no images, or an image has no map.
    """
    return pair_folders(split_folder(folder / "images", split), split_folder(folder / kind, split), suffixes)


def pair_folders(images: Path, targets: Path, suffixes: Sequence[str]) -> list[Pair]:
    """Return the images below the folder `images`, sorted, each with its map below the folder `targets`.

    Raises:
        ValueError: a folder does not exist, there are no images, or an image has no map.
    """
    pairs, missing = [], []
    for image in find_images(images):
        stem = image.relative_to(images).with_suffix("")
        target = next((p for suffix in suffixes if (p := targets / f"{stem}{suffix}").is_file()), None)
        if target is None:
            missing.append(image)
        else:
            pairs.append(Pair(image, target))
    if missing:
        raise ValueError(
            f"{len(missing)} images of {images} have no file with their name and {' or '.join(suffixes)} in {targets}, "
            f"e.g. {missing[0].name}"
        )
    return pairs


@dataclass(frozen=True)
class TokenSettings:
    """The settings for making a head's input from a model's tokens.

    The patch tokens of the last `n_blocks` blocks are concatenated. If `with_cls` is true, each block's class token is
    also appended to each of its patch tokens. If `precision` is "bf16", the forward pass runs in bfloat16 autocast.
    """

    n_blocks: int
    with_cls: bool
    precision: Precision = "fp32"


class DenseData:
    """A sequence with one item for each pair of an image and its map that can be read.

    An item consists of two tensors. The tokens are [h, w, F] for h x w patches with F features. The map has the height
    and width of the network's input. `pairs` lists the readable pairs, and `skipped` lists the files that could not be
    read. `memory_left` is the unused part of `memory_bytes`.

    Args:
        model: a model in eval mode. Tokens are computed and stored on its device.
        pairs: images and maps.
        spec: preprocessing without a crop.
        read_target: function that reads a map [H, W] from a file. It must raise ValueError if the file cannot be read.
        tokens: the settings for making tokens.
        memory_bytes: memory limit for stored tokens and maps. Pairs that exceed the limit are read and computed again
            each time they are needed.
        advance: called with 1 after each pair.

    Raises:
        ValueError: no pair could be read, the model has fewer blocks than `tokens` asks for, or the tokens of an image
            are not finite.
    """

    def __init__(
        self,
        model: DinoVisionTransformer,
        pairs: Sequence[Pair],
        spec: PreprocessSpec,
        read_target: Callable[[Path], Tensor],
        tokens: TokenSettings,
        *,
        memory_bytes: int,
        advance: Advance = lambda count: None,
    ) -> None:
        assert spec.crop is None
        assert not model.training
        self.read_target = read_target
        self.skipped: list[Skipped] = []
        self.pairs: list[Pair] = []
        self._model, self._spec, self._settings = model, spec, tokens
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory_left = memory_bytes
        for pair, outcome in zip(pairs, in_order(self._read, pairs, default_workers()), strict=True):
            advance(1)
            if isinstance(outcome, Skipped):
                self.skipped.append(outcome)
                continue
            pixels, target = outcome
            kept = self._tokens(pixels, pair), self._at_input_size(target, pixels)
            size = sum(part.numel() * part.element_size() for part in kept)
            if size <= self.memory_left:
                self.memory_left -= size
                self._kept[len(self.pairs)] = kept
            self.pairs.append(pair)
        if not self.pairs:
            first = self.skipped[0]
            raise ValueError(f"none of {len(pairs)} pairs could be read; the first: {first.name}: {first.reason}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of a pair, float32 [h, w, F], and its map.

        The map is resized to the size of the network's input by nearest-neighbour interpolation.

        Raises:
            ValueError: the pair is not in memory and can no longer be read.
        """
        if index in self._kept:
            tokens, target = self._kept[index]
        else:
            outcome = self._read(self.pairs[index])
            if isinstance(outcome, Skipped):
                raise ValueError(f"{outcome.name}: {outcome.reason}")
            tokens, target = self._tokens(outcome[0], self.pairs[index]), self._at_input_size(outcome[1], outcome[0])
        return tokens.float(), target

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor] | Skipped:
        try:
            pixels = torch.from_numpy(read_pixels(pair.image, self._spec))
        except ValueError as error:
            return Skipped(str(pair.image), str(error))
        try:
            return pixels, self.read_target(pair.target)
        except ValueError as error:
            return Skipped(str(pair.target), str(error))

    @torch.no_grad()
    def _tokens(self, pixels: Tensor, pair: Pair) -> Tensor:
        device = self._model.cls_token.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._settings.precision == "bf16"):
            layers = self._model.get_intermediate_layers(
                pixels[None].to(device), n=self._settings.n_blocks, return_class_token=True
            )
        p = self._model.patch_size
        parts = []
        for patches, cls in layers:
            parts.append(patches[0])  # [N, D]
            if self._settings.with_cls:
                parts.append(cls[0].expand_as(patches[0]))
        tokens = torch.cat(parts, dim=1)
        check_features(tokens[None], [str(pair.image)], self._model)
        return tokens.view(pixels.shape[1] // p, pixels.shape[2] // p, -1)

    def _at_input_size(self, target: Tensor, pixels: Tensor) -> Tensor:
        resized = F.interpolate(target[None, None].float(), size=tuple(pixels.shape[1:]), mode="nearest-exact")
        return resized[0, 0].to(target.dtype).to(self._model.cls_token.device)


def learning_rates(training: HeadTraining) -> list[float]:
    """Return the learning rate of each iteration of a head's training."""
    warmup = round(WARMUP_SHARE * training.iterations)
    rise = (np.arange(warmup) + 1) / max(1, warmup)
    fall = 1 - np.arange(training.iterations - warmup) / max(1, training.iterations - warmup)
    return (training.lr * np.concatenate((rise, fall))).tolist()


def _batches(data: DenseData, training: HeadTraining) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    stream = batch_stream(len(data), min(training.batch_size, len(data)), training.seed)
    for _ in range(training.iterations):
        items = [data[index] for index in next(stream).tolist()]
        yield [tokens for tokens, _ in items], [target for _, target in items]


def train_head(
    head: nn.Module,
    data: DenseData,
    loss_of: Callable[[list[Tensor], list[Tensor]], Tensor],
    training: HeadTraining,
    advance: Advance = lambda count: None,
) -> float:
    """Train `head` in place, and return the loss of the last iteration.

    Args:
        head: the module to train.
        data: tokens and maps to train on.
        loss_of: function that computes the loss of a batch from two lists with one entry per image: tokens [h, w, F],
            and maps at the size of the network's input.
        training: iterations, batch size, learning rate, weight decay and seed.
        advance: called with 1 after each iteration.

    Raises:
        ValueError: the number of iterations or the batch size is less than 1.
        FloatingPointError: the last loss or a weight of the head is not finite.
    """
    if training.iterations < 1 or training.batch_size < 1:
        raise ValueError(f"iterations={training.iterations}, batch_size={training.batch_size} must be at least 1")
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    head.train()
    loss = torch.tensor(0.0)
    for lr, (tokens, targets) in zip(learning_rates(training), _batches(data, training), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(1)
    head.eval()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the head's loss is {loss.item()} after {training.iterations} iterations; lower lr")
    if (problem := not_finite(head.state_dict())) is not None:
        raise FloatingPointError(f"the head's {problem} after {training.iterations} iterations; lower lr")
    return loss.item()
