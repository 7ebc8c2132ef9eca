"""The graph against torch, for every kind of block, with LayerScale far from one so that a lost one shows."""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from model.config import ViTConfig
from model.onnx_graph import GraphSpec, build_onnx, write_onnx

torch = pytest.importorskip("torch", reason="torch is the reference: pip install '.[train]'")

BASE = ViTConfig(embed_dim=64, depth=3, num_heads=4, patch_size=14, img_size=98, layerscale_init=0.3)
VARIANTS = {
    "mlp": BASE,
    "swiglu": dataclasses.replace(BASE, ffn="swiglu"),
    "registers": dataclasses.replace(BASE, num_register_tokens=4, pos_embed_rule="antialias"),
    "no layerscale": dataclasses.replace(BASE, layerscale_init=None, pos_embed_rule="size"),
}


def random_model(config: ViTConfig, seed: int = 0):
    from model.vit import DinoVisionTransformer

    torch.manual_seed(seed)
    model = DinoVisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def arrays(model) -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(98, 98), (70, 126)])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_torch(variant: str, size: tuple[int, int], batch: int) -> None:
    config = VARIANTS[variant]
    model = random_model(config)
    graph = build_onnx(arrays(model), config, GraphSpec(size))
    onnx.checker.check_model(graph, full_check=True)
    session = ort.InferenceSession(graph.SerializeToString())
    pixels = np.random.default_rng(1).standard_normal((batch, 3, *size), dtype=np.float32)
    cls, patches, registers = session.run(["cls", "patches", "registers"], {"pixels": pixels})
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(pixels))
    np.testing.assert_allclose(cls, expected["x_norm_clstoken"], atol=2e-5)
    np.testing.assert_allclose(patches, expected["x_norm_patchtokens"], atol=2e-5)
    np.testing.assert_allclose(registers, expected["x_norm_regtokens"], atol=2e-5)
    assert np.abs(cls).max() > 0.1


def test_one_fused_attention_a_block_and_nothing_that_breaks_fusion() -> None:
    graph = build_onnx(arrays(random_model(BASE)), BASE, GraphSpec((98, 98))).graph
    census = Counter(node.op_type for node in graph.node)
    assert census["Attention"] == BASE.depth
    assert census["LayerNormalization"] == 2 * BASE.depth + 1
    assert not census.keys() & {"Softmax", "IsNaN", "Resize", "Erf"}
    assert not any("gamma" in initializer.name for initializer in graph.initializer)


def test_same_weights_same_bytes(tmp_path) -> None:
    weights = arrays(random_model(BASE))
    write_onnx(weights, BASE, GraphSpec((98, 98)), tmp_path / "a.onnx")
    shuffled = dict(reversed(weights.items()))
    write_onnx(shuffled, BASE, GraphSpec((98, 98)), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_large_weights_go_beside_the_graph(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("model.onnx_graph.EXTERNAL_ABOVE_BYTES", 1000)
    model = random_model(BASE)
    names = write_onnx(arrays(model), BASE, GraphSpec((98, 98)), tmp_path / "model.onnx")
    assert names == ["model.onnx", "model.onnx.data"]
    pixels = np.zeros((1, 3, 98, 98), np.float32)
    cls = ort.InferenceSession(tmp_path / "model.onnx").run(["cls"], {"pixels": pixels})[0]
    with torch.no_grad():
        np.testing.assert_allclose(cls, model(torch.from_numpy(pixels)), atol=2e-5)


@pytest.mark.parametrize("size", [(98, 97), (0, 98)])
def test_size_off_the_patch_grid_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 14"):
        build_onnx({}, BASE, GraphSpec(size))
