"""Tests of what the NVIDIA driver is asked, with a fake driver."""

import ctypes
from importlib.metadata import PackageNotFoundError

import pytest

from model.engines import cuda_driver
from model.engines.cuda_driver import NoGpuError, ask_driver, capability_without_bf16, no_gpu


class FakeDriver:
    """A fake of the library libcuda.so.1. `fails` maps the name of a function to the error code that it returns."""

    def __init__(self, cuda: int = 13000, gpus: int = 1, capability: tuple[int, int] = (8, 9), **fails: int) -> None:
        self.cuda, self.gpus, self.capability, self.fails = cuda, gpus, capability, fails

    def cuInit(self, flags: int) -> int:
        return self.fails.get("cuInit", 0)

    def _write(self, name: str, target, value: int) -> int:
        target._obj.value = value
        return self.fails.get(name, 0)

    def cuDeviceGetCount(self, target) -> int:
        return self._write("cuDeviceGetCount", target, self.gpus)

    def cuDriverGetVersion(self, target) -> int:
        return self._write("cuDriverGetVersion", target, self.cuda)

    def cuDeviceGet(self, target, ordinal: int) -> int:
        return self._write("cuDeviceGet", target, 7 + ordinal)

    def cuDeviceGetAttribute(self, target, attribute: int, device: int) -> int:
        assert device == 7
        return self._write("cuDeviceGetAttribute", target, self.capability[{75: 0, 76: 1}[attribute]])


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, **packages: str) -> None:
    """Let the host have this driver, and these packages with their versions. `_` in a name stands for `-`."""
    versions = {name.replace("_", "-"): version for name, version in packages.items()}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(cuda_driver.importlib.metadata, "version", version)


def test_the_report_of_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(cuda=12040, capability=(7, 5)))
    assert ask_driver() == ((12, 4), (7, 5))


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (FakeDriver(cuInit=804), r"the NVIDIA driver does not start \(CUDA error 804\)"),
        (FakeDriver(gpus=0), "the NVIDIA driver sees no GPU"),
        (FakeDriver(cuDeviceGetCount=3), "the NVIDIA driver fails: cuDeviceGetCount returns CUDA error 3"),
    ],
)
def test_a_driver_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, reason: str) -> None:
    install(monkeypatch, driver)
    with pytest.raises(NoGpuError, match=reason):
        ask_driver()
    assert no_gpu() is not None
    assert capability_without_bf16() is None


def test_a_host_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert no_gpu() == "no NVIDIA driver (libcuda.so.1) on this host"


@pytest.mark.parametrize(
    ("cuda", "packages", "refused"),
    [
        (12040, {"nvidia_cuda_runtime": "13.0.96"}, True),
        (12040, {"cuda_bindings": "13.5.0"}, True),
        (13000, {"nvidia_cuda_runtime": "13.5.37"}, False),  # each 13.x runs with a driver for 13.0
        (13000, {"nvidia_cuda_runtime_cu12": "12.8.90"}, False),
        (12040, {"nvidia_cuda_runtime_cu12": "12.8.90"}, False),
        (12040, {"nvidia_cuda_runtime_cu12": "12.8.90", "cuda_bindings": "13.5.0"}, False),  # one runtime can work
        (12040, {}, False),  # a CUDA of the system
    ],
)
def test_a_driver_older_than_every_package_is_told(
    monkeypatch: pytest.MonkeyPatch, cuda: int, packages: dict[str, str], refused: bool
) -> None:
    install(monkeypatch, FakeDriver(cuda=cuda), **packages)
    expected = (
        "the NVIDIA driver is too old: it supports CUDA 12.4, and the installed packages need CUDA 13, which begins "
        "with driver 580"
    )
    assert no_gpu() == (expected if refused else None)


@pytest.mark.parametrize(
    ("capability", "package", "refused"),
    [((7, 0), "nvidia_cuda_runtime", True), ((7, 5), "nvidia_cuda_runtime", False), ((7, 0), "none", False)],
)
def test_a_gpu_older_than_its_packages_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], package: str, refused: bool
) -> None:
    """CUDA 13 has no code for V100."""
    install(monkeypatch, FakeDriver(capability=capability), **{package: "13.0.96"})
    expected = "the GPU is too old for the installed packages: its compute capability is 7.0, and CUDA 13 needs 7.5"
    assert no_gpu() == (expected if refused else None)


@pytest.mark.parametrize(("capability", "found"), [((7, 5), (7, 5)), ((7, 0), (7, 0)), ((8, 0), None), ((9, 0), None)])
def test_gpus_without_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], found: tuple[int, int] | None
) -> None:
    install(monkeypatch, FakeDriver(capability=capability))
    assert capability_without_bf16() == found
