"""The engines that benchmarks/engine.py compares. All have the weights of one random network.

The model of transformers is initialised first, and its weights are converted for our engines. All engines therefore
compute the same function, and their outputs can be compared. Import this module after setting the environment variables
of OpenMP, which reads them when it is loaded.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.workers import onnx_session
from model.config import ViTConfig
from model.convert import convert
from model.engines import openvino_engine
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.protocol import OpenRequest
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec, Int8Weights, Precision
from model.vit import DinoVisionTransformer

FloatArray = npt.NDArray[np.float32]
Run = Callable[[FloatArray], FloatArray]
"""A function from pixels [B, 3, H, W] to class tokens [B, D]. It computes the whole forward pass."""


class MissingError(Exception):
    """An error that says why an engine cannot run on this machine."""


@dataclass(frozen=True)
class Case:
    """The network and the settings that every engine is built with."""

    config: ViTConfig
    theirs: Any  # transformers' model
    ours: DinoVisionTransformer
    size: int
    threads: int
    spinning: bool
    folder: Path


def make_case(config: ViTConfig, size: int, threads: int, *, spinning: bool, folder: Path) -> Case:
    """Return a case with one random network, as a model of transformers and as our model. LayerScale is 0.5, so that
    every block affects the output.
    """
    transformers = require("transformers")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    registers = config.num_register_tokens
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    theirs = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            mlp_ratio=int(config.mlp_ratio),
            image_size=config.img_size,
            patch_size=config.patch_size,
            use_swiglu_ffn=config.ffn == "swiglu",
            layerscale_value=0.5,
            **({"num_register_tokens": registers} if registers else {}),
        )
    ).eval()
    converted = convert({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, config)
    ours = DinoVisionTransformer(converted.config).eval()
    ours.load_state_dict({name: torch.from_numpy(a) for name, a in converted.arrays.items()}, strict=True)
    return Case(converted.config, theirs, ours, size, threads, spinning, folder)


def require(package: str) -> Any:
    """Import a module and return it.

    Raises:
        MissingError: the module is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingError(f"{package} is not installed ({error})") from error


def our_torch(case: Case, *, compiled: bool) -> Run:
    return _torch_run(case.ours.forward_features, "x_norm_clstoken", compiled=compiled)


def their_torch(case: Case, *, compiled: bool) -> Run:
    return _torch_run(lambda pixels: case.theirs(pixel_values=pixels), "pooler_output", compiled=compiled)


def _torch_run(model: Callable[[torch.Tensor], Any], output: str, *, compiled: bool) -> Run:
    function = torch.compile(model, dynamic=False) if compiled else model

    def run(pixels: FloatArray) -> FloatArray:
        with torch.inference_mode():
            return function(torch.from_numpy(pixels))[output].numpy()

    return run


def write_graph(case: Case, precision: Precision = "fp32", weights: Int8Weights = "s7", floats: str = "") -> Path:
    """Write our ONNX graph for the input size of the case and any batch size, and return its path.

    Args:
        case: the network and its settings.
        precision: precision of the graph.
        weights: weight format of an int8 graph; see `int8_weights` of `GraphSpec`.
        floats: layers that stay in float in an int8 graph, separated by commas; see `float_layers` of `GraphSpec`.
    """
    path = case.folder / f"ours-{case.size}-{precision}-{weights}-{floats}.onnx"
    if not path.exists():
        state = {key: tensor.numpy() for key, tensor in case.ours.state_dict().items()}
        left = tuple(floats.split(",")) if floats else ()
        spec = GraphSpec((case.size, case.size), precision, int8_weights=weights, float_layers=left)
        write_onnx(state, case.config, spec, path)
    return path


def our_onnx(case: Case, precision: Precision = "fp32", weights: Int8Weights = "s7", floats: str = "") -> Run:
    """Return a function that runs our graph in the ONNX Runtime engine of the service."""
    path = write_graph(case, precision, weights, floats)
    engine = OnnxEngine(path, threads=case.threads, spinning=case.spinning)
    return lambda pixels: engine.run(pixels).cls


