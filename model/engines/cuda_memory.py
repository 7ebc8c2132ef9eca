"""Manages CUDA memory, streams and graphs through NVIDIA's Python bindings (`cuda-bindings`), without torch.

`Cuda` turns the bindings' error codes into exceptions that describe the failed request. Its constructor takes the
bindings' runtime module, so the tests can pass a fake that records the calls and computes in ordinary memory.

Pinned (page-locked) host memory lets the GPU copy data while the CPU continues. A CUDA graph is a recorded sequence of
copies and kernels with fixed addresses, which a single call launches.
"""

import ctypes
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DRIVER_FILE = Path("/proc/driver/nvidia/version")


class CudaError(RuntimeError):
    """The error raised when a CUDA call fails. The message names the call and includes CUDA's own error text."""


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that a TensorRT plan depends on."""

    name: str
    capability: tuple[int, int]
    driver: str  # the kernel driver's version, if known, and its CUDA version


def load_runtime() -> Any:
    """Import and return NVIDIA's Python bindings for the CUDA runtime.

    Raises:
        ModuleNotFoundError: the bindings are not installed. The message says how to install them.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise ModuleNotFoundError(f"no CUDA bindings ({error}): pip install cuda-bindings") from error


class Cuda:
    """The CUDA calls that an engine needs. A failed call raises a CudaError."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def call(self, name: str, *arguments: Any, request: str = "") -> Any:
        """Call a function of the CUDA runtime and return its result, or a tuple if it has several results.

        Args:
            name: the function's name, such as "cudaMalloc".
            arguments: the function's arguments.
            request: a description of what the call requests, such as "device 0". It is included in the error message.

        Raises:
            CudaError: the function returned an error code.
        """
        code, *results = getattr(self.runtime, name)(*arguments)
        if int(code) != 0:
            _, words = self.runtime.cudaGetErrorString(code)
            said = words.decode() if isinstance(words, bytes) else words
            raise CudaError(f"CUDA: {name}{f' ({request})' if request else ''} failed: {said} (error {int(code)})")
        return results[0] if len(results) == 1 else tuple(results)

    def use(self, device: int) -> None:
        """Make `device` the GPU that later calls from this thread use."""
        self.call("cudaSetDevice", device, request=f"device {device}")

    def stream(self) -> int:
        """Create a stream that does not wait for the default stream, and return its handle."""
        return int(self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking))

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the device and return their address."""
        return int(self.call("cudaMalloc", size, request=f"{size / 2**20:.0f} MiB on the GPU"))

    def free_memory(self) -> int:
        """Return the number of bytes of the GPU's memory that no program uses."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def pinned(self, shape: tuple[int, ...]) -> FloatArray:
        """Allocate and return a zeroed float32 array in page-locked host memory. `free_pinned` releases it."""
        size = max(4, int(np.prod(shape)) * 4)
        address = int(self.call("cudaHostAlloc", size, 0, request=f"{size / 2**20:.0f} MiB of pinned host memory"))
        ctypes.memset(address, 0, size)
        memory = (ctypes.c_float * (size // 4)).from_address(address)
        array: FloatArray = np.ctypeslib.as_array(memory)[: int(np.prod(shape))].reshape(shape)
        return array

    def free_pinned(self, array: FloatArray) -> None:
        """Release an array that `pinned` returned. The array must not be used afterwards."""
        self.call("cudaFreeHost", array.ctypes.data)

    def to_device(self, target: int, source: FloatArray, stream: int) -> None:
        """Queue a copy of the contiguous pinned array `source` to the device address `target` on `stream`."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def to_host(self, target: FloatArray, source: int, stream: int) -> None:
        """Queue a copy from the device address `source` to the contiguous pinned array `target` on `stream`."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def wait(self, stream: int) -> None:
        """Wait until all work queued on `stream` is done. If a kernel failed, raise a CudaError."""
        self.call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, queue: Callable[[], None]) -> Any:
        """Record the work that the function `queue` puts on `stream`, without running it.

        Returns:
            A CUDA graph, which `launch` can queue.

        Raises:
            CudaError: some of the work cannot be recorded. The stream remains usable.
        """
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may use CUDA
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            queue()
        except BaseException:
            self.runtime.cudaStreamEndCapture(stream)  # an error here would only repeat the first one
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Queue the CUDA graph `graph`, which `capture` returned, on `stream`."""
        self.call("cudaGraphLaunch", graph, stream)


def describe_gpu(cuda: Cuda, device: int = 0, *, driver_file: Path = DRIVER_FILE) -> Gpu:
    """Return a GPU's name, compute capability and driver version.

    Raises:
        ValueError: CUDA has no GPU with this number, or cannot use any GPU. The message includes CUDA's error text.
    """
    try:
        count = cuda.call("cudaGetDeviceCount")
        if device >= count:
            raise ValueError(f"no GPU {device}: CUDA finds {count}")
        properties = cuda.call("cudaGetDeviceProperties", device)
        version = cuda.call("cudaDriverGetVersion")
    except CudaError as error:
        raise ValueError(f"no GPU that CUDA can use: {error}") from error
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    try:
        kernel = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", driver_file.read_text())
    except OSError:  # Windows, or a container without the file: use CUDA's version alone
        kernel = None
    driver = f"{kernel.group() if kernel else 'unknown'} (CUDA {version // 1000}.{version % 1000 // 10})"
    return Gpu(name.rstrip("\0"), (int(properties.major), int(properties.minor)), driver)
