"""Fakes of CUDA and TensorRT that record calls. Device memory is host memory, and a plan uses a fixed rule.

`FakeCuda` has the functions of `cuda.bindings.runtime` that the project calls. It lists every call and all allocated
memory, so that a test can detect memory that is not released. Work on a stream runs immediately. If the stream is being
captured, its work runs when the graph is launched. A graph that was captured with a wrong address therefore gives wrong
features, as on a GPU.

`fake_tensorrt(cuda)` has the classes of `tensorrt` that the project needs to load and run a plan. A plan is JSON (see
`fake_plan`).
"""

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from model.engines.cuda_memory import Cuda, Gpu
from model.engines.tensorrt_build import Library
from model.engines.tensorrt_plans import Toolchain

SIDE, DIM, PATCHES = 28, 6, 4
GPU = Gpu("NVIDIA Fake 4090", (8, 9), "999.10 (CUDA 13.0)")


def features_of(pixels: np.ndarray, registers: int = 2, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Return the features that a fake plan computes from pixels [B, 3, SIDE, SIDE], by name.

    The features of an image depend on every pixel of this image, and on no other image.
    """
    flat = pixels.reshape(len(pixels), 3 * SIDE * SIDE)
    tokens = (
        (np.tanh(flat @ _mix(registers)) * scale).reshape(len(pixels), 1 + PATCHES + registers, DIM).astype(np.float32)
    )
    outputs = {"cls": tokens[:, 0], "patches": tokens[:, 1 : 1 + PATCHES]}
    return outputs | ({"registers": tokens[:, 1 + PATCHES :]} if registers else {})


@lru_cache
def _mix(registers: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((3 * SIDE * SIDE, (1 + PATCHES + registers) * DIM)) / 50


def fake_plan(*, registers: int = 2, profiles: tuple = ((1, 1), (2, 16), (17, 64)), **changes: Any) -> bytes:
    """Return a fake plan as bytes.

    `registers` is the number of register tokens, and `profiles` has the smallest and largest batch of each profile.
    `changes` may set these entries of the plan:

    - `scale`: a factor on the features.
    - `fails` and `wrong_batches`: sizes of batches that fail, or that get wrong features.
    - `capturable`: whether its work can be captured in a CUDA graph.
    - `valid`: whether TensorRT for RTX accepts it.
    - `input`: the name of the input.
    - `fused`: the number of fused kernels that the plan names.
    """
    fused = changes.pop("fused", 0)
    names = b"\0_gemm_mha_v2" * fused
    return json.dumps({"registers": registers, "profiles": profiles} | changes).encode() + b"\n" + names


@dataclass
class FakeCuda:
    """A fake of `cuda.bindings.runtime`.

    `fail` maps the name of a function to the number of its calls that still succeed, and the error code of later calls.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    live: dict[int, ctypes.Array] = field(default_factory=dict)  # device memory and pinned memory, by address
    fail: dict[str, tuple[int, int]] = field(default_factory=dict)
    open: set[tuple[str, int]] = field(default_factory=set)  # streams and graphs that are not destroyed yet
    captured: list[Callable[[], None]] | None = None
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    devices: int = 1

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def _code(self, *call: Any) -> int:
        self.calls.append(call)
        left, code = self.fail.get(call[0], (1, 0))
        if left > 0 or not code:
            if code:
                self.fail[call[0]] = (left - 1, code)
            return 0
        return code

    def queue(self, work: Callable[[], None]) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory", 35: b"CUDA driver version is insufficient"}.get(code, b"unspecified failure")

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return self._code("cudaGetDeviceCount"), self.devices

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        properties = SimpleNamespace(name=GPU.name.encode() + b"\0", major=8, minor=9)
        return self._code("cudaGetDeviceProperties", device), properties

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return self._code("cudaDriverGetVersion"), 13000

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return self._code("cudaMemGetInfo"), 6 * 2**30, 24 * 2**30

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (self._code("cudaSetDevice", device),)

    def _new(self, kind: str) -> int:
        handle = 100 + len(self.calls)
        self.open.add((kind, handle))
        return handle

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return self._code("cudaStreamCreateWithFlags", flags), self._new("stream")

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.open.remove(("stream", stream))
        return (self._code("cudaStreamDestroy", stream),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert self.captured is None, "CUDA does not allow waiting for a stream that is being captured"
        return (self._code("cudaStreamSynchronize", stream),)

    def _allocated(self, name: str, size: int) -> tuple[int, int]:
        if code := self._code(name, size):
            return code, 0
        memory = ctypes.create_string_buffer(b"\xff" * size, size)  # memory that is never written holds NaN
        address = ctypes.addressof(memory)
        self.live[address] = memory
        return 0, address

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        assert self.captured is None
        return self._allocated("cudaMalloc", size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self._allocated("cudaHostAlloc", size)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.live[address]
        return (self._code("cudaFree", address),)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self.live[address]
        return (self._code("cudaFreeHost", address),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.queue(lambda: ctypes.memmove(target, source, size))
        return (self._code("cudaMemcpyAsync", size, kind),)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        if code := self._code("cudaStreamBeginCapture"):
            return (code,)
        self.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        work, self.captured = self.captured, None
        if code := self._code("cudaStreamEndCapture"):
            return code, 0
        graph = self._new("graph")
        self.graphs[graph] = work or []
        return 0, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        if code := self._code("cudaGraphInstantiate"):
            return code, 0
        executable = self._new("executable")
        self.graphs[executable] = self.graphs[graph]
        return 0, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        self.open.remove(("graph", graph))
        return (self._code("cudaGraphDestroy"),)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[int]:
        self.open.remove(("executable", graph))
        return (self._code("cudaGraphExecDestroy"),)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        if code := self._code("cudaGraphLaunch", graph):
            return (code,)
        for work in self.graphs[graph]:
            work()
        return (0,)


class FakeContext:
    """A fake execution context.

    It uses the shape and the addresses that are set when a pass is queued.
    """

    def __init__(self, cuda: FakeCuda, plan: dict[str, Any]) -> None:
        self.cuda, self.plan = cuda, plan
        self.addresses: dict[str, int] = {}
        self.profile = self.batch = self.memory = -1

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.plan["profiles"][self.profile]
        self.batch = shape[0]
        return name == "pixels" and low <= self.batch <= high

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self.plan.get("capturable", True))

    def execute_async_v3(self, stream: int) -> bool:
        batch, addresses = self.batch, dict(self.addresses)  # a graph uses the values of its capture
        self.cuda.calls.append(("execute", batch, self.profile))
        if batch in self.plan.get("fails", []) or self.memory not in self.cuda.live:
            return False

        def work() -> None:
            shape = (batch, 3, SIDE, SIDE)
            pixels = np.frombuffer(self.cuda.live[addresses["pixels"]], np.float32, int(np.prod(shape)))
            outputs = features_of(pixels.reshape(shape), self.plan["registers"], self.plan.get("scale", 1.0))
            for name, value in outputs.items():
                if batch in self.plan.get("wrong_batches", []):
                    value = value[..., ::-1]
                data = np.ascontiguousarray(value).tobytes()
                ctypes.memmove(addresses[name], data, len(data))

        self.cuda.queue(work)
        return True


class _RuntimeCache:
    def __init__(self) -> None:
        self.data = b"compiled kernels"
        self.given: bytes | None = None

    def deserialize(self, data: bytes) -> bool:
        self.given = data
        return data.startswith(b"compiled")

    def serialize(self) -> bytes:
        return self.data


class _RuntimeConfig:
    def __init__(self) -> None:
        self.strategy: Any = None
        self.cache = _RuntimeCache()
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _RuntimeCache:
        return self.cache

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        return cache is self.cache


class FakeEngine:
    device_memory_size_v2 = 4096

    def __init__(self, cuda: FakeCuda, plan: dict[str, Any], rtx: bool) -> None:
        self.cuda, self.plan, self.rtx = cuda, plan, rtx
        self.contexts: list[FakeContext] = []
        self.config = _RuntimeConfig()
        outputs = {name: (-1, *value.shape[1:]) for name, value in self._example().items()}
        self.shapes = {plan.get("input", "pixels"): (-1, 3, SIDE, SIDE)} | outputs
        self.num_io_tensors = len(self.shapes)
        self.num_optimization_profiles = len(plan["profiles"])

    def _example(self) -> dict[str, np.ndarray]:
        return features_of(np.zeros((1, 3, SIDE, SIDE), np.float32), self.plan["registers"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        low, high = self.plan["profiles"][index]
        return [(batch, 3, SIDE, SIDE) for batch in (low, low, high)]

    def create_runtime_config(self) -> _RuntimeConfig:
        return self.config

    def create_execution_context(self, settings: Any) -> FakeContext:
        assert (settings is self.config) if self.rtx else settings == "user managed"
        self.contexts.append(FakeContext(self.cuda, self.plan))
        return self.contexts[-1]


def fake_tensorrt(cuda: FakeCuda, *, rtx: bool = False) -> Any:
    """Return a fake of the module `tensorrt` or `tensorrt_rtx`. Its attribute `engines` lists every engine that was
    loaded.
    """
    engines: list[FakeEngine] = []

    class ILogger:
        Severity = SimpleNamespace(INFO=3)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            try:
                plan = json.loads(data.partition(b"\n")[0])
            except ValueError:
                self.logger.log(_Severity("ERROR"), "the magic tag does not match")
                return None
            engines.append(FakeEngine(cuda, plan, rtx))
            return engines[-1]

        if rtx:

            def get_engine_validity(self, data: bytes) -> tuple[str, int]:
                plan = json.loads(data.partition(b"\n")[0])
                return ("valid", 0) if plan.get("valid", True) else ("invalid", 4)

    module = SimpleNamespace(
        ILogger=ILogger,
        Runtime=Runtime,
        ComputeCapability=SimpleNamespace(SM80=80, SM89=89, SM120=120),
        EngineValidity=SimpleNamespace(INVALID="invalid"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        engines=engines,
        __version__="1.7.1" if rtx else "11.4.0",
    )
    if rtx:
        module.IRuntimeCache = _RuntimeCache
    return module


@dataclass(frozen=True)
class _Severity:
    name: str

    def __le__(self, other: int) -> bool:
        return True


def fake_toolchain(cuda: FakeCuda, *, rtx: bool = False, version: str | None = None, gpu: Gpu = GPU) -> Toolchain:
    """Return the fake toolchain of a host with a GPU: TensorRT, CUDA and the GPU's description."""
    module = fake_tensorrt(cuda, rtx=rtx)
    name = "tensorrt_rtx" if rtx else "tensorrt"
    return Toolchain(Library(name, version or module.__version__, module), Cuda(cuda), gpu)
