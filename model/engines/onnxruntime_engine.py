"""The ONNX Runtime engine. It is the default on a CPU, and runs on NVIDIA GPUs through the CUDA provider.

By default, ONNX Runtime's threads spin while they wait, which takes cores away from decoding the next batch. This
engine turns spinning off (measurements: docs/decisions/0002-engine-threads.md).

On a CPU, the standard `Attention` operator stores the whole T x T attention matrix of each head.
`com.microsoft.MultiHeadAttention` computes the matrix in tiles. With many tokens, this is faster and needs a fraction
of the memory. With few tokens, it is slightly slower (docs/decisions/0017-attention-form.md). When the engine loads a
graph with many tokens, it therefore replaces the attention nodes in memory. The graph's files do not change.

If a requested provider cannot run a graph, the engine raises an error. By default, ONNX Runtime would only log this and
continue on the CPU. The CUDA provider has never run in this project. docs/engines.md lists the engines that have
been run.

Attention maps and heads need the results of inner layers (*inner outputs*, see `model/engines/protocol.py`). These
tensors exist in every graph, but have to be marked as outputs when a session loads the graph. Passes of such a session
take about 4 % longer (docs/decisions/0030-inner-outputs.md). The engine therefore opens a second session for them when
they are needed for the first time. It needs memory for another copy of the weights.

ONNX Runtime's official builds since 1.29 send telemetry to Microsoft (sessions, model hashes, a device id stored in
~/.cache) unless an environment variable disables it before the module loads. The API call that disables telemetry is
too late for the first event. A self-hosted service must not report to anyone, so `load_runtime`, the only function that
imports the module, sets the variable first.

Legend: B batch, H x W pixels, T tokens, D width.
"""

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from model.artifact import ONNX, Artifact, GraphRecord, derive_graph, graph_name
from model.engines.protocol import Features, FloatArray, OpenRequest
from model.onnx_graph.spec import INNER_TENSORS, GraphSpec

if TYPE_CHECKING:
    import onnx  # imported when a graph is read, because every command that names an engine imports this module

Provider = Literal["cpu", "cuda"]
Inner = Literal["no", "on demand", "always"]

TILED_ABOVE_TOKENS: Final = 1024
"""A CPU session uses tiled attention for images with more patch tokens than this."""

_PROVIDER_OF: Final[dict[str, Provider]] = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
_NAMES = {provider: name for name, provider in _PROVIDER_OF.items()}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SETTINGS: Final[dict[Provider, dict[str, str]]] = {
    "cpu": {},
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}
_FLOAT_COPY = ".float"
_HEAVY = {"Conv", "MatMul", "Attention", "MultiHeadAttention", "LayerNormalization", "Gelu"}
_STATUS = {"failed": "failed", "not measured": "was not measured"}


