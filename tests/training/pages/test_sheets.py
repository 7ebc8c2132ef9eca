"""The image sheet: each column against a plain definition, and the page as a whole."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import ViTConfig
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from training.pages import sheets
from training.pages.sheets import (
    SheetCrops,
    class_attention,
    heat_colours,
    nearest,
    pca_colours,
    picture_sheet,
    save_sheet,
    shade_masked,
    shrunk,
    to_pixels,
)

SPEC = PreprocessSpec(resize=32, crop=28, patch_size=14)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = ViTConfig(embed_dim=16, depth=2, num_heads=2, img_size=28, num_register_tokens=2, layerscale_init=1.0)
    return DinoVisionTransformer(config)


def photos(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8) for i in range(n)]


def crops(n, n_local=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "globals_": torch.randn(2 * n, 3, 28, 28, generator=generator),
        "masks": torch.rand(2 * n, 4, generator=generator) < 0.5,
        "locals_": torch.randn(n_local * n, 3, 14, 14, generator=generator) if n_local else None,
    }


def test_crops_come_back_as_pixels():
    [photo] = photos(1)
    pixels = torch.from_numpy(preprocess(photo, SPEC))
    [found] = to_pixels(pixels[None], SPEC)
    resized = Image.fromarray(photo).resize((int(32 * 40 / 30), 32), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[2:30, 7:35]
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 401), (401, 300), (33, 33), (20, 77), (32, 32)])
def test_a_shrunk_photo_gives_the_same_input(size):
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    small = shrunk(photo, SPEC)
    assert min(small.shape[:2]) == 32
    assert np.array_equal(preprocess(small, SPEC), preprocess(photo, SPEC))


def test_only_masked_patches_are_shaded():
    photo = np.full((28, 42, 3), (200, 40, 40), np.uint8)
    mask = np.array([True, False, False, False, False, True])
    found = shade_masked(photo, mask, (2, 3))
    for index, masked in enumerate(mask):
        top, left = 14 * (index // 3), 14 * (index % 3)
        patch = found[top : top + 14, left : left + 14]
        assert (patch == [200, 40, 40]).all() != masked
        if masked:
            assert patch.max() < 80
            assert (patch == patch[0, 0, 0]).all()


def test_heat_is_light_where_there_is_much():
    colours = heat_colours(np.array([[-1.0, 0.0], [0.5, 1.0], [2.0, 0.25]]))
    assert colours.shape == (3, 2, 3)
    assert colours[0, 0].tolist() == colours[0, 1].tolist() == list(sheets.HEAT[0])
    assert colours[1, 1].tolist() == colours[2, 0].tolist() == list(sheets.HEAT[-1])
    steps = heat_colours(np.linspace(0, 1, 40)) @ [0.299, 0.587, 0.114]
    assert (np.diff(steps) > 0).all()


def test_attention_is_the_class_tokens_over_patches_only(backbone):
    pixels = torch.randn(2, 3, 28, 28)
    found = class_attention(backbone, pixels)
    weights = backbone.get_attention(pixels).detach()
    for image in range(2):
        row = [float(weights[image, :, 0, 3 + patch].mean()) for patch in range(4)]  # class token, two registers
        assert found[image].tolist() == pytest.approx([value / sum(row) for value in row], rel=1e-5)


def test_pca_colours_are_the_main_directions():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 20, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    basis, _ = torch.linalg.qr(torch.randn(10, 3, generator=generator))
    tokens = scores @ basis.T + 5
    found = pca_colours(tokens).flatten(0, 1)
    covariance = torch.cov(tokens.flatten(0, 1).double().T)
    _, vectors = torch.linalg.eigh(covariance)
    for channel in range(3):
        direction = vectors[:, -1 - channel]
        direction = direction * direction[direction.abs().argmax()].sign()
        plain = (tokens.flatten(0, 1).double() - tokens.flatten(0, 1).double().mean(dim=0)) @ direction
        expected = (0.5 + plain / (5 * plain.std(correction=0))).clamp(0, 1)
        torch.testing.assert_close(found[:, channel].double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(pca_colours(tokens), pca_colours(tokens))
    assert torch.isfinite(pca_colours(torch.ones(2, 4, 8))).all()  # all tokens alike: grey, not NaN


def test_the_nearest_are_by_cosine_and_never_the_photo_itself():
    gallery = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    indices, cosines = nearest(gallery[:1] * 3, gallery, [0], 2)
    assert indices.tolist() == [[1, 2]]
    assert cosines[0].tolist() == pytest.approx([10 / 101**0.5, 0.0], abs=1e-6)
    assert nearest(gallery[:1], gallery, [0], 10)[0].shape == (1, 3)


@pytest.mark.parametrize("n_local", [0, 3, 8])
def test_the_page(backbone, n_local, tmp_path):
    backbone.train()
    before = torch.get_rng_state()
    gallery = photos(6)
    inputs = crops(2, n_local)
    sheet = picture_sheet(
        backbone,
        gallery,
        [4, 1],
        SPEC,
        SheetCrops(**inputs),
        names=[f"kind-{i}" for i in range(6)],
        title="run",
        n_neighbours=3,
    )
    assert backbone.training  # as it was
    assert torch.equal(torch.get_rng_state(), before)
    columns, rows = 6 + 3, 2
    cell = sheets.CELL + sheets.GAP
    assert sheet.size[0] == 2 * sheets.MARGIN + columns * cell - sheets.GAP
    assert sheet.size[1] > rows * cell

    top = sheets.MARGIN + 2 * sheets.HEADER + 6

    def part(row, column):
        x, y = sheets.MARGIN + column * cell, top + row * (cell + sheets.CAPTION)
        return np.asarray(sheet.crop((x, y, x + sheets.CELL, y + sheets.CELL))).astype(int)

    [shown] = to_pixels(torch.from_numpy(preprocess(gallery[1], SPEC))[None], SPEC)
    assert np.array_equal(part(1, 0), np.asarray(Image.fromarray(shown).resize((sheets.CELL,) * 2, 1)))
    [second_global] = to_pixels(inputs["globals_"][3:4], SPEC)  # view 1 of the second image
    shaded = shade_masked(second_global, inputs["masks"][3].numpy(), (2, 2))
    assert np.array_equal(part(1, 2), np.asarray(Image.fromarray(shaded).resize((sheets.CELL,) * 2, 1)))
    assert (part(0, 3) == sheets.BACKGROUND).all() == (n_local == 0)

    save_sheet(sheet, tmp_path / "sheets" / "step.png")
    with Image.open(tmp_path / "sheets" / "step.png") as saved:
        assert saved.size == sheet.size
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["step.png"]


def test_the_same_network_gives_the_same_sheet(backbone):
    first, second = (picture_sheet(backbone, photos(4), [0, 1], SPEC, SheetCrops(**crops(2))) for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_a_diverged_network_has_a_sheet_too(backbone):
    diverged = copy.deepcopy(backbone)
    with torch.no_grad():
        diverged.norm.weight.fill_(torch.inf)
        diverged.blocks[-1].attn.qkv.weight.fill_(torch.nan)
    assert picture_sheet(diverged, photos(4), [0, 1], SPEC, SheetCrops(**crops(2))).size[0] > 0
    assert heat_colours(np.array([np.nan])).tolist() == heat_colours(np.array([0.0])).tolist()


def test_what_does_not_fit_is_refused(backbone):
    with pytest.raises(ValueError, match="2 images need 4 global crops and masks, not 6"):
        picture_sheet(backbone, photos(4), [0, 1], SPEC, SheetCrops(**crops(3)))
    with pytest.raises(ValueError, match="needs a preprocessing with a crop"):
        picture_sheet(backbone, photos(4), [0], PreprocessSpec(crop=None), SheetCrops(**crops(1)))
