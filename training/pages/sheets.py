"""Draw an image sheet. For a few training images, a sheet shows the network's inputs and what the network computes from
them.

The gallery is a sample of the training images. On a sheet, each image has one row, with these columns:

    image          the image after the evaluation's preprocessing
    global 1, 2    the two large crops of a training step; masked patches, which the student must predict, are darkened
    locals         up to nine of the small crops
    attention      the attention of the class token to each patch in the last block, averaged over the heads
    parts (PCA)    the first three principal components of the patch tokens as red, green and blue; the components are
                   computed from all images on the sheet, so a colour has the same meaning in each row
    nearest        the images in the gallery with the most similar class tokens, and their cosine similarity

Sheets show progress earlier than the curves of a run do: the attention moves from the corners to the objects, each part
of an object gets its own colour, and the nearest images show the same kind of object. If a sheet still looks like noise
late in a run, stop the run. Drawing needs only Pillow.

Legend: n images on the sheet, V local crops per image, G side of a global crop, L side of a local crop, S side of the
evaluation's crop, N = h * w patches, D width, g images in the gallery, k nearest images.
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
EVEN_IS_DARK = 4  # evenly spread attention is drawn at a quarter of the brightest colour
PCA_DEVIATIONS = 5  # range of a colour in standard deviations; a narrower range looks garish, a wider one grey
# Colours from dark violet to pale yellow. Lightness rises with the value, so colour-blind readers see it too.
HEAT = np.array(
    [(10, 8, 30), (75, 16, 110), (160, 40, 110), (225, 85, 60), (250, 165, 40), (252, 250, 190)], np.float64
)


def shrunk(photo: Photo, spec: PreprocessSpec) -> Photo:
    """Resize an image to the size to which `preprocess` resizes it before cropping. The smaller image saves memory.

    `preprocess` returns the same pixels for the resized image as for the original.
    """
    assert spec.resize is not None
    height, width = photo.shape[:2]
    short = min(height, width)
    size = (int(spec.resize * width / short), int(spec.resize * height / short))  # (w, h); one equals `resize`
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def to_pixels(crops: Tensor, spec: PreprocessSpec) -> list[Photo]:
    """Convert normalised crops [n, 3, S, S] to n RGB images, uint8 [S, S, 3]. `spec` contains the mean and the standard
    deviation of the normalisation."""
    mean, std = (torch.tensor(v, device=crops.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    scaled = ((crops.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def shade_masked(photo: Photo, mask: npt.NDArray[np.bool_], grid: tuple[int, int]) -> Photo:
    """Return a copy of a crop, uint8 [S, S, 3], in which masked patches are dark grey.

    `mask` is bool [h * w] and True for masked patches. `grid` is (h, w), the number of rows and columns of patches.
    """
    h, w = grid
    per_pixel = np.kron(mask.reshape(h, w), np.ones((photo.shape[0] // h, photo.shape[1] // w), bool))
    grey = photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return np.where(per_pixel[:, :, None], grey * 0.22 + 28, photo).astype(np.uint8)


def heat_colours(values: npt.NDArray[np.float64]) -> Photo:
    """Map an array of values from 0 to 1 to colours from dark violet to pale yellow, uint8 [..., 3].

    NaN, which a diverged network outputs, is treated as 0.
    """
    position = np.clip(np.nan_to_num(values), 0, 1) * (len(HEAT) - 1)
    below = np.minimum(position.astype(int), len(HEAT) - 2)
    share = (position - below)[..., None]
    return (HEAT[below] * (1 - share) + HEAT[below + 1] * share).round().astype(np.uint8)


def class_attention(backbone: DinoVisionTransformer, pixels: Tensor) -> Tensor:
    """Return the last block's attention [n, N] from the class token to each patch, averaged over the heads.

    Each row is scaled to sum to 1.
    """
    patches = slice(1 + backbone.num_register_tokens, None)
    weights = backbone.get_attention(pixels)[:, :, 0, patches].float().mean(dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


def pca_colours(patches: Tensor) -> Tensor:
    """Map patch tokens [n, N, D] to colours [n, N, 3] from 0 to 1 by their first three principal components.

    The components are computed over the patches of all images. Each component is scaled by its standard deviation and
    clipped to the range 0 to 1. The sign of a principal component is arbitrary, so its entry with the largest magnitude
    is made positive. A network therefore always yields the same colours for the same images.
    """
    flat = patches.flatten(0, 1).double().cpu().nan_to_num(0.0, 0.0, 0.0)  # a diverged network gives NaN
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)  # one direction [D] per row
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    scores = flat @ (directions * largest.sign()).T  # [n * N, 3]
    spread = scores.std(dim=0, correction=0).clamp(min=1e-12)
    return (0.5 + scores / (PCA_DEVIATIONS * spread)).clamp(0, 1).float().view(*patches.shape[:2], -1)


def nearest(queries: Tensor, gallery: Tensor, own: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Find the k most similar gallery images for each query image. Return their gallery indices [n, k] and cosine
    similarities [n, k].

    `queries` [n, D] and `gallery` [g, D] are features. Every query image is itself in the gallery, at the index in
    `own`, and is left out of its own result.
    """
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T  # [n, g]
    similarity[torch.arange(len(own)), torch.tensor(own)] = -torch.inf
    top = similarity.topk(min(k, len(gallery) - 1), dim=1)
    return top.indices, top.values


