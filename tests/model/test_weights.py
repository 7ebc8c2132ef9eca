"""Tests that weights files are read without torch: names, types, and the shapes of every published backbone."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from model import config as model_config
from model.config import CONFIGS, ViTConfig
from model.convert import CheckpointError, backbone_shapes
from model.weights import read_tensors, read_weights
from tests.model.random_models import VARIANTS
from tests.model.torch_files import write_torch_file

SMALL = ViTConfig(embed_dim=16, depth=2, num_heads=2, img_size=56)


@pytest.fixture(autouse=True)
def small_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_config.CONFIGS, "small", SMALL)


def random_arrays(config: ViTConfig = SMALL, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in backbone_shapes(config).items()}


def save(path: Path, arrays: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """Write a safetensors file. The library's numpy interface cannot write bfloat16."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    data, header = b"", {}
    for name, array in arrays.items():
        start = len(data)
        data += array.astype(kinds[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *VARIANTS.values()])
def test_the_shapes_are_those_of_the_network(config: ViTConfig) -> None:
    torch = pytest.importorskip("torch", reason="shapes are compared with torch's: pip install '.[train]'")
    from model.vit import DinoVisionTransformer

    with torch.device("meta"):
        state = DinoVisionTransformer(config).state_dict()
    assert list(backbone_shapes(config).items()) == [(name, tuple(tensor.shape)) for name, tensor in state.items()]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_float_type_of_safetensors_becomes_float32(tmp_path: Path, dtype: str) -> None:
    arrays = random_arrays()
    save(tmp_path / "w", arrays, dtype)
    read, config = read_weights("small", tmp_path / "w")
    assert config == SMALL
    for name, array in arrays.items():
        assert read[name].dtype == np.float32
        np.testing.assert_allclose(read[name], array, rtol={"F32": 0, "F16": 1e-3, "BF16": 1e-2}[dtype], atol=1e-6)


def test_a_pytorch_file_and_a_safetensors_file_are_the_same_weights(tmp_path: Path) -> None:
    arrays = random_arrays()
    write_torch_file(tmp_path / "w.pth", arrays)
    save(tmp_path / "w.safetensors", arrays)
    first, second = (read_weights("small", tmp_path / f"w.{kind}") for kind in ("pth", "safetensors"))
    assert first[1] == second[1]
    assert list(first[0]) == list(second[0]) == list(backbone_shapes(SMALL))
    for name, array in arrays.items():
        np.testing.assert_array_equal(first[0][name], array)
        np.testing.assert_array_equal(second[0][name], array)


def test_a_type_that_no_weights_have(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="tensor x has the type U64"):
        read_tensors(tmp_path / "w")


def test_empty_tensors(tmp_path: Path) -> None:
    save(tmp_path / "w", {"x": np.zeros((0, 3), np.float32), "y": np.ones(1, np.float32)})
    assert {name: array.shape for name, array in read_tensors(tmp_path / "w").items()} == {"x": (0, 3), "y": (1,)}
