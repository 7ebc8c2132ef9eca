"""The ONNX Runtime engine: the default on CPU, and on NVIDIA GPUs through its CUDA and TensorRT providers.

Threads of ONNX Runtime spin while they wait by default, which steals the cores that decode images for the next batch;
spinning is off here (figures: docs/decisions/0002-engine-threads.md).

On a CPU the standard `Attention` operator holds a whole T x T matrix a head, `com.microsoft.MultiHeadAttention` is
tiled: at many tokens it is faster and needs a fraction of the memory, at few it is a little slower
(docs/decisions/0017-attention-form.md). So a graph of many tokens has its attention nodes replaced in memory
as it is loaded; weights that lie beside the graph stay where they are.

A provider that was asked for answers or there is an error: ONNX Runtime itself would go on with its CPU kernels and say
so in its log only. The GPU providers have never run in this project; docs/engines.md says what has.

ONNX Runtime's released builds since 1.29 report to Microsoft (sessions, model hashes, a device id kept in ~/.cache)
unless a variable says no before the module loads; its own call to turn that off comes after a first event. A
self-hosted service reports to nobody, so `load_runtime`, the only place that imports it, says no first.

Legend: B batch, H x W pixels, T tokens, D width.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
from onnx import helper

from model.artifact import ONNX, Artifact, GraphRecord, derive_graph, graph_name
from model.engines.protocol import Features, FloatArray, OpenRequest
from model.onnx_graph.build import GraphSpec

Provider = Literal["cpu", "cuda", "tensorrt"]

TILED_ABOVE_TOKENS: Final = 1024
"""Patch tokens of an image from which a CPU session takes tiled attention."""

LARGEST_BATCH: Final = 64  # that TensorRT's profile is built for

_PROVIDER_OF: Final[dict[str, Provider]] = {
    "onnxruntime": "cpu",
    "onnxruntime-cuda": "cuda",
    "onnxruntime-tensorrt": "tensorrt",
}
_NAMES = {provider: name for name, provider in _PROVIDER_OF.items()}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_HEAVY = {"Conv", "MatMul", "Attention", "MultiHeadAttention", "LayerNormalization", "Gelu"}
_STATUS = {"failed": "failed", "not measured": "was not measured"}


def load_runtime() -> Any:
    """The module `onnxruntime`, which is told to report to nobody before it loads."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def fault(request: OpenRequest) -> str | None:
    """See `model.engines.protocol.EngineFile`: int8 without a passed gate, float32 without a graph."""
    artifact = request.artifact
    if request.precision == "int8":
        return _int8_fault(artifact)
    if _PROVIDER_OF[request.runtime] == "cpu" and request.precision == "fp32" and ONNX not in artifact.locations:
        return f"the artifact has no {ONNX}"
    return None


def open(request: OpenRequest) -> "OnnxEngine":
    """See `model.engines.protocol.EngineFile`. A graph that the artifact lacks is made from its weights, and kept."""
    provider, cache = _PROVIDER_OF[request.runtime], request.artifact.derived
    need_provider(provider)  # before a graph is made for it
    path = graph_file(request.artifact, request.precision, any_size=provider == "cpu")
    if provider == "tensorrt":
        cache.mkdir(parents=True, exist_ok=True)
    return OnnxEngine(
        path,
        threads=request.threads,
        precision=request.precision,
        provider=provider,
        cache_dir=cache,
        prepack=not request.few_passes,
    )


