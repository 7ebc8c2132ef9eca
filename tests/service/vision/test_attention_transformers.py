"""Compares attention maps with transformers' eager attention, for every block, head and form of the answer.

The models are random, with and without registers. An artifact is exported from each and run by ONNX Runtime and by
torch. The whole way from the encoded image to the answer is tested.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the backbone is torch: pip install '.[train]'")
transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install '.[reference]'")

from model.config import ViTConfig  # noqa: E402
from model.convert import convert  # noqa: E402
from model.engines import parity  # noqa: E402
from model.engines.choice import load_engine  # noqa: E402
from model.export.artifact import export_artifact  # noqa: E402
from model.export.options import Backbone, ExportOptions  # noqa: E402
from model.preprocess import PreprocessSpec, preprocess  # noqa: E402
from service.vision.local import Vision  # noqa: E402
from service.vision.pictures import coloured  # noqa: E402

DEPTH, HEADS, WIDTH = 3, 4, 48
SPEC = PreprocessSpec(resize=224, crop=224)
SIZES = [(224, 224), (224, 336)]
FUSE = {"mean": np.mean, "max": np.max, "min": np.min}


def hugging_face(registers: int) -> torch.nn.Module:
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        mlp_ratio=4,
        image_size=224,
        patch_size=14,
        attn_implementation="eager",
        **({"num_register_tokens": registers} if registers else {}),
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.uniform_(0.2, 0.6)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    return model


class Compared:
    """A random model of transformers, and the same weights as an artifact that an engine runs."""

    def __init__(self, registers: int, engine: str, folder: Path) -> None:
        self.registers = registers
        self.reference = hugging_face(registers)
        tensors = {name: tensor.numpy() for name, tensor in self.reference.state_dict().items()}
        converted = convert(
            tensors,
            ViTConfig(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, img_size=224, num_register_tokens=registers),
        )
        backbone = Backbone(
            name="random",
            weights=converted.arrays,
            config=converted.config,
            preprocess=SPEC,
            provenance={},
            licence="Apache-2.0",
        )
        artifact = export_artifact(backbone, folder, ExportOptions(images=parity.sample_photos(3)))
        self.vision = Vision(artifact, load_engine(artifact, engine, threads=1), threads=1)

    def attention(self, image: np.ndarray) -> np.ndarray:
        """Return the complete attention matrices of transformers, float64 [L, A, T, T]."""
        pixels = preprocess(image, PreprocessSpec(resize=224, crop=None))
        assert pixels.shape[1:] == image.shape[:2]
        with torch.inference_mode():
            found = self.reference(pixel_values=torch.from_numpy(pixels)[None], output_attentions=True)
        return np.concatenate([each.double().numpy() for each in found.attentions])


@pytest.fixture(scope="module", params=["plain-onnx", "plain-torch", "registers-onnx", "registers-torch"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    registers, engine = request.param.split("-")
    runtime = {"onnx": "onnxruntime", "torch": "torch"}[engine]
    pair = Compared(4 if registers == "registers" else 0, runtime, tmp_path_factory.mktemp("artifacts"))
    yield pair
    pair.vision.engine.close()


@pytest.fixture(scope="module", params=SIZES, ids=["224x224", "224x336"])
def image(request: pytest.FixtureRequest) -> np.ndarray:
    coarse = np.random.default_rng(3).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((request.param[1], request.param[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def run(compared: Compared, image: np.ndarray, **options: Any) -> Any:
    """Return the answer: a dictionary, an array from a file in numpy's format, or the pixels of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    answer = compared.vision.run("attention", [buffer.getvalue()], size=224, **options)
    if isinstance(answer, dict):
        return answer
    if answer.media_type == "application/x-npy":
        return np.load(io.BytesIO(answer.data))
    return np.asarray(Image.open(io.BytesIO(answer.data)))


