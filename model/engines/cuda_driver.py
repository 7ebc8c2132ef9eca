"""Asks the NVIDIA driver about this host's GPU, without CUDA's libraries and without torch.

The answers decide which engines `auto` tries, and explain in plain words why no engine can use the GPU. Importing torch
for this would take seconds and hundreds of megabytes of memory.

Sources: the documentation of CUDA's driver API (`cuDriverGetVersion`, `cuDeviceGetAttribute`), its table of the oldest
driver for each major version of CUDA, and the release notes of CUDA 13, which ended the support of Volta.
"""

import ctypes
import importlib.metadata
from typing import Any, Final, NamedTuple

BF16_CAPABILITY: Final = (8, 0)
"""The compute capability from which on a GPU computes in bf16."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and ..._MINOR
_CUDA_PACKAGES: Final = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "cuda-bindings")
"""Packages with the major version of CUDA for which the installed runtimes were built."""
_OLDEST_DRIVER: Final = {12: "525", 13: "580"}  # by the major version of CUDA, on Linux
_LOWEST_CAPABILITY: Final = {13: (7, 5)}  # by the major version of CUDA


class NoGpuError(ValueError):
    """The error raised when the host has no NVIDIA GPU that the installed packages can use. The message gives the
    reason."""


class DriverReport(NamedTuple):
    """What the driver says about itself and the first GPU."""

    cuda: tuple[int, int]  # the newest CUDA version that the driver supports
    capability: tuple[int, int]  # the compute capability of the first GPU


def ask_driver() -> DriverReport:
    """Start the driver, and return its report.

    Raises:
        NoGpuError: there is no driver, it does not start, or it sees no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpuError("no NVIDIA driver (libcuda.so.1) on this host") from None
    if status := driver.cuInit(0):
        raise NoGpuError(f"the NVIDIA driver does not start (CUDA error {status})")
    if not _number(driver, "cuDeviceGetCount"):
        raise NoGpuError("the NVIDIA driver sees no GPU")
    version, device = _number(driver, "cuDriverGetVersion"), _number(driver, "cuDeviceGet", 0)
    major, minor = (_number(driver, "cuDeviceGetAttribute", attribute, device) for attribute in (_MAJOR, _MINOR))
    return DriverReport((version // 1000, version % 1000 // 10), (major, minor))


def no_gpu() -> str | None:
    """Return the reason why this host has no usable NVIDIA GPU, or None if it has one.

    Reasons are also a driver or a GPU that is too old for the installed packages. If packages for several versions of
    CUDA are installed, only the lowest version counts.
    """
    try:
        (major, minor), capability = ask_driver()
    except NoGpuError as error:
        return str(error)
    needed = min(_installed_cuda_majors(), default=0)
    if major < needed:
        oldest = f", which begins with driver {_OLDEST_DRIVER[needed]}" if needed in _OLDEST_DRIVER else ""
        said = f"it supports CUDA {major}.{minor}, and the installed packages need CUDA {needed}{oldest}"
        return f"the NVIDIA driver is too old: {said}"
    lowest = _LOWEST_CAPABILITY.get(needed, (0, 0))
    if capability < lowest:
        said = "its compute capability is {}.{}, and CUDA {} needs {}.{}".format(*capability, needed, *lowest)
        return f"the GPU is too old for the installed packages: {said}"
    return None


def capability_without_bf16() -> tuple[int, int] | None:
    """Return the compute capability of the first GPU if it cannot compute in bf16. Otherwise, return None."""
    try:
        capability = ask_driver().capability
    except NoGpuError:
        return None
    return capability if capability < BF16_CAPABILITY else None


def _number(driver: Any, function: str, *arguments: int) -> int:
    """Call a function of the driver that writes one number to its first argument, and return the number."""
    number = ctypes.c_int(0)
    if status := getattr(driver, function)(ctypes.byref(number), *arguments):
        raise NoGpuError(f"the NVIDIA driver fails: {function} returns CUDA error {status}")
    return number.value


def _installed_cuda_majors() -> list[int]:
    """Return the major versions of CUDA for which packages are installed."""
    majors = []
    for package in _CUDA_PACKAGES:
        try:
            majors.append(int(importlib.metadata.version(package).partition(".")[0]))
        except importlib.metadata.PackageNotFoundError:
            continue
    return majors