class OnnxEngine:
    """Runs one graph.

    Args:
        path: the graph; its external data lies beside it.
        threads: CPU threads of a forward pass.
        precision: what the graph was built as.
        provider: what computes; "cuda" and "tensorrt" need the package onnxruntime-gpu and a GPU.
        tiled: attention in its tiled form; None decides by the number of tokens, on a CPU only.
        cache_dir: where TensorRT keeps its engines and timings.
        spinning: let waiting threads spin.
        prepack: lay the weights out anew for the CPU: faster, and a second copy of them.

    Raises:
        ValueError: the file is not a model that ONNX Runtime loads, or the provider does not run it.
        ModuleNotFoundError: this build of ONNX Runtime does not have the provider.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        precision: str = "fp32",
        provider: Provider = "cpu",
        tiled: bool | None = None,
        cache_dir: Path | None = None,
        spinning: bool = False,
        prepack: bool = True,
    ) -> None:
        need_provider(provider)
        ort = load_runtime()
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's own unrelated class, or OSError
            raise ValueError(f"{path}: not an ONNX graph: {error}") from error
        self._largest_batch = LARGEST_BATCH if provider == "tensorrt" else None
        self.name, self.precision, self.device = _NAMES[provider], precision, "cpu" if provider == "cpu" else "cuda"
        self.outputs = tuple(output.name for output in model.graph.output)
        self.patch_size = _patch_size(model)
        self._shape: tuple[int | str, ...] = tuple(  # (3, H, W); a name where any size is taken
            dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]
        )
        tokens = self._tokens()
        self.tiled = tiled if tiled is not None else provider == "cpu" and (not tokens or tokens > TILED_ABOVE_TOKENS)
        options = _options(ort.SessionOptions(), threads, spinning, prepack, path)
        chosen = [provider] if provider != "tensorrt" else [provider, "cuda"]
        settings = [_settings(name, precision, self._shape, cache_dir or path.parent) for name in chosen]
        try:
            self._session: Any = ort.InferenceSession(
                _with_tiled_attention(model) if self.tiled else str(path),
                options,
                providers=[_PROVIDERS[name] for name in chosen],
                provider_options=settings,
                enable_fallback=0,  # on a fault of the GPU it would go on with the CPU, then and in every later pass
            )
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            raise ValueError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        started = self._session.get_providers()
        if _PROVIDERS[provider] not in started:
            raise ValueError(f"ONNX Runtime could not start {_PROVIDERS[provider]}; it would go on with {started[0]}")
        if provider != "cpu":
            _check_assignment(self._session, provider)

    def run(self, pixels: FloatArray) -> Features:
        """See `model.engines.protocol.Engine`."""
        return Features(**self.run_outputs(pixels, Features._fields))

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Chosen outputs of a batch of normalised pixels [B, 3, H, W], float32.

        Raises:
            ValueError: a shape that the graph does not take, or an output that it does not have.
        """
        self._check_shape(pixels.shape)
        missing = [name for name in names if name not in self.outputs]
        if missing:
            raise ValueError(f"this graph has no output {missing[0]!r}: it has {', '.join(self.outputs)}")
        step = self._largest_batch or len(pixels)  # beyond its profile TensorRT would build anew, for minutes
        parts = [self._session.run(list(names), {"pixels": pixels[i : i + step]}) for i in range(0, len(pixels), step)]
        found = parts[0] if len(parts) == 1 else [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return {name: np.asarray(array, dtype=np.float32) for name, array in zip(names, found, strict=True)}

    def close(self) -> None:
        """See `model.engines.protocol.Engine`."""
        self._session = None

    def _tokens(self) -> int:
        """Patch tokens of an image; 0 where any size is taken."""
        _, height, width = self._shape
        if isinstance(height, str) or isinstance(width, str):
            return 0
        return (height // self.patch_size) * (width // self.patch_size)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        p = self.patch_size
        fits = len(shape) == 4 and shape[0] >= 1 and shape[1] == 3
        if self._tokens():
            if not fits or shape[1:] != self._shape:
                allowed = ", ".join(map(str, self._shape))
                raise ValueError(f"pixels of shape {shape}: this model takes [B, {allowed}]")
        elif not fits or any(side < p or side % p for side in shape[2:]):
            raise ValueError(f"pixels of shape {shape}: this model takes [B, 3, H, W], H and W multiples of {p}")


def need_provider(provider: Provider) -> None:
    """Raise unless the installed ONNX Runtime was built with a provider.

    Raises:
        ModuleNotFoundError: it was not.
    """
    ort = load_runtime()
    if provider != "cpu":
        # CUDA as pip's wheels bring it: the GPU build itself looks only where the system keeps it. Builds whose CUDA
        # provider is a plugin register it only when these load, so this comes before the question.
        with redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()
    if _PROVIDERS[provider] not in ort.get_available_providers():
        raise ModuleNotFoundError(
            f"this ONNX Runtime has no {_PROVIDERS[provider]}: pip install onnxruntime-gpu instead of onnxruntime"
        )


def graph_of(artifact: Artifact, precision: str) -> GraphRecord | None:
    """The artifact's graph of this precision for its input size: one of that size, else a dynamic one."""
    graphs = [graph for graph in artifact.manifest.graphs if graph.precision == precision]
    usable = [graph for graph in graphs if graph.size in (artifact.manifest.input_size, None)]
    return min(usable, key=lambda graph: graph.size is None, default=None)


def graph_file(artifact: Artifact, precision: str, *, any_size: bool = True) -> Path:
    """The graph's file: the artifact's, or one that this host makes from the weights and keeps.

    `any_size`: a dynamic graph will do. TensorRT takes none.
    """
    if precision == "fp32" and ONNX in artifact.locations:
        return artifact.file(ONNX)
    if (graph := graph_of(artifact, precision)) is not None and (any_size or graph.size is not None):
        return artifact.file(graph.file)
    size = artifact.manifest.input_size
    path = artifact.derived / graph_name(size, precision)
    if not path.exists():
        spec = GraphSpec(size=size, precision=_derived_precision(precision))
        derive_graph(artifact.weights, artifact.manifest.config, spec, path)
    return path


def _derived_precision(precision: str) -> Literal["fp32", "fp16", "bf16"]:
    for known in ("fp32", "fp16", "bf16"):
        if precision == known:
            return known
    raise AssertionError(precision)  # int8 is never derived: its gate belongs to the artifact


def _int8_fault(artifact: Artifact) -> str | None:
    graph = graph_of(artifact, "int8")
    if graph is None:
        return "the artifact has no int8 graph of its input size: dinov2 export --precision fp32,int8"
    gates = [record.gate for record in artifact.manifest.parity if record.file == graph.file and record.gate]
    if not gates:
        return f"{graph.file} has no gate in the manifest"
    bad = [gate for gate in gates if gate.status != "passed"]
    return f"the gate of {graph.file} {_STATUS[bad[0].status]}: {bad[0].reason}" if bad else None


def _options(options: Any, threads: int, spinning: bool, prepack: bool, path: Path) -> Any:
    """Fill a session's options."""
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    entries = {
        "session.intra_op.allow_spinning": "1" if spinning else "0",
        "session.model_external_initializers_file_folder_path": str(path.parent),
        "session.record_ep_graph_assignment_info": "1",
        "session.disable_prepacking": "0" if prepack else "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _settings(provider: str, precision: str, shape: Sequence[int | str], cache_dir: Path) -> dict[str, str]:
    """A provider's options. TensorRT's need fixed sizes, and its engines are kept: a build takes minutes."""
    if provider == "cpu":
        return {}
    if provider == "cuda":
        return {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    if any(isinstance(side, str) for side in shape):
        raise ValueError("the TensorRT provider takes a graph of one size, not a dynamic one")
    settings = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache_dir),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache_dir),
    }
    for name, batch in (("min", 1), ("opt", 16), ("max", LARGEST_BATCH)):
        settings[f"trt_profile_{name}_shapes"] = f"pixels:{'x'.join(map(str, (batch, *shape)))}"
    if precision in ("fp16", "bf16"):
        settings[f"trt_{precision}_enable"] = "True"
    return settings


def _with_tiled_attention(model: onnx.ModelProto) -> bytes:
    """The graph with `com.microsoft.MultiHeadAttention` in place of each standard `Attention`, serialized."""
    for node in model.graph.node:
        if node.op_type == "Attention" and not node.domain:
            given: Mapping[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            kept = {"num_heads": given["q_num_heads"]} | {k: v for k, v in given.items() if k == "scale"}
            node.CopyFrom(
                helper.make_node(
                    "MultiHeadAttention",
                    list(node.input),
                    list(node.output),
                    name=node.name,
                    domain="com.microsoft",
                    **kept,
                )
            )
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    serialized: bytes = model.SerializeToString()
    return serialized


def _patch_size(model: onnx.ModelProto) -> int:
    for node in model.graph.node:
        if node.op_type == "Conv":
            return next(int(a.ints[0]) for a in node.attribute if a.name == "strides")
    raise ValueError(f"the graph {model.graph.name!r} has no patch embedding (Conv)")


def _check_assignment(session: Any, provider: Provider) -> None:
    """Raise when the provider leaves one of the operators that take time to the CPU.

    Raises:
        ValueError: it does; the message names the operators.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24: the provider's start has to do
        return
    parts = session.get_provider_graph_assignment_info()
    left = {node.op_type for part in parts if part.ep_name.startswith("CPU") for node in part.get_nodes()} & _HEAVY
    if left:
        raise ValueError(f"{_PROVIDERS[provider]} does not run {', '.join(sorted(left))} of this graph")
