"""Robustness with a network whose features are the means of the three colours: what each change does is known."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.evaluate.robustness import CHANGES, centre_crop, jpeg, robustness

PLAIN = PreprocessSpec(resize=28, crop=28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CROP, BLUR, BRIGHT, FLAT, PALE, HUE, GREY, JPEG = CHANGES
LUMA = np.array([0.2989, 0.587, 0.114])


class Colours(torch.nn.Module):
    """Class token: the mean of each channel, seen through `see`."""

    def __init__(self, see=lambda means: means):
        super().__init__()
        self.cls_token, self.see, self.seen = torch.nn.Parameter(torch.zeros(1)), see, []

    def get_intermediate_layers(self, x, n, return_class_token):
        assert (n, return_class_token, self.training) == (1, True, False)
        self.seen.append(x)
        return ((x.flatten(2).transpose(1, 2), self.see(x.mean(dim=(2, 3)))),)


def save(folder, photos):
    paths = [folder / f"{i}.png" for i in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        Image.fromarray(np.asarray(photo, np.uint8)).save(path)
    return paths


def flat(*colour):
    return np.broadcast_to(np.array(colour, np.uint8), (28, 28, 3))


COLOURS = [(150, 50, 50), (50, 150, 60), (60, 50, 160), (100, 90, 80)]


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_each_change_does_to_flat_colours_what_arithmetic_says(tmp_path):
    found = robustness(Colours(), save(tmp_path, [flat(*c) for c in COLOURS]), PLAIN)
    colours = np.array(COLOURS) / 255
    luma = (colours @ LUMA)[:, None]
    expected = {
        CROP: colours,
        BLUR: colours,
        BRIGHT: 1.4 * colours,  # none reaches 1
        FLAT: 0.6 * colours + 0.4 * luma,
        PALE: 0.4 * colours + 0.6 * luma,
        GREY: np.repeat(luma, 3, axis=1),
    }
    for name, changed in expected.items():
        cosines = np.array([[cosine(a, b) for b in colours] for a in changed])  # changed, clean
        assert found["changes"][name]["cosine"] == pytest.approx(np.mean(np.diag(cosines)), abs=1e-5), name
        right = np.mean(cosines.argmax(axis=1) == np.arange(len(colours)))
        assert found["changes"][name]["recall@1"] == right, name
    assert found["changes"][GREY]["recall@1"] == 0.25  # all greys are nearest to the greyest image
    assert found["changes"][BRIGHT]["recall@1"] == 1
    others = [cosine(a, b) for i, a in enumerate(colours) for j, b in enumerate(colours) if i != j]
    assert found["other_photos_cosine"] == pytest.approx(np.mean(others), abs=1e-6)
    assert (found["photos"], found["skipped"]) == (4, 0)
    for figure, mean in found["mean"].items():
        assert mean == pytest.approx(np.mean([change[figure] for change in found["changes"].values()]))


def test_hue_turns_by_a_twentieth_of_the_circle(tmp_path):
    model = Colours()
    robustness(model, save(tmp_path, [flat(200, 0, 0), flat(0, 200, 0)]), PLAIN)
    hue = model.seen[1 + list(CHANGES).index(HUE)].mean(dim=(2, 3))
    step = 6 * 0.05 * 200 / 255  # red to yellow is a sixth of the circle
    torch.testing.assert_close(hue, torch.tensor([[200 / 255, step, 0], [0, 200 / 255, step]]), atol=1e-5, rtol=0)


def test_the_crop_is_the_middle_of_the_photo_resized_back():
    photo = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None]
    box = (0.15 * 28, 0.15 * 28, 0.85 * 28, 0.85 * 28)
    expected = np.asarray(Image.fromarray(photo).resize((28, 28), Image.Resampling.BILINEAR, box)) / 255
    assert np.abs(centre_crop(pixels)[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255


def test_colours_and_jpeg_are_pillows(tmp_path):
    photo = np.random.default_rng(1).integers(40, 200, (28, 28, 3), dtype=np.uint8)
    pixels, image = torch.from_numpy(photo).permute(2, 0, 1)[None], Image.fromarray(photo)
    for name, enhance, factor in ((BRIGHT, ImageEnhance.Brightness, 1.4), (PALE, ImageEnhance.Color, 0.4)):
        expected = np.asarray(enhance(image).enhance(factor)) / 255
        assert np.abs(CHANGES[name](pixels)[0].permute(1, 2, 0).numpy() - expected).max() < 2.5 / 255, name
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    decoded = np.asarray(Image.open(file)) / np.float32(255)
    assert np.array_equal(jpeg(pixels)[0].permute(1, 2, 0).numpy(), decoded)
    assert np.abs(decoded - photo / 255).max() > 0.1


def test_nothing_is_changed_in_place_and_all_is_normalised_as_the_model_wants(tmp_path):
    """The unchanged image goes in first, by the spec; each change starts from it and not from the change before."""
    rng = np.random.default_rng(2)
    paths = save(tmp_path, rng.integers(0, 256, (3, 40, 30, 3)))
    model, spec = Colours(), PreprocessSpec(resize=28, crop=28)
    robustness(model, paths, spec, batch_size=2)
    assert [len(x) for x in model.seen] == [2] * 9 + [1] * 9
    from training.evaluate.features import read_pixels

    torch.testing.assert_close(model.seen[0][1], torch.from_numpy(read_pixels(paths[1], spec)), atol=1e-5, rtol=0)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (spec.mean, spec.std))
    pixels = ((model.seen[0] * std + mean) * 255).round().byte()
    for number, change in enumerate(CHANGES.values(), start=1):
        torch.testing.assert_close(model.seen[number] * std + mean, change(pixels), atol=1e-5, rtol=0)


def test_a_collapsed_network_has_high_cosines_and_recognises_nothing(tmp_path):
    rng = np.random.default_rng(3)
    paths = save(tmp_path, rng.integers(0, 256, (6, 28, 28, 3)))
    found = robustness(Colours(lambda means: torch.ones_like(means)), paths, PLAIN)
    assert found["mean"]["cosine"] == pytest.approx(1)
    assert found["other_photos_cosine"] == pytest.approx(1)
    assert found["mean"]["recall@1"] <= 1 / 6 + 1e-9


def test_batches_do_not_matter_and_the_mode_is_kept(tmp_path):
    torch.manual_seed(0)
    model = DinoVisionTransformer(ViTConfig(embed_dim=16, depth=1, num_heads=2, img_size=28, layerscale_init=1.0))
    paths = save(tmp_path, np.random.default_rng(4).integers(0, 256, (5, 33, 44, 3)))
    spec, told = PreprocessSpec(resize=28, crop=28), []
    whole = robustness(model.train(), paths, spec)
    parts = robustness(model, paths, spec, batch_size=2, advance=told.append)
    assert model.training
    assert sum(told) == 5
    for name in CHANGES:
        assert parts["changes"][name]["cosine"] == pytest.approx(whole["changes"][name]["cosine"], abs=1e-5)
    assert 0 < whole["mean"]["recall@1"] <= 1


def test_broken_photos_are_counted_and_too_few_refused(tmp_path):
    paths = save(tmp_path, [flat(*c) for c in COLOURS])
    paths[1].write_bytes(b"no photo")
    found = robustness(Colours(), paths, PLAIN)
    assert (found["photos"], found["skipped"]) == (3, 1)
    with pytest.raises(ValueError, match=r"at least two images that can be read, not 1 of 2; the first: .*1\.png"):
        robustness(Colours(), paths[:2], PLAIN)
    with pytest.raises(ValueError, match="with a crop"):
        robustness(Colours(), paths, PreprocessSpec(crop=None))
