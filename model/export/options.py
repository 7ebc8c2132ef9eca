"""The options of an export, which define the model, how it is read from a checkpoint, and how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.config import ViTConfig
from model.engines.knn_gate import LabelledImages
from model.engines.parity import Image
from model.files import name_problem
from model.onnx_graph.spec import Int8Weights
from model.preprocess import Fit, PreprocessSpec
from model.zoo import DEFAULT_DOWNLOAD, DownloadOptions

WeightsDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Backbone:
    """A model that can be exported.

    Attributes:
        name: the artifact's name.
        weights: the backbone's state dict as arrays, keyed by Meta's names.
        config: the shape of the backbone, including the rule for resizing its position embedding.
        preprocess: the transform that serving applies to images. Its crop is the input size of `model.onnx`.
        provenance: the origin of the weights. It is stored as JSON.
        licence: the SPDX identifier of the weights' licence.

    Raises:
        ValueError: the name cannot be the name of a folder.
    """

    name: str
    weights: Mapping[str, npt.NDArray[np.floating]]
    config: ViTConfig
    preprocess: PreprocessSpec
    provenance: Mapping[str, Any]
    licence: str

    def __post_init__(self) -> None:
        if problem := name_problem(self.name):
            raise ValueError(f"{problem} (--name sets another name)")


@dataclass(frozen=True)
class ExportOptions:
    """The options for writing and comparing an artifact.

    Attributes:
        weights_dtype: the type in which the weights are stored. The graphs and the reference that they are compared
            with both use the stored weights.
        images: the images for the comparison, uint8 [H, W, 3]. If None, images are generated.
        labelled: the images for the k-NN gate of int8 graphs. If None, int8 graphs cannot be used for serving.
        model_card: the Markdown text of the artifact's README.md. If None, no README.md is written.
        keep_onnx: whether the graphs are stored in the artifact. If False, `load_artifact` builds byte-identical graphs
            from the weights.
    """

    weights_dtype: WeightsDtype = "float32"
    images: Sequence[Image] | None = None
    labelled: LabelledImages | None = None
    model_card: str | None = None
    keep_onnx: bool = True


@dataclass(frozen=True)
class GraphOptions:
    """The options for the graphs that are exported in addition to `model.onnx`.

    One graph is exported for each combination of a size and a precision.

    Attributes:
        sizes: a list of sizes such as "224" (square), "224x336" (H x W) and "dynamic" (any size). If empty, the size of
            `model.onnx` is used.
        precisions: names from `model.export.graphs.PRECISIONS`. If empty, fp32 is used.
        outputs: the outputs of each graph. They must include cls, patches and registers, which serving needs, and can
            also include attention and layer.N. If empty, the outputs are cls, patches and registers.
        int8_weights: the form in which int8 graphs store their weights (see `GraphSpec`).
        float_layers: the layers that int8 does not quantize (see `GraphSpec`). The default, None, means the layers that
            `sensitive_layers` returns, because a trained model with these layers in int8 failed the k-NN gate
            (docs/decisions/0018-int8.md).
    """

    sizes: Sequence[str] = ()
    precisions: Sequence[str] = ()
    outputs: Sequence[str] = ()
    int8_weights: Int8Weights = "s7"
    float_layers: Sequence[str] | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """The options for reading a checkpoint, and the graphs to export.

    Attributes:
        arch: the torch hub name of the architecture. It is required for a file that does not contain its architecture.
        name: the artifact's name. If None, it is the name in the checkpoint or in the artifact, else the name of the
            architecture, else the name of the run's folder or of the file.
        resize, crop, fit: the values for these fields of `PreprocessSpec`. If one is None, the value with which the
            checkpoint was evaluated is used. If that is unknown, the default is used: 256, 224 and "crop". If `fit` is
            "pad" or "squash", `resize` must be None, and the model has no `resize`.
        licence: the SPDX identifier of the weights' licence. It is ignored for a published model and for an artifact.
        download: the options for downloading a published model.
        graphs: the graphs to export in addition to `model.onnx`.

    Raises:
        ValueError: `name` cannot be the name of a folder.
    """

    arch: str | None = None
    name: str | None = None
    resize: int | None = None
    crop: int | None = None
    fit: Fit | None = None
    licence: str = "unknown"
    download: DownloadOptions = DEFAULT_DOWNLOAD
    graphs: GraphOptions = GraphOptions()

    def __post_init__(self) -> None:
        if self.name is not None and (problem := name_problem(self.name)):
            raise ValueError(problem)
