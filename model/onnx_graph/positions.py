"""Computes the position embedding inside the graph, for inputs of any size.

`model/pos_embed.py` resizes with one small matrix per axis. The graph computes the same matrices from its input size,
with basic arithmetic that every runtime supports. ONNX's `Resize` is not used, because runtimes implement its
antialiased cubic mode differently, and TensorRT does not support this mode.

A matrix resizes an axis from M stored positions to n patches. Its element (i, j) is the value of the cubic kernel at
the distance between output cell i and input cell j. For each rule the distance is a quotient of integers, so the graph
computes numerator and denominator exactly in float32 and rounds once:

- offset: |10 M (2i+1) - (10 n + 1)(2j+1)| / (2 (10 n + 1))
- size: |M (2i+1) - n (2j+1)| / (2 n)
- antialias: |M (2i+1) - n (2j+1)| / (2 max(n, M)), because the kernel widens when the grid shrinks. Each row is then
  divided by its sum.

The two rules without antialiasing repeat the positions at the border. For these rules, the grid of positions is
therefore padded on every side by two cells, the reach of the kernel. If n = M, the matrix is the identity for the rules
`size` and `antialias`. For `offset`, the graph explicitly selects the identity if n = M on both axes.
"""

import numpy as np

from model.config import ViTConfig
from model.onnx_graph.nodes import GraphBuilder

REACH = 2  # cells on either side of a sampling point that the cubic kernel covers


