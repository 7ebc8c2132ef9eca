"""Several processes, one run: the only file that knows torch.distributed and torchrun's variables.

`torchrun --nproc-per-node N -m training ...` starts N processes ("ranks"), each with its share of every step's images.
What the losses need of the others comes through the functions here: a log-sum-exp over all ranks (Sinkhorn-Knopp), a
sum (moving centre, batch normalisation), gathered rows (KoLeo). With one process they return what they were given, and
no process group exists.

Two ways to keep the weights: DDP, a whole copy on every rank (S, B and L fit, and it is faster), and FSDP2
(`fully_shard`), where each rank keeps a slice of weights, gradients and optimizer state and fetches a block's weights
when it computes it.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
CONTROL_TIMEOUT = timedelta(hours=24)  # one rank evaluates while the others wait


@dataclass(frozen=True)
class World:
    """Where this process stands among the `size` of a run, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device
    on_machine: int = 1  # ranks that share this machine's cores
    control: dist.ProcessGroup | None = None  # for words between the processes, which may take as long as an evaluation

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0


@contextmanager
def join(device: str) -> Iterator[World]:
    """Enter the run that torchrun started, or stand alone without it.

    Args:
        device: `auto` (cuda where there is one, else cpu), `cpu`, `cuda`; with several ranks each gets its own GPU.

    Raises:
        ValueError: a device that this machine lacks.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(kind)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch {torch.__version__} sees no GPU here")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda" and chosen.index is not None:
        raise ValueError(f"device={device!r}: each of {size} ranks takes a GPU of its own; give device=cuda")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        yield World(dist.get_rank(), size, chosen, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), control)
    finally:
        dist.destroy_process_group()


def wait_for_all(world: World) -> None:
    """Return when every rank has come here."""
    if world.size > 1:
        dist.barrier(world.control)


def agree(world: World, value: bool) -> bool:
    """Whether any rank says true; the same answer on all of them."""
    if world.size == 1:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=world.control)
    return bool(flag)


def from_main(world: World, value: T) -> T:
    """What rank 0 passed, on every rank (pickled among the run's own processes)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=world.control)
    return box[0]


def from_all(world: World, values: Sequence[T]) -> list[T]:
    """What all ranks passed, in their order, on every rank (pickled, as in `from_main`)."""
    if world.size == 1:
        return list(values)
    boxes: list[list[T]] = [[] for _ in range(world.size)]
    dist.all_gather_object(boxes, list(values))
    return [value for box in boxes for value in box]


def sum_over_ranks(world: World) -> Callable[[Tensor], Tensor]:
    """A function that adds up a tensor over all ranks, without gradient."""

    def total(x: Tensor) -> Tensor:
        if world.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    return total


def logsumexp_over_ranks(world: World) -> Callable[[Tensor], Tensor]:
    """A function that combines log-sum-exps over all ranks, without gradient: log of the sum of their exponentials."""

    def combine(x: Tensor) -> Tensor:
        if world.size == 1:
            return x
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        total = (x - largest).exp()
        dist.all_reduce(total)
        return total.log_().add_(largest)

    return combine


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; in the backward pass each rank gets what all of them want of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(world: World, x: Tensor) -> Tensor:
    """Rows of all ranks [size * n, D] in their order; a gradient flows back to where each row came from."""
    return x if world.size == 1 else _GatherRows.apply(x)  # type: ignore[no-untyped-call]


def mean_over_ranks(world: World, values: Tensor) -> Tensor:
    """The mean of each figure over all ranks, for the log."""
    if world.size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world.size


def min_over_ranks(world: World, value: Tensor) -> Tensor:
    """The least of each figure over all ranks."""
    if world.size == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def shard(
    network: nn.Module, blocks: Iterable[nn.Module], world: World, compute_dtype: torch.dtype, *, trains: bool
) -> None:
    """Cut a network's weights into one slice per rank, in place: first its `blocks`, then what is left.

    Gradients are averaged in float32; a block's weights travel in `compute_dtype`. A network that does not train is
    slices again after its forward pass; one that does keeps its heads whole for the backward pass, which begins there.
    """
    # The outputs are views, and nobody writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    whole_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(network, mesh=mesh, mp_policy=whole_policy, reshard_after_forward=not trains)


def replicate(network: nn.Module, world: World) -> nn.Module:
    """The network behind DDP, which averages its gradients over the ranks; itself if there is only one."""
    if world.size == 1:
        return network
    return DistributedDataParallel(
        network, device_ids=[world.device] if world.device.type == "cuda" else None, gradient_as_bucket_view=True
    )


@contextmanager
def gradients_stay_local(network: nn.Module, when: bool) -> Iterator[None]:
    """Inside, a backward pass adds to this rank's gradients and leaves averaging to a later one: for micro-batches."""
    if not when:
        yield
    elif isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank (all must call it); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, value: Tensor) -> Tensor:
    """`value`, whole, as a tensor kept like `target`: sharded as it is, on its device (all ranks must call)."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)