def load_runtime() -> Any:
    """Import the module `onnxruntime` with its telemetry disabled, and return the module."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def fault(request: OpenRequest) -> str | None:
    """Return the reason why the engine cannot serve, or None (see `model.engines.protocol.EngineFile`).

    For int8, the artifact must have an int8 graph that passed the k-NN gate. For float32 on a CPU, it must have
    `model.onnx`.
    """
    artifact = request.artifact
    if request.precision == "int8":
        return _int8_fault(artifact)
    if _PROVIDER_OF[request.runtime] == "cpu" and request.precision == "fp32" and ONNX not in artifact.locations:
        return f"the artifact has no {ONNX}"
    return None


def open(request: OpenRequest) -> "OnnxEngine":
    """Open and return the engine (see `model.engines.protocol.EngineFile.open`).

    If the artifact has no graph of the requested precision, the graph is first built from the weights.
    """
    provider = _PROVIDER_OF[request.runtime]
    need_provider(provider)  # raises an error before a graph is built
    return OnnxEngine(
        graph_file(request.artifact, request.precision, any_size=provider == "cpu"),
        threads=request.threads,
        precision=request.precision,
        provider=provider,
        prepack=not request.few_passes,
        inner="no" if request.few_passes else "on demand",
    )


class OnnxEngine:
    """An engine that runs one graph in ONNX Runtime. It implements `model.engines.protocol.Engine`.

    Args:
        path: the graph's file. External data must be in the same folder.
        threads: the number of CPU threads per forward pass.
        precision: the precision that the graph was built with.
        provider: the execution provider. "cuda" needs the package onnxruntime-gpu and a GPU.
        tiled: whether to replace the attention nodes with tiled attention (`MultiHeadAttention`). If None, they are
            replaced only on a CPU, in graphs with many tokens or a dynamic input size.
        spinning: whether waiting threads spin.
        prepack: whether ONNX Runtime repacks the weights for the CPU. This makes forward passes faster, but keeps
            a second copy of the weights in memory.
        inner: whether `run_outputs` can return inner outputs: "no", "on demand" (from a second session, which the first
            such call opens), or "always" (from the engine's only session).

    Raises:
        ValueError: ONNX Runtime cannot load the file, or the provider cannot run the model.
        ModuleNotFoundError: this build of ONNX Runtime lacks the provider.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        precision: str = "fp32",
        provider: Provider = "cpu",
        tiled: bool | None = None,
        spinning: bool = False,
        prepack: bool = True,
        inner: Inner = "no",
    ) -> None:
        need_provider(provider)
        model = _read_graph(path)
        self.name, self.precision, self.device = _NAMES[provider], precision, "cpu" if provider == "cpu" else "cuda"
        self._tensors = {output.name: output.name for output in model.graph.output}  # by the output's public name
        self._inner_tensors = {} if inner == "no" else _inner_tensors(model, half=precision in ("fp16", "bf16"))
        self.outputs = (*self._tensors, *self._inner_tensors)
        self.patch_size = _patch_size(model)
        self._shape: tuple[int | str, ...] = tuple(  # (3, H, W); a name marks a free dimension
            dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]
        )
        tokens = self._tokens()
        self.tiled = tiled if tiled is not None else provider == "cpu" and (not tokens or tokens > TILED_ABOVE_TOKENS)
        options = _options(load_runtime().SessionOptions(), threads, spinning, prepack, path)
        self._open = partial(_open_session, path, provider, options, self.tiled)
        self._session: Any = self._open(self._inner_tensors if inner == "always" else {})
        self._inner_session = self._session if inner == "always" else None

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: the graph does not accept the shape, or lacks one of the outputs in `Features`.
        """
        return Features(**self.run_outputs(pixels, Features._fields))

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        return self._shape_fits((1, 3, *size)) and set(outputs) <= set(self.outputs)

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Run a batch of normalised pixels [B, 3, H, W], and return the outputs in `names` as float32, keyed by name.

        Raises:
            ValueError: the graph does not accept the shape, or lacks one of the outputs.
        """
        self._check_shape(pixels.shape)
        missing = [name for name in names if name not in self.outputs]
        if missing:
            raise ValueError(f"this graph has no output {missing[0]!r}; its outputs are {', '.join(self.outputs)}")
        session, all_tensors = self._session, self._tensors | self._inner_tensors
        if any(name in self._inner_tensors for name in names):
            session = self._inner_session = self._inner_session or self._open(self._inner_tensors)
        outputs = session.run([all_tensors[name] for name in names], {"pixels": pixels})
        return {name: np.asarray(array, dtype=np.float32) for name, array in zip(names, outputs, strict=True)}

    def close(self) -> None:
        """Release the sessions. The engine cannot run afterwards."""
        self._session = self._inner_session = None

    def _tokens(self) -> int:
        """Return the number of patch tokens per image, or 0 if the graph accepts images of any size."""
        _, height, width = self._shape
        if isinstance(height, str) or isinstance(width, str):
            return 0
        return (height // self.patch_size) * (width // self.patch_size)

    def _shape_fits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 4 or shape[0] < 1 or shape[1] != 3:
            return False
        if self._tokens():
            return shape[1:] == self._shape
        return all(side >= self.patch_size and side % self.patch_size == 0 for side in shape[2:])

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if not self._shape_fits(shape):
            allowed = f"[B, {', '.join(map(str, self._shape))}]"
            if not self._tokens():
                allowed = f"[B, 3, H, W], H and W multiples of {self.patch_size}"
            raise ValueError(f"pixels of shape {shape}: this model takes {allowed}")


def need_provider(provider: Provider) -> None:
    """Check that the installed ONNX Runtime has a provider.

    Raises:
        ModuleNotFoundError: ONNX Runtime was built without the provider.
    """
    ort = load_runtime()
    if provider != "cpu":
        # preload_dlls() loads the CUDA libraries of pip's wheels. The GPU build itself searches only the system's
        # folders. The call also registers a CUDA provider that is a plugin, so it precedes get_available_providers().
        with redirect_stdout(sys.stderr):  # the call prints the libraries that it does not find
            ort.preload_dlls()
    if _PROVIDERS[provider] not in ort.get_available_providers():
        raise ModuleNotFoundError(
            f"this ONNX Runtime has no {_PROVIDERS[provider]}: pip install onnxruntime-gpu instead of onnxruntime"
        )


def graph_of(artifact: Artifact, precision: str) -> GraphRecord | None:
    """Return the record of the artifact's graph with this precision, or None if the artifact has no suitable graph.

    A graph is suitable if it accepts the artifact's input size. A graph for exactly this size is preferred to one that
    accepts any size.
    """
    graphs = [graph for graph in artifact.manifest.graphs if graph.precision == precision]
    usable = [graph for graph in graphs if graph.size in (artifact.manifest.input_size, None)]
    return min(usable, key=lambda graph: graph.size is None, default=None)


def graph_file(artifact: Artifact, precision: str, *, any_size: bool = True) -> Path:
    """Return the path of the artifact's graph with this precision.

    If the artifact has no such graph, the graph is built from the weights and stored.

    Args:
        artifact: the verified artifact.
        precision: the precision of the graph.
        any_size: whether a graph that accepts any input size may be returned. A GPU gets one with a fixed size, because
            the other one computes its position embeddings in every pass.

    Raises:
        ArtifactError: the new graph cannot be written.
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
    for derivable in ("fp32", "fp16", "bf16"):
        if precision == derivable:
            return derivable
    raise AssertionError(precision)  # int8 is never derived: its gate belongs to the artifact


def _int8_fault(artifact: Artifact) -> str | None:
    graph = graph_of(artifact, "int8")
    if graph is None:
        return "the artifact has no int8 graph of its input size: `dinov2 export --precision fp32,int8` writes one"
    gates = [record.gate for record in artifact.manifest.parity if record.file == graph.file and record.gate]
    if not gates:
        return f"{graph.file} has no gate in the manifest"
    bad = [gate for gate in gates if gate.status != "passed"]
    return f"the gate of {graph.file} {_STATUS[bad[0].status]}: {bad[0].reason}" if bad else None


def _options(options: Any, threads: int, spinning: bool, prepack: bool, path: Path) -> Any:
    """Set the options of an ONNX Runtime session in `options`, and return `options`."""
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


def _read_graph(path: Path) -> "onnx.ModelProto":
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own exception class, or OSError
        raise ValueError(f"{path}: not an ONNX graph: {error}") from error


def _open_session(
    path: Path,
    provider: Provider,
    options: Any,
    tiled: bool,
    inner_tensors: Mapping[str, str],
) -> Any:
    """Open and return an ONNX Runtime session for a graph.

    Args:
        path: the graph's file.
        provider: the execution provider.
        options: the session's options.
        tiled: whether to replace the attention nodes with tiled attention.
        inner_tensors: the tensors to mark as outputs, keyed by the names of the inner outputs.

    Raises:
        ValueError: ONNX Runtime cannot load the file, or the provider cannot run the model.
    """
    graph: Any = str(path)
    if tiled or inner_tensors:
        model = _read_graph(path)
        if tiled:
            _use_tiled_attention(model)
        _mark_outputs(model, inner_tensors.values())
        graph = model.SerializeToString()
        del model  # frees a copy of the weights before the session makes its own
    try:
        session: Any = load_runtime().InferenceSession(
            graph,
            options,
            providers=[_PROVIDERS[provider]],
            provider_options=[_SETTINGS[provider]],
            enable_fallback=0,  # otherwise a GPU error would move all later passes to the CPU
        )
    except Exception as error:  # ONNX Runtime raises its own exception classes
        raise ValueError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    started = session.get_providers()
    if _PROVIDERS[provider] not in started:
        raise ValueError(f"ONNX Runtime could not start {_PROVIDERS[provider]}; it would use {started[0]} instead")
    if provider != "cpu":
        _check_assignment(session, provider)
    return session


def _inner_tensors(model: "onnx.ModelProto", *, half: bool) -> dict[str, str]:
    """Return the names of the tensors of all inner outputs, keyed by the names of the outputs.

    If `half` is True, queries and keys have half precision. Their tensors are then float32 copies, which
    `_mark_outputs` adds.
    """
    made = {name for node in model.graph.node for name in node.output}
    tensors: dict[str, str] = {}
    block = 0
    while INNER_TENSORS["tokens"].format(block) in made:
        for kind, pattern in INNER_TENSORS.items():
            copied = half and kind != "tokens"
            tensors[f"{kind}.{block}"] = pattern.format(block) + (_FLOAT_COPY if copied else "")
        block += 1
    return tensors


def _mark_outputs(model: "onnx.ModelProto", tensors: Iterable[str]) -> None:
    """Add tensors to the outputs of the graph.

    If a name ends in `_FLOAT_COPY`, a float32 copy of the tensor is added.
    """
    from onnx import TensorProto, helper

    for tensor in tensors:
        if tensor.endswith(_FLOAT_COPY):
            source = tensor.removesuffix(_FLOAT_COPY)
            model.graph.node.append(helper.make_node("Cast", [source], [tensor], to=TensorProto.FLOAT))
        shape = ["batch", "all_tokens", None]
        model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))


def _use_tiled_attention(model: "onnx.ModelProto") -> None:
    """Replace each standard `Attention` of the graph with `com.microsoft.MultiHeadAttention`."""
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "Attention" and not node.domain:
            old: Mapping[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            kept = {"num_heads": old["q_num_heads"]} | {k: v for k, v in old.items() if k == "scale"}
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


def _patch_size(model: "onnx.ModelProto") -> int:
    for node in model.graph.node:
        if node.op_type == "Conv":
            return next(int(a.ints[0]) for a in node.attribute if a.name == "strides")
    raise ValueError(f"the graph {model.graph.name!r} has no patch embedding (Conv)")


def _check_assignment(session: Any, provider: Provider) -> None:
    """Check that the provider runs all expensive operators itself.

    Raises:
        ValueError: some of these operators would run on the CPU. The message names them.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24: rely on the provider's start
        return
    parts = session.get_provider_graph_assignment_info()
    left = {node.op_type for part in parts if part.ep_name.startswith("CPU") for node in part.get_nodes()} & _HEAVY
    if left:
        raise ValueError(f"{_PROVIDERS[provider]} cannot run {', '.join(sorted(left))} of this graph")
