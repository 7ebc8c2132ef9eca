"""Memory, streams and graphs of CUDA, through NVIDIA's own Python bindings (`cuda-bindings`); no torch.

`Cuda` turns the bindings' error codes into exceptions that say what was asked for. The runtime module is handed in, so
that the tests can give a stand-in that records the calls and computes in ordinary memory.

Pinned (page-locked) host memory is what the GPU copies from and to by itself while the CPU goes on; a CUDA graph is a
recorded sequence of copies and kernels that is launched by one call, with the addresses it was recorded with.
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
    """A call of CUDA failed; the message says which, and CUDA's own words."""


@dataclass(frozen=True)
class Gpu:
    """What a plan is tied to."""

    name: str
    capability: tuple[int, int]
    driver: str  # the kernel driver's version where it says one, and the CUDA version that it brings


def load_runtime() -> Any:
    """NVIDIA's bindings of the CUDA runtime.

    Raises:
        ModuleNotFoundError: they are not installed; the message says how to install them.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise ModuleNotFoundError(f"no CUDA bindings ({error}): pip install cuda-bindings") from error


class Cuda:
    """The calls that an engine needs, on one device, with errors as exceptions."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def call(self, name: str, *arguments: Any, asked: str = "") -> Any:
        """Call a function of the runtime: its result without the error code (several results as a tuple).

        Raises:
            CudaError: the code is not success.
        """
        code, *results = getattr(self.runtime, name)(*arguments)
        if int(code) != 0:
            _, words = self.runtime.cudaGetErrorString(code)
            said = words.decode() if isinstance(words, bytes) else words
            raise CudaError(f"CUDA: {name}{f' ({asked})' if asked else ''} failed: {said} (error {int(code)})")
        return results[0] if len(results) == 1 else tuple(results)

    def use(self, device: int) -> None:
        """Make `device` the one that this thread's calls go to."""
        self.call("cudaSetDevice", device, asked=f"device {device}")

    def stream(self) -> int:
        """A stream of its own, which does not wait for the default one."""
        return int(self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking))

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        return int(self.call("cudaMalloc", size, asked=f"{size / 2**20:.0f} MiB on the GPU"))

    def pinned(self, shape: tuple[int, ...]) -> FloatArray:
        """A float32 array in page-locked host memory, zeroed; give it back with `free_pinned`."""
        size = max(4, int(np.prod(shape)) * 4)
        address = int(self.call("cudaHostAlloc", size, 0, asked=f"{size / 2**20:.0f} MiB of pinned host memory"))
        ctypes.memset(address, 0, size)
        memory = (ctypes.c_float * (size // 4)).from_address(address)
        array: FloatArray = np.ctypeslib.as_array(memory)[: int(np.prod(shape))].reshape(shape)
        return array

    def free_pinned(self, array: FloatArray) -> None:
        """Give page-locked memory back; `array` must not be touched afterwards."""
        self.call("cudaFreeHost", array.ctypes.data)

    def to_device(self, target: int, source: FloatArray, stream: int) -> None:
        """Queue a copy of a contiguous pinned array."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def to_host(self, target: FloatArray, source: int, stream: int) -> None:
        """Queue a copy into a contiguous pinned array."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def wait(self, stream: int) -> None:
        """Until everything queued on `stream` is done; errors of kernels show here."""
        self.call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, queue: Callable[[], None]) -> Any:
        """Record what `queue` puts on `stream` (nothing runs) as a graph ready to launch.

        Raises:
            CudaError: something in it cannot be recorded. The stream is usable again.
        """
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # others may use CUDA meanwhile
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            queue()
        except BaseException:
            self.runtime.cudaStreamEndCapture(stream)  # its own error would only repeat the first one
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Queue a recorded graph."""
        self.call("cudaGraphLaunch", graph, stream)


def describe_gpu(cuda: Cuda, device: int = 0, *, driver_file: Path = DRIVER_FILE) -> Gpu:
    """Name, compute capability and driver of a GPU.

    Raises:
        ValueError: there is none that CUDA can use; the message has CUDA's words.
    """
    try:
        count = cuda.call("cudaGetDeviceCount")
        if device >= count:
            raise ValueError(f"no GPU {device}: CUDA sees {count}")
        properties = cuda.call("cudaGetDeviceProperties", device)
        version = cuda.call("cudaDriverGetVersion")
    except CudaError as error:
        raise ValueError(f"no GPU that CUDA can use: {error}") from error
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    try:
        kernel = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", driver_file.read_text())
    except OSError:  # Windows, or a container that hides it: CUDA's version has to do
        kernel = None
    driver = f"{kernel.group() if kernel else 'unknown'} (CUDA {version // 1000}.{version % 1000 // 10})"
    return Gpu(name.rstrip("\0"), (int(properties.major), int(properties.minor)), driver)