def our_openvino(case: Case, precision: str = "fp32") -> Run:
    """Return a function that runs our float32 graph in the OpenVINO engine of the service.

    Raises:
        MissingError: OpenVINO is not installed, or the CPU has no bf16.
    """
    reason = openvino_engine.fault(OpenRequest(case.folder, "openvino", precision, case.threads))
    if reason:
        raise MissingError(reason)
    try:
        engine = openvino_engine.OpenVinoEngine(write_graph(case), threads=case.threads, precision=precision)
    except ModuleNotFoundError as error:
        raise MissingError(str(error)) from error
    return lambda pixels: engine.run(pixels).cls


def plain_export(case: Case, *, opset: int = 18) -> Run:
    """Return a function that runs the model of transformers in ONNX Runtime. The graph is exported by a
    plain `torch.onnx.export` and accepts any batch size.
    """
    require("onnxscript")
    path = case.folder / f"plain-{case.size}.onnx"
    example = torch.zeros(2, 3, case.size, case.size)  # with batch 1, the exporter would fix the batch size
    torch.onnx.export(
        _LastHidden(case.theirs).eval(),
        (example,),
        path,
        opset_version=opset,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        input_names=["pixels"],
        output_names=["tokens"],
        verbose=False,
    )
    session = onnx_session(path, case.threads, spinning=case.spinning)
    return lambda pixels: session.run(["tokens"], {"pixels": pixels})[0][:, 0]


class _LastHidden(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).last_hidden_state


BUILDERS: dict[str, Callable[[Case], Run]] = {
    "torch eager": partial(our_torch, compiled=False),
    "torch compiled": partial(our_torch, compiled=True),
    "ONNX Runtime fp32": our_onnx,
    "ONNX Runtime int8, s7": partial(our_onnx, precision="int8"),
    "int8 s7, fc2 and proj float": partial(our_onnx, precision="int8", floats="mlp.fc2,attn.proj"),
    "int8, the export's default": partial(our_onnx, precision="int8", floats="mlp.fc2,attn.proj,blocks.11"),
    "int8 u8, fc2 float": partial(our_onnx, precision="int8", weights="u8", floats="mlp.fc2"),
    "int8 u8, fc2 and proj float": partial(our_onnx, precision="int8", weights="u8", floats="mlp.fc2,attn.proj"),
    "transformers eager": partial(their_torch, compiled=False),
    "transformers compiled": partial(their_torch, compiled=True),
    "OpenVINO fp32": our_openvino,
    "OpenVINO bf16": partial(our_openvino, precision="bf16"),
    "plain export, opset 18": plain_export,
}
"""The function that builds each engine, by the name of its table row. The others are compared with the first."""


def products(threads: int, *, spinning: bool, n: int = 2048) -> tuple[float, dict[str, Callable[[], object]]]:
    """Prepare a float32 matrix product of n x n in torch and in ONNX Runtime. The faster one is the limit of the CPU.

    Returns:
        The number of floating-point operations of the product, and the two functions by name.
    """
    helper = require("onnx.helper")
    a, b = torch.randn(2, n, n)
    kind = 1  # TensorProto.FLOAT
    infos = {name: helper.make_tensor_value_info(name, kind, [n, n]) for name in "abc"}
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", [infos["a"], infos["b"]], [infos["c"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnx_session(model.SerializeToString(), threads, spinning=spinning)
    feed = {"a": a.numpy(), "b": b.numpy()}
    return 2 * n**3, {"product in torch": lambda: a @ b, "product in ONNX Runtime": lambda: session.run(["c"], feed)}


def versions() -> dict[str, str]:
    """Return the version of each runtime by package name, or "not installed" for a missing package."""
    found = {}
    for package in ("torch", "onnxruntime", "transformers", "openvino", "onnxscript"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
