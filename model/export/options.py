"""The options of an export: which model is exported, how it is written, and how a checkpoint is read."""

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
from model.zoo import DEFAULT_DOWNLOAD, DownloadOptions

WeightsDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Backbone:
    """A model that can be exported.

    Attributes:
        name: the artifact's name.
        weights: the state dict as arrays, under Meta's names.
        config: the shape, with the position-embedding rule that the weights were trained with.
        preprocess: the transform that serving applies. Its crop is the input size of `model.onnx`.
        provenance: the origin of the weights, as JSON.
        licence: the SPDX identifier of the weights' licence.
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
        weights_dtype: the type in which the weights are stored. The parity reference uses the stored weights.
        images: images for the parity check, uint8 [H, W, 3]; None: generated images.
        labelled: images for the k-NN gate of int8 graphs; None: no int8 graph may serve.
        model_card: the Markdown text of the artifact's README.md; None: no README.md.
        keep_onnx: if False, the artifact has no graphs, and `load_artifact` derives them again, byte for byte.
    """

    weights_dtype: WeightsDtype = "float32"
    images: Sequence[Image] | None = None
    labelled: LabelledImages | None = None
    model_card: str | None = None
    keep_onnx: bool = True


@dataclass(frozen=True)
class GraphOptions:
    """The graphs to export in addition to `model.onnx`: one for every size in every precision.

    Attributes:
        sizes: any of "224" (square), "224x336" (H x W) and "dynamic" (any size); empty: the size of `model.onnx`.
        precisions: any of `model.export.graphs.PRECISIONS`; empty: fp32.
        outputs: the outputs of each graph: cls, patches and registers, which serving needs, and optionally attention
            and layer.N; empty: cls, patches and registers.
        int8_weights: the form of the weights of int8 graphs; see `GraphSpec`.
        float_layers: the layers that int8 does not quantize; see `GraphSpec`. None: `sensitive_layers`, because a
            trained model with these layers in int8 failed the gate (docs/decisions/0018-int8.md).
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
        arch: the torch hub name of the architecture. It is required unless the file is one of our own checkpoints.
        name: the artifact's name; None: the name in our own checkpoint's provenance, else `arch`, else the file's stem.
        resize, crop: replace these fields of the preprocessing; None: the values that the checkpoint was evaluated
            with, else 256 and 224.
        licence: the SPDX identifier of the weights' licence. It is ignored for a published model.
        download: how a published model is downloaded.
        graphs: the graphs to export in addition to `model.onnx`.
    """

    arch: str | None = None
    name: str | None = None
    resize: int | None = None
    crop: int | None = None
    licence: str = "unknown"
    download: DownloadOptions = DEFAULT_DOWNLOAD
    graphs: GraphOptions = GraphOptions()
