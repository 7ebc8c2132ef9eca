"""Selects the graphs to export in addition to `model.onnx`, from the command-line options."""

import re
from collections.abc import Sequence
from dataclasses import replace

from model.config import ViTConfig
from model.engines.protocol import Features
from model.export.options import GraphOptions
from model.onnx_graph.spec import GraphSpec, Precision

PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"}


def wanted_graphs(config: ViTConfig, size: tuple[int, int], asked: GraphOptions) -> list[GraphSpec]:
    """Return the specs of the graphs that the options select. The spec of `model.onnx` itself is left out.

    Args:
        config: the model's shape.
        size: the input (H, W) of `model.onnx` in pixels.
        asked: the options.

    Raises:
        ValueError: an option has a value that is not allowed. The message names the value and the allowed ones.
    """
    for precision in asked.precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
    if asked.float_layers and "int8" not in asked.precisions:
        raise ValueError(f"float layers {','.join(asked.float_layers)} apply to int8, which is not a chosen precision")
    outputs = _outputs(config, asked.outputs)
    wanted = [_parse_size(text, config.patch_size) for text in asked.sizes] or [size]
    specs = []
    for text in asked.precisions or ["fp32"]:
        spec = GraphSpec(size=size, precision=PRECISIONS[text], outputs=outputs)
        if text == "int8":
            left = sensitive_layers(config) if asked.float_layers is None else tuple(asked.float_layers)
            spec = replace(spec, int8_weights=asked.int8_weights, float_layers=left)
        specs.append(spec)
    every = dict.fromkeys(replace(spec, size=each) for each in wanted for spec in specs)
    return [spec for spec in every if spec != GraphSpec(size=size)]


def _outputs(config: ViTConfig, asked: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(asked) or Features._fields
    allowed = [*Features._fields, "attention", *(f"layer.{i}" for i in range(config.depth))]
    for output in chosen:
        if output not in allowed:
            raise ValueError(f"output {output!r}: one of {', '.join(allowed[:4])}, layer.0 to layer.{config.depth - 1}")
        if chosen.count(output) > 1:
            raise ValueError(f"output {output!r} is given twice")
    missing = [name for name in Features._fields if name not in chosen]
    if missing:
        raise ValueError(f"outputs {','.join(chosen)}: {', '.join(missing)} must be included for serving")
    return chosen


def sensitive_layers(config: ViTConfig) -> tuple[str, ...]:
    """Return names that select the linear layers that int8 does not quantize by default.

    They are the last layer of each residual branch, and all layers of the last block. Quantization errors in these
    layers affect the features most directly.
    """
    return "attn.proj", "mlp.fc2" if config.ffn == "mlp" else "mlp.w3", f"blocks.{config.depth - 1}"


def _parse_size(text: str, patch_size: int) -> tuple[int, int] | None:
    if text == "dynamic":
        return None
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < patch_size or any(side % patch_size for side in sides):
        raise ValueError(
            f"size {text!r}: must be a multiple of the patch size {patch_size} (e.g. {16 * patch_size}), two of them "
            f"joined by x (height x width), or dynamic"
        )
    return sides
