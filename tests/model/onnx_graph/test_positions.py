"""Compares the position embedding that the graph computes with those of numpy and torch."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from model.config import ViTConfig
from model.onnx_graph.nodes import GraphBuilder
from model.onnx_graph.positions import positions_for_any_grid
from model.pos_embed import resize_pos_embed
from tests.model.random_models import session

CONFIG = ViTConfig(embed_dim=8, depth=1, num_heads=1)  # 37 x 37 cells, as released
GRIDS = [(1, 1), (7, 16), (16, 16), (16, 24), (36, 38), (37, 37), (37, 16), (16, 37), (38, 37), (73, 5), (146, 2)]


@pytest.mark.parametrize("rule", ["offset", "antialias", "size"])
def test_equals_the_resized_embedding(rule: str) -> None:
    config = dataclasses.replace(CONFIG, pos_embed_rule=rule)
    pos_embed = np.random.default_rng(0).standard_normal((1, 1 + 37 * 37, 8), dtype=np.float32) * 0.1
    builder = GraphBuilder({"pos_embed": pos_embed})
    table = positions_for_any_grid(builder, config, "patch_map")
    patch_map = helper.make_tensor_value_info("patch_map", TensorProto.FLOAT, [1, 8, "h", "w"])
    output = helper.make_tensor_value_info(table, TensorProto.FLOAT, [1, "patches", 8])
    graph = helper.make_graph(builder.nodes, "positions", [patch_map], [output], builder.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    run = session(model).run
    for grid in GRIDS:
        found = run(None, {"patch_map": np.zeros((1, 8, *grid), np.float32)})[0]
        expected = resize_pos_embed(pos_embed, grid, rule)[:, 1:]
        if grid == (37, 37):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_only_plain_arithmetic() -> None:
    plain = {"Shape", "Squeeze", "Range", "Cast", "Reshape", "MatMul", "Where", "And", "Equal", "Less"}
    plain |= {"Abs", "Add", "Sub", "Mul", "Div", "Min", "Max", "ReduceSum"}
    for rule in ("offset", "antialias", "size"):
        config = dataclasses.replace(CONFIG, pos_embed_rule=rule)
        builder = GraphBuilder({"pos_embed": np.zeros((1, 1 + 37 * 37, 8), np.float32)})
        positions_for_any_grid(builder, config, "patch_map")
        assert {node.op_type for node in builder.nodes} <= plain
