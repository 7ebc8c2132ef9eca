"""An image sheet: the network's inputs and what it computes from them, on one page.

One row per image, from left to right:

    image          as the evaluation prepares it
    global 1, 2    the two large crops of a step; masked patches, which the student must guess, are darkened
    locals         some of the small crops
    attention      attention of the class token in the last block, mean over the heads
    parts (PCA)    the patch tokens' three main directions as red, green and blue; one fit for all images of the sheet,
                   so a colour means the same in each row
    nearest        the most similar images of a sample of the training data, by class token, with the cosine

The sheet shows that a network learns before the curves do: attention moves from the corners to the objects, parts get
their own colours, and neighbours become the same kind of object. If the sheet remains noise, stop the run. It needs
only Pillow.

Legend: n images of the sheet, V local crops, G and L sides of crops, N = h * w patches, D width, A heads, g gallery.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model.files import replacing
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer

Photo = npt.NDArray[np.uint8]  # RGB [H, W, 3]

CELL, GAP, MARGIN = 144, 6, 16
HEADER = 26  # height of a line of headings, pixels
CAPTION = 18
BACKGROUND, INK, FAINT = (22, 24, 28), (235, 237, 240), (150, 156, 166)
BATCH = 64
EVEN_IS_DARK = 4  # evenly spread attention gets a quarter of the brightest colour, and not all of it
PCA_DEVIATIONS = 5  # the range of a colour, in standard deviations: a narrower one is garish, a wider one grey
# Dark violet to pale yellow with rising lightness: readable as low to high, also for the colour-blind and in print.
HEAT = np.array(
    [(10, 8, 30), (75, 16, 110), (160, 40, 110), (225, 85, 60), (250, 165, 40), (252, 250, 190)], np.float64
)


def shrunk(photo: Photo, spec: PreprocessSpec) -> Photo:
    """Resize the image as `preprocess` does before cropping, so that a gallery fits into memory.

    `preprocess` makes the same pixels from it as from the original.
    """
    assert spec.resize is not None
    height, width = photo.shape[:2]
    short = min(height, width)
    size = (int(spec.resize * width / short), int(spec.resize * height / short))  # (w, h); one equals `resize`
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def to_pixels(crops: Tensor, spec: PreprocessSpec) -> list[Photo]:
    """Turn normalised crops [n, 3, S, S] into images for display."""
    mean, std = (torch.tensor(v, device=crops.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    scaled = ((crops.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def shade_masked(photo: Photo, mask: npt.NDArray[np.bool_], grid: tuple[int, int]) -> Photo:
    """Darken and grey the masked patches ([h * w], True is masked) of the image [S, S, 3]."""
    h, w = grid
    per_pixel = np.kron(mask.reshape(h, w), np.ones((photo.shape[0] // h, photo.shape[1] // w), bool))
    grey = photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return np.where(per_pixel[:, :, None], grey * 0.22 + 28, photo).astype(np.uint8)


def heat_colours(values: npt.NDArray[np.float64]) -> Photo:
    """Map values 0 to 1, of any shape [...], to colours [..., 3]. NaN (from a diverged network) is shown as 0."""
    position = np.clip(np.nan_to_num(values), 0, 1) * (len(HEAT) - 1)
    below = np.minimum(position.astype(int), len(HEAT) - 2)
    share = (position - below)[..., None]
    return (HEAT[below] * (1 - share) + HEAT[below + 1] * share).round().astype(np.uint8)


def class_attention(backbone: DinoVisionTransformer, pixels: Tensor) -> Tensor:
    """Return the class token's attention to each patch in the last block, mean over heads: [n, N], rows sum to one."""
    patches = slice(1 + backbone.num_register_tokens, None)
    weights = backbone.get_attention(pixels)[:, :, 0, patches].float().mean(dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


def pca_colours(patches: Tensor) -> Tensor:
    """Map patch tokens [n, N, D] to colours [n, N, 3] in 0..1: three main directions over all images, each stretched.

    A direction's sign is arbitrary. Here its largest entry is positive, so that the same network gives the same sheet.
    """
    flat = patches.flatten(0, 1).double().cpu().nan_to_num(0.0, 0.0, 0.0)  # a diverged network's are not finite
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)  # [.., D] each
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    scores = flat @ (directions * largest.sign()).T  # [n * N, 3]
    spread = scores.std(dim=0, correction=0).clamp(min=1e-12)
    return (0.5 + scores / (PCA_DEVIATIONS * spread)).clamp(0, 1).float().view(*patches.shape[:2], -1)


