"""Train one run with several processes. Only this file uses torch.distributed and torchrun's environment variables.

`torchrun --nproc-per-node N -m training ...` starts N processes, which are called ranks. In every step each rank
processes a share of the batch. The losses need data from other ranks and get it through functions in this file: one
computes a log-sum-exp over all ranks (for Sinkhorn-Knopp), one a sum (for the moving centre and batch normalisation),
and one gathers rows (for KoLeo). With a single process, these functions return their input, and no process group is
created.

Weights are stored in one of two ways. With DDP every rank has a full copy of the network. DDP is faster, and a full
copy of ViT-S, B or L fits into memory. With FSDP2 (`fully_shard`) each rank has a slice of the weights,
gradients and optimizer state, and fetches the weights of a block when it computes the block.
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
    """The rank of this process, the number of processes in the run (`size`), and the device of this process."""

    rank: int
    size: int
    device: torch.device
    on_machine: int = 1  # ranks that share this machine's cores
    control: dist.ProcessGroup | None = None  # for control messages, which may take as long as an evaluation

    @property
    def is_main(self) -> bool:
        """Return whether this process is rank 0, which writes the files and prints."""
        return self.rank == 0


@contextmanager
def join(device: str) -> Iterator[World]:
    """Connect this process to the other ranks of its run for the duration of the block.

    Yield this process's `World`: its rank, the number of ranks and its device. The ranks are the processes that
    torchrun started. Without torchrun, this process is the run's only rank.

    Args:
        device: `auto` (`cuda` if there is a GPU, otherwise `cpu`), `cpu`, `cuda` or, for a single rank, `cuda:N`. If
            several ranks use GPUs, each rank gets its own GPU.

    Raises:
        ValueError: `device` is unknown, it asks for a GPU and torch finds none, or it is `cuda:N` and there are several
            ranks.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(kind)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: choose auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch {torch.__version__} finds no GPU")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda" and chosen.index is not None:
        raise ValueError(f"device={device!r}: each of {size} ranks takes a GPU of its own; use device=cuda")
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
    """Wait until every rank has called this function."""
    if world.size > 1:
        dist.barrier(world.control)


def agree(world: World, value: bool) -> bool:
    """Return whether `value` is True on at least one rank. The result is the same on all ranks."""
    if world.size == 1:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=world.control)
    return bool(flag)


def from_main(world: World, value: T) -> T:
    """Return rank 0's `value` on every rank. The value is sent between the processes as a pickle."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=world.control)
    return box[0]


def from_all(world: World, values: Sequence[T]) -> list[T]:
    """On every rank, return one list with the values of all ranks, in rank order. The values are sent as pickles."""
    if world.size == 1:
        return list(values)
    boxes: list[list[T]] = [[] for _ in range(world.size)]
    dist.all_gather_object(boxes, list(values))
    return [value for box in boxes for value in box]


def sum_over_ranks(world: World) -> Callable[[Tensor], Tensor]:
    """Return a function that sums a tensor over all ranks. No gradient flows through the sum."""

    def total(x: Tensor) -> Tensor:
        if world.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    return total


def logsumexp_over_ranks(world: World) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the log-sum-exp of a tensor over all ranks, element by element.

    No gradient flows through the function.
    """

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
    """An autograd function that gathers rows from all ranks.

    In the backward pass, each rank gets the gradients for its own rows, summed over the ranks.
    """

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
    """Gather the rows of `x` [n, D] from all ranks, and return them in rank order, [ranks * n, D].

    In the backward pass, the gradients for each row are summed over the ranks and returned to the rank that the row
    came from.
    """
    return x if world.size == 1 else _GatherRows.apply(x)  # type: ignore[no-untyped-call]


def mean_over_ranks(world: World, values: Tensor) -> Tensor:
    """Return the mean of `values` over all ranks, element by element."""
    if world.size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world.size


def min_over_ranks(world: World, value: Tensor) -> Tensor:
    """Return the minimum of `value` over all ranks, element by element."""
    if world.size == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def shard(
    network: nn.Module, blocks: Iterable[nn.Module], world: World, compute_dtype: torch.dtype, *, trains: bool
) -> None:
    """Shard a network in place with FSDP2, so that each rank has a slice of its weights.

    Each of `blocks` is sharded separately, and the rest of the network is sharded as one unit. Gradients are averaged
    in float32. The weights of a block are sent between ranks in `compute_dtype`.

    Set `trains` to True if the network trains. Each rank then gathers the weights once in a step and keeps them for all
    micro-batches, in the forward and the backward pass, until `drop_gathered`. This is ZeRO's second stage, like
    SHARD_GRAD_OP in Meta's code (docs/decisions/0049-gpu-training.md).
    """
    # FSDP2 warns that the outputs are views, but no code writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not trains)
    whole_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded = fully_shard(network, mesh=mesh, mp_policy=whole_policy, reshard_after_forward=not trains)
    sharded.set_reshard_after_backward(not trains)


def drop_gathered(network: nn.Module) -> None:
    """Free the weights that `network` has gathered from other ranks, so that each rank has only its own slices."""
    if isinstance(network, FSDPModule):
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def replicate(network: nn.Module, world: World) -> nn.Module:
    """Wrap a network in DDP, which averages its gradients over the ranks. With one rank, return it unchanged."""
    if world.size == 1:
        return network
    return DistributedDataParallel(
        network, device_ids=[world.device] if world.device.type == "cuda" else None, gradient_as_bucket_view=True
    )


@contextmanager
def gradients_stay_local(network: nn.Module, when: bool) -> Iterator[None]:
    """If `when` is True, gradients accumulate on this rank inside the block and are not averaged over the ranks.

    The training loop does this for all micro-batches of a step except the last. The backward pass of the last
    micro-batch then averages the accumulated gradients. If `when` is False, this context has no effect.
    """
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
    """Return this rank's slice of a sharded tensor. A tensor that is not sharded is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, and return the full tensor on every rank. All ranks must call this function.

    A tensor that is not sharded is returned unchanged.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, value: Tensor) -> Tensor:
    """Return `value` on `target`'s device, sharded in the same way as `target`. All ranks must call this function."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)
