"""What an export takes: the model, how it is written, and what is asked of a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.config import ViTConfig
from model.engines.knn_gate import LabelledImages
from model.engines.parity import Image
from model.onnx_graph.quantize import Int8Weights
from model.preprocess import PreprocessSpec

WeightsDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Backbone:
    """A model that can be exported.

    Attributes:
        name: the artifact's.
        weights: the state dict as arrays, Meta's names.
        config: the shape, with the position-embedding rule that the weights were trained with.
        preprocess: the transform that serving applies; its crop is the graph's input size.
        provenance: where the weights come from, as JSON.
        licence: SPDX identifier of the weights.
    """

    name: str
    weights: Mapping[str, npt.NDArray[np.floating]]
    config: ViTConfig
    preprocess: PreprocessSpec
    provenance: Mapping[str, Any]
    licence: str


@dataclass(frozen=True)
class ExportOptions:
    """How an artifact is written and compared.

    Attributes:
        weights_dtype: how weights are stored. Parity is against torch on the weights as stored.
        images: uint8 [H, W, 3] images for the parity check; None takes generated ones.
        labelled: images for the gate of int8 graphs; None: none of these graphs may serve.
        model_card: markdown that is put into the artifact.
        keep_onnx: False leaves the graphs out; `load_artifact` derives them again, byte for byte.
    """

    weights_dtype: WeightsDtype = "float32"
    images: Sequence[Image] | None = None
    labelled: LabelledImages | None = None
    model_card: str | None = None
    keep_onnx: bool = True


@dataclass(frozen=True)
class GraphOptions:
    """The further graphs that a command line asks for: every size in every precision.

    Attributes:
        sizes: "224" (square), "224x336" (H x W) or "dynamic"; none: the size of `model.onnx`.
        precisions: of `model.export.graphs.PRECISIONS`; none: fp32.
        outputs: cls, patches and registers, which serving reads, and any of attention and layer.N; none: those three.
        int8_weights, float_layers: of int8 graphs, see `GraphSpec`; None: `sensitive_layers`, since with them
            in int8 a trained model missed the gate (docs/decisions/0018-int8.md).
    """

    sizes: Sequence[str] = ()
    precisions: Sequence[str] = ()
    outputs: Sequence[str] = ()
    int8_weights: Int8Weights = "s7"
    float_layers: Sequence[str] | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """What is asked of a checkpoint.

    Attributes:
        arch: torch hub's name of the architecture; needed for files that do not say it (all but our own).
        name: the artifact's; default: what our own checkpoint's provenance names, else the architecture.
        resize, crop: of the preprocessing; default: what the checkpoint was evaluated with, else 256 and 224.
        licence: SPDX identifier of the weights; a published model brings its own.
        graphs: further graphs beside `model.onnx`.
    """

    arch: str | None = None
    name: str | None = None
    resize: int | None = None
    crop: int | None = None
    licence: str = "unknown"
    graphs: GraphOptions = GraphOptions()