def positions_for_any_grid(graph: GraphBuilder, config: ViTConfig, patch_map: str) -> str:
    """Add nodes that compute the position embedding [1, h*w, D] for `patch_map` [B, D, h, w], and return its name.

    The embedding is the same as the result of `resize_pos_embed`, but without the class token's position.
    """
    side, dim = config.grid, config.embed_dim
    cells = graph.weight("pos_embed")[0, 1:].reshape(side, side, dim)
    if config.pos_embed_rule != "antialias":
        cells = np.pad(cells, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    rows, columns = _axis(graph, config, patch_map, 2, "rows"), _axis(graph, config, patch_map, 3, "columns")
    if config.pos_embed_rule == "offset":
        native = graph.node("And", ["pos_embed.rows.native", "pos_embed.columns.native"], "pos_embed.native")
        rows = graph.node("Where", [native, "pos_embed.rows.same", rows], "pos_embed.rows.chosen")
        columns = graph.node("Where", [native, "pos_embed.columns.same", columns], "pos_embed.columns.chosen")
    width = cells.shape[1]  # M, or M + 4 with the border
    table = graph.constant("pos_embed", cells.reshape(cells.shape[0], width * dim))
    by_row = graph.node("MatMul", [rows, table], "pos_embed.by_row")  # [h, width * D]
    shape = graph.constant("pos_embed.by_row_shape", np.array([-1, width, dim], np.int64))
    by_row = graph.node("Reshape", [by_row, shape], "pos_embed.by_row_cells")  # [h, width, D]
    resized = graph.node("MatMul", [columns, by_row], "pos_embed.resized")  # [w, width] @ [h, width, D] -> [h, w, D]
    flat = graph.constant("pos_embed.flat_shape", np.array([1, -1, dim], np.int64))
    return graph.node("Reshape", [resized, flat], "pos_embed.flat")


def _axis(graph: GraphBuilder, config: ViTConfig, patch_map: str, axis: int, name: str) -> str:
    """Add nodes that compute the resize matrix of one axis of `patch_map`, and return the name of the matrix.

    For n patches along the axis and M stored positions, the matrix is [n, M], or [n, M + 4] if the positions are padded
    by two cells on each side.
    """
    side, rule, key = config.grid, config.pos_embed_rule, f"pos_embed.{name}"
    border = 0 if rule == "antialias" else REACH
    tenths = (10, 1) if rule == "offset" else (1, 0)  # offset: n + 0.1 and M, times 10, are integers

    def number(label: str, value: float) -> str:
        return graph.constant(f"pos_embed.{label}", np.array(value, np.float32))

    size = graph.node("Shape", [patch_map], f"{key}.size", start=axis, end=axis + 1)  # [1]
    count = graph.node("Squeeze", [size, graph.constant("pos_embed.first", np.array([0], np.int64))], f"{key}.count")
    zero = graph.constant("pos_embed.zero", np.array(0, np.int64))
    one = graph.constant("pos_embed.one", np.array(1, np.int64))
    indices = graph.node("Range", [zero, count, one], f"{key}.indices")
    indices = graph.node("Cast", [indices], f"{key}.indices_float", to=1)
    column = graph.constant("pos_embed.column_shape", np.array([-1, 1], np.int64))
    i = graph.node("Reshape", [indices, column], f"{key}.i")  # [n, 1]
    n = graph.node("Cast", [size], f"{key}.n", to=1)  # [1]
    if rule == "offset":
        n = graph.node("Mul", [n, number("ten", tenths[0])], f"{key}.n_times_ten")
        n = graph.node("Add", [n, number("tenth", tenths[1])], f"{key}.n_and_tenth")

    doubled = graph.node("Mul", [i, number("two_cells", 2 * side * tenths[0])], f"{key}.i_doubled")
    target = graph.node("Add", [doubled, number("cells", side * tenths[0])], f"{key}.target")  # (2i+1) M
    j = np.arange(-border, side + border, dtype=np.float32)
    odd = graph.constant("pos_embed.odd", 2 * j[None] + 1)  # [1, M or M + 4]
    source = graph.node("Mul", [odd, n], f"{key}.source")
    apart = graph.node("Abs", [graph.node("Sub", [target, source], f"{key}.difference")], f"{key}.apart")
    span = graph.node("Max", [n, number("side", side)], f"{key}.span") if rule == "antialias" else n
    unit = graph.node("Mul", [span, number("two", 2)], f"{key}.unit")
    distance = graph.node("Div", [apart, unit], f"{key}.distance")
    matrix = _cubic(graph, distance, key, -0.5 if rule == "antialias" else -0.75)
    if rule == "antialias":
        total = graph.node(
            "ReduceSum",
            [matrix, graph.constant("pos_embed.last", np.array([-1], np.int64))],
            f"{key}.total",
            keepdims=1,
        )
        matrix = graph.node("Div", [matrix, total], f"{key}.normalised")
    if rule == "offset":
        native = graph.constant("pos_embed.native_side", np.array([side], np.int64))
        graph.node("Equal", [size, native], f"{key}.native")
        is_same = graph.node("Equal", [i, graph.constant("pos_embed.j", j[None])], f"{key}.is_same")
        graph.node("Cast", [is_same], f"{key}.same", to=1)
    return matrix


def _cubic(graph: GraphBuilder, distance: str, key: str, a: float) -> str:
    """Add nodes that evaluate Keys' cubic kernel with parameter `a` at each distance d, and return their output's name.

    This form of the kernel avoids cancellation: (d - 1) * ((a + 2) d^2 - d - 1) for d up to 1, (d - 1) * a (d - 2)^2
    for d up to 2, and zero beyond.
    """

    def number(label: str, value: float) -> str:
        return graph.constant(f"pos_embed.{label}", np.array(value, np.float32))

    one, two = number("one_float", 1), number("two", 2)
    d = graph.node("Min", [distance, two], f"{key}.d")
    less_one = graph.node("Sub", [d, one], f"{key}.less_one")
    less_two = graph.node("Sub", [d, two], f"{key}.less_two")
    far = graph.node(
        "Mul", [graph.node("Mul", [less_two, less_two], f"{key}.far_square"), number("a", a)], f"{key}.far"
    )
    near = graph.node("Mul", [d, number("a_and_two", a + 2)], f"{key}.near_slope")
    near = graph.node("Mul", [graph.node("Sub", [near, one], f"{key}.near_inner"), d], f"{key}.near_product")
    near = graph.node("Sub", [near, one], f"{key}.near")
    is_near = graph.node("Less", [d, one], f"{key}.is_near")
    factor = graph.node("Where", [is_near, near, far], f"{key}.factor")
    return graph.node("Mul", [less_one, factor], f"{key}.kernel")
