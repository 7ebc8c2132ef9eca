"""Run training steps on fake CUDA tensors, which have a shape, a type and a device, but no data.

`gpu_proofs.py` imports this module after `register_fake_gpu`. It uses private interfaces of torch, and was written for
torch 2.13.0 (the build for CPUs). Two operations are replaced, because torch would choose others on fake tensors than
on a GPU: attention, and the Triton cross-entropy, whose replacement allocates the same tensors.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import TrainConfig
from training.data.crops import Crops
from training.distributed import World, local
from training.recipe import load_config
from training.setup import make_network, make_setup
from training.step import Schedules, Setup, train_step
from training.teacher_targets import TeacherTargets
from training.wiring import make_schedules, step_settings

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
MASKED_SHARE = 0.15  # of the patches of all global crops: half of the crops, between 10 and 50 % of their patches
BLOCK_BYTES = 512  # torch's allocator rounds sizes up to a multiple of this
SINGLE = World(0, 1, GPU)


def settings(recipe: str, **changes: Any) -> TrainConfig:
    """Load a recipe for a GPU in bf16 without torch.compile, with other settings if they are given."""
    config = load_config(recipe, "-", Path("-"))
    values = {"device": "cuda", "compile": False, "precision": "bf16", **changes}
    return TrainConfig.model_validate(config.model_dump() | values)


@dataclass
class FakeRun:
    """The objects of a training run on fake tensors."""

    config: TrainConfig
    setup: Setup
    schedules: Schedules

    def parameters(self) -> Iterator[Tensor]:
        """Yield this rank's parameters of the student and of its moving average."""
        for network in (self.setup.parts.student, self.setup.parts.ema):
            yield from (local(parameter.detach()) for parameter in network.parameters())

    def step(self, number: int) -> None:
        """Train one step."""
        config, n_images = self.config, self.config.batch_size // self.setup.world.size
        size = min(config.micro_batch or n_images, n_images)
        micros = [self._crops(size) for _ in range(n_images // size)]
        train_step(step_settings(config), self.setup, self.schedules, micros, number)

    def _crops(self, n_images: int) -> Crops:
        config, n_patches = self.config, (self.config.global_size // self.config.vit_config.patch_size) ** 2

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, device=GPU, dtype=dtype)

        small = empty(config.n_local * n_images, 3, config.local_size, config.local_size) if config.n_local else None
        return Crops(
            empty(2 * n_images, 3, config.global_size, config.global_size),
            small,
            empty(2 * n_images, n_patches, dtype=torch.bool),
            empty(2 * n_images, n_patches, dtype=torch.bool),
            empty(int(MASKED_SHARE * 2 * n_images * n_patches), dtype=torch.int64),
        )


@contextlib.contextmanager
def fake_run(config: TrainConfig, world: World = SINGLE, *, triton: bool = True) -> Iterator[FakeRun]:
    """Make a run on fake tensors. Inside the block, torch takes the code paths that it takes on a GPU."""

    def on_gpu(config: TrainConfig) -> nn.Module:
        with torch.device("cuda"):
            return make_network(config)

    patches = [
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(nn.Module, "to", lambda self, *arguments, **options: self),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch("training.setup.make_network", on_gpu),
        *(mock.patch.object(nn.init, f"{name}_", _unchanged) for name in ("trunc_normal", "normal", "zeros", "ones")),
    ]
    if triton:
        patches.append(mock.patch("training.losses.soft_cross_entropy", _cross_entropy))
    else:
        patches.append(mock.patch("training.kernels.why_no_triton", return_value="no Triton in this proof"))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield FakeRun(config, make_setup(config, world), make_schedules(config, 100))


def _unchanged(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return tensor


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernels that torch selects on a GPU: flash attention, which float32 does not have."""
    if query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class _CrossEntropy(torch.autograd.Function):
    """Allocates the tensors of the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, targets: Tensor, *vectors: Tensor | None) -> Tensor:
        loss, *saved = (student_logits.new_empty(len(student_logits), dtype=torch.float32) for _ in range(3))
        ctx.save_for_backward(student_logits, targets, *vectors, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def _cross_entropy(student_logits: Tensor, targets: Tensor | TeacherTargets, student_temp: float) -> Tensor:
    if isinstance(targets, TeacherTargets):
        return _CrossEntropy.apply(student_logits, targets.logits, targets.u, targets.v)
    return _CrossEntropy.apply(student_logits, targets, None, None)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


class Copies(TorchDispatchMode):
    """Notes every copy between the host and the device, for which the host may have to wait.

    Fake tensors have no values, so an operation that returns a value to the host raises an error anyway, and so does an
    operation whose result has a shape that depends on values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.places: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        devices = {tensor.device.type for tensor in _tensors((args, kwargs, result))}
        if function.overloadpacket.__name__ in ("_to_copy", "copy_", "copy") and len(devices) > 1:
            self.places.append(f"{function} at {_place()}")
        return result


def _place() -> str:
    """Return the lines of this project's code that are running, innermost last."""
    frames = [f for f in traceback.extract_stack() if str(ROOT) in f.filename and Path(__file__).name not in f.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])


class Memory(TorchDispatchMode):
    """Adds up the device memory that tensors occupy.

    `peak` is an upper bound. Storages that FSDP2 empties without freeing them count as occupied.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES

        def freed(_: Any) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor)
        return result


class Collectives(TorchDispatchMode):
    """Counts the collective operations between ranks, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class _Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Event":
        return _Event()

    def synchronize(self) -> None:
        raise AssertionError("the host waits for a stream")


class _Event:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def record(self, *arguments: Any) -> None:
        pass

    def wait(self, *arguments: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        raise AssertionError("the host waits for an event")


class _Properties:
    name, major, minor, multi_processor_count, total_memory = "NVIDIA H200", 9, 0, 132, 143 << 30


@contextlib.contextmanager
def fake_ranks(size: int) -> Iterator[World]:
    """Join a fake process group as rank 0 of `size`. Its collective operations return at once."""
    of_torch_cuda = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *arguments: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "device_count": lambda: size,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda *arguments: _Properties,
        "get_device_capability": lambda *arguments: (9, 0),
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda *arguments: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda *arguments, **options: None,
        "get_rng_state_all": list,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    of_torch_c = {
        "_cuda_getCurrentRawStream": lambda index: 0,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda device: None,
        "_cuda_exchangeDevice": lambda device: 0,
        "_cuda_maybeExchangeDevice": lambda device: 0,
        "_cuda_getDeviceCount": lambda: size,
    }
    with contextlib.ExitStack() as stack:
        for name, value in of_torch_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in of_torch_c.items():
            stack.enter_context(mock.patch.object(torch._C, name, value, create=True))
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("cuda", (size,))  # not possible with fake tensors
        stack.enter_context(mock.patch("training.distributed.init_device_mesh", return_value=mesh))
        yield World(0, size, GPU)