def patches_of(compared: Compared, rows: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return the weights of the patches as maps [..., h, w], from rows [..., T] over all tokens."""
    grid = image.shape[0] // 14, image.shape[1] // 14
    return rows[..., 1 + compared.registers :].reshape(*rows.shape[:-1], *grid)


def enlarged(maps: np.ndarray) -> np.ndarray:
    """Return maps [L, A, h, w] at 14 times their size, interpolated by torch."""
    return torch.nn.functional.interpolate(torch.from_numpy(maps), scale_factor=14.0, mode="bilinear").numpy()


def ranged(maps: np.ndarray) -> np.ndarray:
    low, high = (reduce(maps, axis=(-2, -1), keepdims=True) for reduce in (np.min, np.max))
    return (maps - low) / (high - low)


def test_every_block_and_head(compared: Compared, image: np.ndarray) -> None:
    rows = compared.attention(image)[:, :, 0]
    expected = patches_of(compared, rows, image)
    answer = run(compared, image, blocks="all")
    assert answer["maps"].shape == (DEPTH, HEADS, image.shape[0] // 14, image.shape[1] // 14)
    assert (answer["blocks"], answer["heads"], answer["grid"]) == ([0, 1, 2], [0, 1, 2, 3], list(expected.shape[2:]))
    np.testing.assert_allclose(answer["maps"], expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3  # far from uniform, compared with the tolerance
    totals = expected.sum(axis=(-2, -1), keepdims=True)
    shares = expected / totals
    np.testing.assert_allclose(answer["class_share"], rows[..., 0], rtol=0, atol=1e-5)
    registers = rows[..., 1 : 1 + compared.registers].sum(-1)
    np.testing.assert_allclose(answer["register_share"], registers, rtol=0, atol=1e-5)
    np.testing.assert_allclose(answer["entropy"], -(shares * np.log(shares)).sum((-2, -1)), rtol=0, atol=1e-4)
    rescaled = run(compared, image, blocks="all", values="sum")["maps"]
    np.testing.assert_allclose(rescaled, shares, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(compared, image, blocks="all", values="range")["maps"], ranged(expected), atol=1e-5)
    some = run(compared, image, blocks=[-1, 0], heads=[2])
    np.testing.assert_allclose(some["maps"], expected[[2, 0]][:, [2]], rtol=0, atol=1e-5)
    assert (some["blocks"], some["heads"]) == ([2, 0], [2])
    np.testing.assert_allclose(run(compared, image)["maps"], expected[-1:], rtol=0, atol=1e-5)


def test_arrays(compared: Compared, image: np.ndarray) -> None:
    expected = patches_of(compared, compared.attention(image)[:, :, 0], image)
    array = run(compared, image, blocks="all", format="npy")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-5)
    pixels = run(compared, image, blocks="all", format="npy", resolution="image")
    assert pixels.shape == (DEPTH, HEADS, *image.shape[:2])
    np.testing.assert_allclose(pixels, enlarged(expected), rtol=0, atol=1e-5)
    stretched = run(compared, image, blocks="all", format="npy", resolution="image", values="range")
    np.testing.assert_allclose(stretched, ranged(enlarged(expected)), rtol=0, atol=1e-5)
    assert (stretched.min(), stretched.max()) == (0, 1)


@pytest.mark.parametrize("fusion", FUSE)
def test_fused_heads_and_rollout(compared: Compared, image: np.ndarray, fusion: str) -> None:
    matrices = compared.attention(image)
    fused = FUSE[fusion](matrices, axis=1)  # [L, T, T]
    answer = run(compared, image, blocks="all", fuse_heads=fusion)
    expected = patches_of(compared, fused[:, None, 0], image)
    np.testing.assert_allclose(answer["maps"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(answer["class_share"], fused[:, :1, 0] / fused[:, 0].sum(-1, keepdims=True), atol=1e-5)
    product = np.eye(fused.shape[1])
    for matrix in fused:
        mixed = matrix + np.eye(len(matrix))
        product = mixed / mixed.sum(1, keepdims=True) @ product
    answer = run(compared, image, fuse_blocks="rollout", fuse_heads=fusion)
    np.testing.assert_allclose(answer["maps"], patches_of(compared, product[None, None, 0], image), rtol=0, atol=1e-5)


def test_the_set_that_holds_a_mass(compared: Compared, image: np.ndarray) -> None:
    expected = patches_of(compared, compared.attention(image)[:, :, 0], image)
    marked = run(compared, image, blocks="all", mass=0.6)["maps"]
    assert set(np.unique(marked)) == {0, 1}
    held = (expected * marked).sum((-2, -1)) / expected.sum((-2, -1))
    lightest = np.where(marked == 1, expected, np.inf).min((-2, -1)) / expected.sum((-2, -1))
    assert (held > 0.6 - 1e-5).all()
    assert (held - lightest < 0.6 + 1e-5).all()


def test_pictures_of_every_block_and_head(compared: Compared, image: np.ndarray) -> None:
    maps = ranged(enlarged(patches_of(compared, compared.attention(image)[:, :, 0], image)))
    for block in range(DEPTH):
        for head in range(HEADS):
            picture = run(compared, image, blocks=[block], heads=[head], format="png")
            assert np.abs(picture / 255 - maps[block, head]).max() < 0.5 / 255 + 1e-5
    overlay = run(compared, image, blocks=[1], heads=[3], format="overlay", opacity=0.5, colormap="magma")
    opacity = 0.5 * np.sqrt(maps[1, 3])[:, :, None]
    expected = image + (coloured(maps[1, 3], "magma").astype(float) - image) * opacity
    assert np.abs(overlay - expected).max() < 2.6  # one level of the colour map, and rounding
    assert np.abs(overlay - expected).mean() < 0.4
