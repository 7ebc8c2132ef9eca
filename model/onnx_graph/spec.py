"""The options of a graph, without the packages that build it.

The manifest of an artifact contains these options, so a command that only reads manifests imports this module.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

GRAPH_SUFFIXES: Final = (".onnx", ".onnx.data")
INNER_TENSORS = {"queries": "blocks.{}.attn.q", "keys": "blocks.{}.attn.k", "tokens": "blocks.{}.mlp.residual"}
"""The tensors of block {} that an engine can return as inner outputs (see `model/engines/protocol.py`), keyed by the
first part of the output's name."""
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
AttentionForm = Literal["standard", "tiled", "upcast"]
Int8Weights = Literal["s7", "u8"]
"""The forms of int8 weights, which `model/onnx_graph/quantize.py` describes."""


@dataclass(frozen=True)
class GraphSpec:
    """The options of a backbone's graph.

    `size` is the fixed input size (H, W) in pixels. If `size` is None, the graph accepts any multiples of the patch
    size. `model/onnx_graph/linear.py` describes each `precision`.

    `attention` selects the operator. "standard" is ONNX's `Attention` (opset 23). "tiled" is ONNX Runtime's
    `MultiHeadAttention`, which on a CPU needs memory linear in the number of tokens. "upcast" is `Attention` with
    queries, keys and values cast to float32. If they are float32 already, "upcast" is the same as "standard".

    `int8_weights` is the form of int8 weights (see `model/onnx_graph/quantize.py`). `float_layers` names linear layers
    that int8 and fp8 do not quantize. Each entry is a full name ("blocks.3.mlp.fc2"), an ending ("mlp.fc2", in all
    blocks) or a beginning ("blocks.3").

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    size: tuple[int, int] | None
    precision: Precision = "fp32"
    outputs: tuple[str, ...] = ("cls", "patches", "registers")
    attention: AttentionForm = "standard"
    int8_weights: Int8Weights = "s7"
    float_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("precision", Precision), ("attention", AttentionForm), ("int8_weights", Int8Weights)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.float_layers and self.precision not in ("int8", "fp8"):
            raise ValueError(f"float_layers apply to int8 and fp8, not to {self.precision}")
