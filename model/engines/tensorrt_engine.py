"""The TensorRT engine: runs a plan on one NVIDIA GPU, without torch.

Each batch is padded to one of the sizes 1, 2, 4, ..., 64. Each size has its own CUDA graph. Launching the graph copies
the pixels to the GPU, runs the plan and copies the features back. Each graph is captured when the engine loads, after a
first pass in which the library allocates memory and compiles kernels. NVIDIA requires one execution context per
captured graph. The contexts share the weights and one block of memory for activations, because a single stream runs
them one after the other.

`model/engines/tensorrt_export.py` builds the plans and stores only those that pass the parity check. `open` accepts
only stored plans. After a plan's weights have been replaced (a refit), it must be loaded as a new engine.

Status: this module follows the documented API of TensorRT and TensorRT for RTX, and is tested with a recording fake
(`tests/model/engines/fake_tensorrt.py`). docs/tensorrt.md lists the parts that have run on a GPU.

Legend: B batch, H x W pixels, N patches, R registers, D width.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from model.engines.cuda_memory import CudaError
from model.engines.protocol import BUCKETS, Features, FloatArray, OpenRequest, bucket_of
from model.engines.tensorrt_build import make_logger
from model.engines.tensorrt_plans import (
    PRECISIONS,
    PlanPrecision,
    Toolchain,
    find_plan,
    find_toolchain,
    plans_folder,
)
from model.files import write_bytes

logger = logging.getLogger(__name__)

INPUT = "pixels"
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}


def fault(request: OpenRequest) -> None:
    """Return None, because the engine cannot be checked without loading its libraries.

    `open` loads the libraries, looks for a plan, and raises an error if the engine cannot serve.
    """


def open(request: OpenRequest) -> "TensorRTEngine":
    """Open and return the engine with the plan that `dinov2 build-engine` built on this host.

    Raises:
        ModuleNotFoundError: TensorRT or the CUDA bindings are not installed.
        ValueError: the host has no GPU or no suitable plan, or the plan cannot be loaded. The message gives the reason.
    """
    precision = request.precision
    if precision not in PRECISIONS:
        raise ValueError(f"TensorRT plans are {', '.join(PRECISIONS)}, not {precision!r}")
    toolchain = find_toolchain()
    folder = plans_folder(request.artifact.derived)
    plan, record = find_plan(request.artifact, precision, toolchain, folder)
    try:
        return TensorRTEngine(plan, toolchain, precision, jit_cache=folder / f"{record.key.digest}.jit")
    except CudaError as error:  # mostly out of memory
        raise ValueError(f"the TensorRT plan cannot be loaded: {error}") from error


class TensorRTEngine:
    """An engine that runs one TensorRT plan. It implements `model.engines.protocol.Engine`.

    Only one thread may call the engine at a time, but it need not always be the same thread.

    Args:
        plan: the plan's bytes.
        toolchain: the TensorRT library, the CUDA bindings and the GPU.
        precision: the precision of the graph that the plan was built from.
        jit_cache: the file in which TensorRT for RTX caches the kernels that it compiles on this GPU. If None, they are
            not cached.

    Raises:
        ValueError: TensorRT refuses the plan, or the plan was not built by this project.
        CudaError: the GPU does not have enough memory, or a CUDA call failed.
    """

    def __init__(
        self, plan: bytes, toolchain: Toolchain, precision: PlanPrecision, *, jit_cache: Path | None = None
    ) -> None:
        self.name = toolchain.library.name
        self.precision: str = precision
        self.device = "cuda"
        self._trt, self._cuda = toolchain.library.module, toolchain.cuda
        self._errors: deque[str] = deque(maxlen=5)
        self._graphs: dict[int, Callable[[], None]] = {}
        with ExitStack() as stack:  # releases everything if a later step fails
            self._cuda.use(0)
            self._stream = self._cuda.stream()
            stack.callback(self._cuda.call, "cudaStreamDestroy", self._stream)
            self._deserialize(plan, stack)
            self._allocate(stack)
            self._make_contexts(stack, jit_cache)
            self._capture_all(stack)
            self._save_jit_cache(jit_cache)
            self._resources = stack.pop_all()

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W]. A batch above 64 images is split.

        Raises:
            ValueError: the plan was not built for this shape.
            CudaError: the GPU failed.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != self._input_shape:
            shape = ", ".join(map(str, self._input_shape))
            raise ValueError(f"pixels of shape {pixels.shape}: this model takes [B, {shape}]")
        self._cuda.use(0)
        batch = len(pixels)
        outputs = {name: np.empty((batch, *host.shape[1:]), np.float32) for name, host in self._host_out.items()}
        for start in range(0, batch, BUCKETS[-1]):
            piece = pixels[start : start + BUCKETS[-1]]
            self._host_in[: len(piece)] = piece
            self._graphs[bucket_of(len(piece))]()  # rows beyond the piece are older images; their features are not read
            self._cuda.wait(self._stream)
            for name, host in self._host_out.items():
                outputs[name][start : start + len(piece)] = host[: len(piece)]
        cls, patches = outputs["cls"], outputs["patches"]
        registers = outputs.get("registers", np.zeros((batch, 0, cls.shape[1]), np.float32))
        return Features(cls, patches, registers)

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        return (3, *size) == tuple(self._input_shape) and set(outputs) <= set(Features._fields)

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Run a batch of normalised pixels [B, 3, H, W], and return the features in `names`.

        Plans have no inner outputs.

        Raises:
            ValueError: the plan was not built for this shape, or has no output of this name.
            CudaError: the GPU failed.
        """
        for name in names:
            if name not in Features._fields:
                raise ValueError(f"this plan has no output {name!r}; its outputs are {', '.join(Features._fields)}")
        features = self.run(pixels)._asdict()
        return {name: features[name] for name in names}

    def close(self) -> None:
        """Release the GPU's memory. The engine cannot run afterwards."""
        self._resources.close()

    def __del__(self) -> None:
        """Release the GPU's memory, so that an engine that is no longer used does not occupy it."""
        with suppress(Exception):  # CUDA may be gone at process exit, or loading may have failed
            self.close()

    def _deserialize(self, plan: bytes, stack: ExitStack) -> None:
        trt = self._trt
        self._runtime = trt.Runtime(make_logger(trt, self._log_message))
        if hasattr(self._runtime, "get_engine_validity"):
            validity, diagnostics = self._runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.INVALID:
                raise ValueError(
                    f"{self.name} refuses this plan on this GPU (diagnostics {diagnostics:#x}): {self._last_errors()}"
                )
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ValueError(f"{self.name} cannot load the plan: {self._last_errors()}")
        self._engine = engine
        stack.callback(self._forget)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        if INPUT not in shapes or not {"cls", "patches"} <= set(names):
            raise ValueError(f"not a plan of this project: its tensors are {', '.join(names)}")
        self._input_shape = shapes.pop(INPUT)[1:]  # (3, H, W)
        self._output_shapes = {name: shape[1:] for name, shape in shapes.items()}
        if free := [name for name, shape in self._output_shapes.items() if min(shape) < 0]:
            raise ValueError(f"not a plan of this project: {', '.join(free)} has free dimensions other than the batch")
        ranges = []
        for index in range(engine.num_optimization_profiles):
            low, _, high = engine.get_tensor_profile_shape(INPUT, index)  # each [B, 3, H, W]
            ranges.append((int(low[0]), int(high[0])))
        self._profile_of = {bucket: choose_profile(ranges, bucket) for bucket in BUCKETS}

    def _forget(self) -> None:
        """Release the library's objects: first the contexts, then the engine, then the runtime."""
        self._contexts: dict[int, Any] = {}
        self._settings: Any = None
        self._jit: Any = None  # in the bindings, this object keeps the engine and its weights alive
        self._engine = None
        self._runtime = None

    def _allocate(self, stack: ExitStack) -> None:
        """Allocate the input and output buffers that all batch sizes share, and the memory for activations."""
        cuda, largest = self._cuda, BUCKETS[-1]

        def pinned(shape: tuple[int, ...]) -> FloatArray:
            array = cuda.pinned((largest, *shape))
            stack.callback(cuda.free_pinned, array)
            return array

        def on_device(size: int) -> int:
            address = cuda.allocate(max(256, size))
            stack.callback(cuda.call, "cudaFree", address)
            return address

        self._host_in = pinned(self._input_shape)
        self._host_out = {name: pinned(shape) for name, shape in self._output_shapes.items()}
        self._addresses = {INPUT: on_device(self._host_in.nbytes)}
        self._addresses |= {name: on_device(host.nbytes) for name, host in self._host_out.items()}
        self._activation_bytes = int(self._engine.device_memory_size_v2)
        self._activations = on_device(self._activation_bytes)

    def _make_contexts(self, stack: ExitStack, jit_cache: Path | None) -> None:
        """Create one execution context per batch size, with its profile, input shape and buffer addresses."""
        self._contexts = {}
        stack.callback(self._contexts.clear)
        self._jit = None
        self._settings = self._runtime_settings(jit_cache)  # kept, because nothing documents that contexts outlive it
        for bucket in BUCKETS:
            self._errors.clear()
            context = self._engine.create_execution_context(self._settings)
            if context is None:
                raise ValueError(f"{self.name} cannot create an execution context: {self._last_errors()}")
            context.set_device_memory(self._activations, self._activation_bytes)
            done = context.set_optimization_profile_async(self._profile_of[bucket], self._stream)
            self._cuda.wait(self._stream)
            done = done and context.set_input_shape(INPUT, (bucket, *self._input_shape))
            for name, address in self._addresses.items():
                done = done and context.set_tensor_address(name, address)
            if not done:
                raise ValueError(f"{self.name} refuses batch {bucket}: {self._last_errors()}")
            self._contexts[bucket] = context

    def _runtime_settings(self, jit_cache: Path | None) -> Any:
        """Return the settings for new execution contexts.

        The contexts use memory that this engine allocates. With TensorRT for RTX, they also use the kernels
        that are cached in the file `jit_cache`.
        """
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.name != "tensorrt_rtx":
            return strategy
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        # Each bucket's kernels are compiled in its first pass, so the capture records them.
        settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._jit = settings.create_runtime_cache()
        if jit_cache is not None and jit_cache.exists() and not self._jit.deserialize(jit_cache.read_bytes()):
            logger.warning("%s: not a cache of this library and GPU; kernels are compiled again", jit_cache)
        settings.set_runtime_cache(self._jit)
        return settings

    def _save_jit_cache(self, path: Path | None) -> None:
        if path is None or self._jit is None:
            return
        try:
            write_bytes(path, bytes(self._jit.serialize()))
        except OSError as error:  # it only slows down the next start
            logger.warning("%s: cannot store compiled kernels: %s", path, error.strerror)

    def _capture_all(self, stack: ExitStack) -> None:
        for bucket in BUCKETS:
            self._queue(bucket)  # the first pass allocates and compiles, which a graph cannot record
            self._cuda.wait(self._stream)
            self._graphs[bucket] = self._captured(bucket, stack)
        stack.callback(self._graphs.clear)

    def _captured(self, bucket: int, stack: ExitStack) -> Callable[[], None]:
        """Return a function that runs a batch of `bucket` images.

        The function launches a CUDA graph, or makes separate calls if the batch cannot be captured as a graph.
        """

        def queue() -> None:
            self._queue(bucket)

        context = self._contexts[bucket]
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._stream):
            logger.warning("batch %d cannot be captured as a CUDA graph; it runs as separate calls", bucket)
            return queue
        try:
            graph = self._cuda.capture(self._stream, queue)
        except CudaError as error:
            logger.warning("batch %d cannot be captured as a CUDA graph; it runs as separate calls: %s", bucket, error)
            return queue
        stack.callback(self._cuda.call, "cudaGraphExecDestroy", graph)
        return lambda: self._cuda.launch(graph, self._stream)

    def _queue(self, bucket: int) -> None:
        """Queue the work for `bucket` images: copy the pixels to the GPU, run the plan, and copy the features back."""
        self._errors.clear()  # otherwise an old message would explain a new failure
        self._cuda.to_device(self._addresses[INPUT], self._host_in[:bucket], self._stream)
        if not self._contexts[bucket].execute_async_v3(self._stream):
            raise CudaError(f"{self.name} failed at batch {bucket}: {self._last_errors()}")
        for name, host in self._host_out.items():
            self._cuda.to_host(host[:bucket], self._addresses[name], self._stream)

    def _log_message(self, severity: str, message: str) -> None:
        level = _LEVELS.get(severity, logging.DEBUG)
        if level == logging.ERROR:
            self._errors.append(message)
        logger.log(level, "%s: %s", self.name, message)

    def _last_errors(self) -> str:
        return " | ".join(self._errors) or "it gave no reason"


def choose_profile(ranges: list[tuple[int, int]], batch: int) -> int:
    """Return the index of the narrowest range of batch sizes that includes `batch`.

    Args:
        ranges: the (lowest, highest) batch size of each of the plan's profiles.
        batch: the batch size.

    Raises:
        ValueError: no range includes `batch`, which means that another version of this project built the plan.
    """
    fitting = [(high - low, index) for index, (low, high) in enumerate(ranges) if low <= batch <= high]
    if not fitting:
        raise ValueError(f"the plan has no profile for batch {batch}, only {ranges}")
    return min(fitting)[1]
