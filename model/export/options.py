"""The options of an export: the model, how it is written, and how a checkpoint is read."""

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
        name: the artifact's name.
        weights: the state dict as arrays, under Meta's names.
        config: the shape, with the position-embedding rule that the weights were trained with.
        preprocess: the transform that serving applies; its crop is the graph's input size.
        provenance: the origin of the weights, as JSON.
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
        weights_dtype: the stored type of the weights. Parity is measured against torch on the stored weights.
        images: uint8 [H, W, 3] images for the parity check; None: generated images.
        labelled: images for the gate of int8 graphs; None: no int8 graph may serve.
        model_card: markdown for the artifact's README.md.
        keep_onnx: False leaves the graphs out; `load_artifact` derives them again, byte for byte.
    """

    weights_dtype: WeightsDtype = "float32"
    images: Sequence[Image] | None = None
    labelled: LabelledImages | None = None
    model_card: str | None = None
    keep_onnx: bool = True


@dataclass(frozen=True)
class GraphOptions:
    """The further graphs that a command line selects: every size in every precision.

    Attributes:
        sizes: "224" (square), "224x336" (H x W) or "dynamic"; empty: the size of `model.onnx`.
        precisions: names from `model.export.graphs.PRECISIONS`; empty: fp32.
        outputs: cls, patches and registers, which serving reads, plus any of attention and layer.N; empty: those three.
        int8_weights: for int8 graphs, see `GraphSpec`.
        float_layers: for int8 graphs, see `GraphSpec`; None: `sensitive_layers`, because a trained model with these
            layers in int8 failed the gate (docs/decisions/0018-int8.md).
    """

    sizes: Sequence[str] = ()
    precisions: Sequence[str] = ()
    outputs: Sequence[str] = ()
    int8_weights: Int8Weights = "s7"
    float_layers: Sequence[str] | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """How a checkpoint is read.

    Attributes:
        arch: torch hub's name of the architecture; required for files that do not record it (all but our own).
        name: the artifact's name; default: the name in our own checkpoint's provenance, else the architecture.
        resize, crop: override the preprocessing; default: as the checkpoint was evaluated, else 256 and 224.
        licence: SPDX identifier of the weights; a published model has its own.
        graphs: graphs in addition to `model.onnx`.
    """

    arch: str | None = None
    name: str | None = None
    resize: int | None = None
    crop: int | None = None
    licence: str = "unknown"
    graphs: GraphOptions = GraphOptions()