def _cell(photo: Photo, side: int = CELL, *, smooth: bool = True) -> Image.Image:
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return Image.fromarray(photo).resize((side, side), how)


def _map_cell(values: Photo, photo: Photo, opacity: float) -> Image.Image:
    """Enlarge a map of patch colours [h, w, 3] to the size of a cell, and blend it with a grey version of the image."""
    colours = Image.fromarray(values).resize((CELL, CELL), Image.Resampling.BICUBIC)
    return Image.blend(_cell(photo).convert("L").convert("RGB"), colours, opacity)


def _grid_cell(crops: Sequence[Photo]) -> Image.Image:
    """Arrange up to nine crops in one cell, in rows of two or three."""
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    per_row = 2 if len(crops) <= 4 else 3
    side = (CELL - 3 * (per_row - 1)) // per_row
    for index, crop in enumerate(crops[: per_row**2]):
        row, column = divmod(index, per_row)
        cell.paste(_cell(crop, side), (column * (side + 3), row * (side + 3)))
    return cell


@torch.inference_mode()
def _features(backbone: DinoVisionTransformer, photos: Sequence[Photo], spec: PreprocessSpec) -> Tensor:
    """Return the class tokens [g, D] of images, as a tensor on the CPU.

    If `spec` has no crop, the images have different sizes, so each batch contains only one image.
    """
    device, step = backbone.cls_token.device, BATCH if spec.crop is not None else 1
    features = []
    for start in range(0, len(photos), step):
        pixels = np.stack([preprocess(photo, spec) for photo in photos[start : start + step]])
        features.append(backbone(torch.from_numpy(pixels).to(device)).float().cpu())
    return torch.cat(features)


@dataclass(frozen=True)
class SheetCrops:
    """The crops of n images. Each tensor lists the first crops of all images, then the second crops, and so on."""

    globals_: Tensor  # [2n, 3, G, G], normalised
    masks: Tensor  # bool [2n, N]
    locals_: Tensor | None  # [Vn, 3, L, L], normalised


@dataclass(frozen=True)
class _Look:
    """What a sheet shows in addition to the crops: the preprocessed images and what the network computes from them."""

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
    """Run the network on the gallery and on the images of the sheet, and return the results.

    `shown` contains the gallery indices of the sheet's images. The mode of `backbone` (train or eval) is restored
    afterwards.
    """
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
    """Draw an image sheet and return it. The docstring of this module describes the columns.

    Args:
        backbone: a network that is not sharded. Its mode (train or eval) is restored afterwards.
        gallery: a sample of the training images, RGB uint8 [H, W, 3] of any size. Use `shrunk` to save memory.
        shown: the indices in `gallery` of the n images on the sheet.
        spec: the evaluation's preprocessing, which must have a crop.
        crops: the training crops of the n images.
        names: one name per gallery image for the captions, such as its folder's name. If it is None, the captions
            contain no names.
        title: the heading of the sheet, such as the run and the step.
        n_neighbours: the number of nearest images in each row.

    Raises:
        ValueError: `spec` has no crop, or `crops` does not have two global crops and two masks for each of the n
            images.
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
    """Return the cells that show the crops of the image in row `row` of a sheet with n images: one cell for each global
    crop, and one for all local crops."""
    side = crops.globals_.shape[-1] // spec.patch_size
    cells = []
    for view in range(2):
        index = view * n + row
        [crop] = to_pixels(crops.globals_[index : index + 1], spec)
        cells.append(_cell(shade_masked(crop, crops.masks[index].cpu().numpy(), (side, side))))
    return [*cells, _grid_cell([] if crops.locals_ is None else to_pixels(crops.locals_[row::n], spec))]


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a text, if necessary, so that it fits into the width of a cell."""
    if draw.textlength(text, font=font) <= CELL:
        return text
    while text and draw.textlength(text + "...", font=font) > CELL:
        text = text[:-1]
    return text + "..."


def _page(rows: Sequence[tuple[list[Image.Image], dict[int, str]]], headings: Sequence[str], title: str) -> Image.Image:
    """Arrange rows of cells on one page, below the title and the column headings, and return the page. A row consists
    of its cells and a dict that maps column numbers to captions.
    """
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
    """Write a sheet to a PNG file in one atomic step, so that other programs never read an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