def nearest(queries: Tensor, gallery: Tensor, own: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Return indices and cosines [n, k] of the most similar gallery features, without the query's `own` index."""
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T  # [n, g]
    similarity[torch.arange(len(own)), torch.tensor(own)] = -torch.inf
    top = similarity.topk(min(k, len(gallery) - 1), dim=1)
    return top.indices, top.values


def _cell(photo: Photo, side: int = CELL, *, smooth: bool = True) -> Image.Image:
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return Image.fromarray(photo).resize((side, side), how)


def _map_cell(values: Photo, photo: Photo, opacity: float) -> Image.Image:
    """Enlarge colours per patch [h, w, 3] smoothly and blend them with the greyed image."""
    colours = Image.fromarray(values).resize((CELL, CELL), Image.Resampling.BICUBIC)
    return Image.blend(_cell(photo).convert("L").convert("RGB"), colours, opacity)


def _grid_cell(crops: Sequence[Photo]) -> Image.Image:
    """Put up to nine crops into one cell, two or three per row."""
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    per_row = 2 if len(crops) <= 4 else 3
    side = (CELL - 3 * (per_row - 1)) // per_row
    for index, crop in enumerate(crops[: per_row**2]):
        row, column = divmod(index, per_row)
        cell.paste(_cell(crop, side), (column * (side + 3), row * (side + 3)))
    return cell


@torch.inference_mode()
def _features(backbone: DinoVisionTransformer, photos: Sequence[Photo], spec: PreprocessSpec) -> Tensor:
    """Compute class tokens [g, D] on the CPU; without a crop in `spec` sizes differ, so images are processed singly."""
    device, step = backbone.cls_token.device, BATCH if spec.crop is not None else 1
    features = []
    for start in range(0, len(photos), step):
        pixels = np.stack([preprocess(photo, spec) for photo in photos[start : start + step]])
        features.append(backbone(torch.from_numpy(pixels).to(device)).float().cpu())
    return torch.cat(features)


@dataclass(frozen=True)
class SheetCrops:
    """The crops of n images, view by view, as in `training.data.crops.Crops`."""

    globals_: Tensor  # [2n, 3, G, G], normalised
    masks: Tensor  # bool [2n, N]
    locals_: Tensor | None  # [Vn, 3, L, L], normalised


@dataclass(frozen=True)
class _Look:
    """The network's inputs and results for the images of a sheet."""

    inputs: Tensor  # [n, 3, S, S]
    attention: Tensor  # [n, N]
    colours: Tensor  # [n, N, 3]
    nearest: Tensor  # [n, k] indices in the gallery
    cosines: Tensor  # [n, k]


@torch.inference_mode()
def _look(
    backbone: DinoVisionTransformer,
    gallery: Sequence[Photo],
    shown: Sequence[int],
    spec: PreprocessSpec,
    n_neighbours: int,
) -> _Look:
    """Run the network on the shown images and, for their neighbours, on the gallery; its mode is restored."""
    was_training = backbone.training
    backbone.eval()
    try:
        inputs = torch.from_numpy(np.stack([preprocess(gallery[i], spec) for i in shown]))
        pixels = inputs.to(backbone.cls_token.device)
        tokens = backbone.forward_features(pixels)
        attention, colours = class_attention(backbone, pixels).cpu(), pca_colours(tokens["x_norm_patchtokens"])
        features = _features(backbone, gallery, spec)
        indices, cosines = nearest(tokens["x_norm_clstoken"].cpu(), features, list(shown), n_neighbours)
    finally:
        backbone.train(was_training)
    return _Look(inputs, attention, colours, indices, cosines)


@torch.inference_mode()
def picture_sheet(
    backbone: DinoVisionTransformer,
    gallery: Sequence[Photo],
    shown: Sequence[int],
    spec: PreprocessSpec,
    crops: SheetCrops,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    n_neighbours: int = 4,
) -> Image.Image:
    """Draw one sheet; the top of the file describes the columns.

    Args:
        backbone: whole and on one device; its mode is restored afterwards.
        gallery: a sample of the training images, RGB uint8 [H, W, 3] of any sizes; `shrunk` saves memory.
        shown: the n images of the sheet, as indices of `gallery`.
        spec: the evaluation's preprocessing; must crop.
        crops: crops of the n images.
        names: captions of the gallery's images, e.g. their folders.
        title: run and step, for the heading.
        n_neighbours: columns of nearest images.

    Raises:
        ValueError: `spec` has no crop, or the crops are not those of n images.
    """
    n, globals_, masks, locals_ = len(shown), crops.globals_, crops.masks, crops.locals_
    if spec.crop is None:
        raise ValueError("an image sheet needs a preprocessing with a crop; this one has none")
    if len(globals_) != 2 * n or len(masks) != 2 * n or (locals_ is not None and len(locals_) % n):
        raise ValueError(f"{n} images need {2 * n} global crops and masks, not {len(globals_)} and {len(masks)}")
    look = _look(backbone, gallery, shown, spec, n_neighbours)
    grid = (spec.crop // spec.patch_size,) * 2
    rows = []
    for row, photo in enumerate(to_pixels(look.inputs, spec)):
        cells = [_cell(photo), *_crop_cells(row, n, crops, spec)]
        attention, neighbours = look.attention[row], look.nearest[row].tolist()
        top = max(float(attention.quantile(0.995)), EVEN_IS_DARK / len(attention))
        heat = heat_colours((attention.double().numpy() / top).reshape(grid))
        cells.append(_map_cell(heat, photo, 0.72))
        parts = (look.colours[row].numpy() * 255).round().astype(np.uint8).reshape(*grid, -1)
        cells.append(_map_cell(parts, photo, 0.8))
        captions = {0: names[shown[row]]} if names else {}
        for i, cosine in zip(neighbours, look.cosines[row].tolist(), strict=True):
            captions[len(cells)] = f"{cosine:.2f}  {names[i]}" if names else f"{cosine:.2f}"
            cells.append(_cell(to_pixels(_input(gallery[i], spec), spec)[0]))
        rows.append((cells, captions))
    return _page(rows, ["image", "global 1", "global 2", "locals", "attention", "parts (PCA)", "nearest"], title)


def _input(photo: Photo, spec: PreprocessSpec) -> Tensor:
    return torch.from_numpy(preprocess(photo, spec))[None]


def _crop_cells(row: int, n: int, crops: SheetCrops, spec: PreprocessSpec) -> list[Image.Image]:
    """Draw the two global crops and the local ones of one image."""
    side = crops.globals_.shape[-1] // spec.patch_size
    cells = []
    for view in range(2):
        index = view * n + row
        [crop] = to_pixels(crops.globals_[index : index + 1], spec)
        cells.append(_cell(shade_masked(crop, crops.masks[index].cpu().numpy(), (side, side))))
    return [*cells, _grid_cell([] if crops.locals_ is None else to_pixels(crops.locals_[row::n], spec))]


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten the text to a cell's width."""
    if draw.textlength(text, font=font) <= CELL:
        return text
    while text and draw.textlength(text + "...", font=font) > CELL:
        text = text[:-1]
    return text + "..."


def _page(rows: Sequence[tuple[list[Image.Image], dict[int, str]]], headings: Sequence[str], title: str) -> Image.Image:
    """Put cells and captions on one page, below a title and headings."""
    columns = max(len(cells) for cells, _ in rows)
    top = MARGIN + (HEADER + 6 if title else 0) + HEADER
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    height = top + len(rows) * (CELL + CAPTION + GAP) + MARGIN - GAP
    page = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(page)
    large, small, tiny = (ImageFont.load_default(size) for size in (20, 14, 11))
    if title:
        draw.text((MARGIN, MARGIN - 4), title, INK, large)
    for column, heading in enumerate(headings):
        draw.text((MARGIN + column * (CELL + GAP), top - HEADER + 4), heading, FAINT, small)
    for row, (cells, captions) in enumerate(rows):
        y = top + row * (CELL + CAPTION + GAP)
        for column, cell in enumerate(cells):
            x = MARGIN + column * (CELL + GAP)
            page.paste(cell, (x, y))
            if column in captions:
                draw.text((x, y + CELL + 2), _fitted(draw, captions[column], tiny), FAINT, tiny)
    return page


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as a PNG, atomically, so that a reader never gets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
