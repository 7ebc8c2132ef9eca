"""Two processes are one: the losses and weights of a single one with the whole batch, whatever keeps the weights.

In half precision, FSDP2 is compared with DDP, alone and with everything that a large network trains with.

The losses are weighted so low that gradients stay near AdamW's epsilon. There a step depends smoothly on the gradient;
otherwise a weight whose gradient is nearly zero would move by a whole step in a direction that rounding decides.
"""

import functools
import multiprocessing
import os
import socket
from collections import Counter

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from tests.arithmetic import THREADS
from tests.training.tiny import ALONE
from training.config import TrainConfig
from training.data.crops import make_crops
from training.distributed import agree, from_main, gather_rows, join, logsumexp_over_ranks, sum_over_ranks, whole
from training.held_out import HeldOutImages, held_out_loss
from training.losses import koleo_loss
from training.setup import make_setup
from training.state import check_same_settings, find_state, load_state, save_state
from training.step import train_step
from training.wiring import crop_settings, make_schedules, step_settings

STEPS, BATCH = 5, 8
LOSS_WEIGHT = 1e-6
SETTINGS = {
    "data": "-",
    "out": "-",
    "vit": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "layerscale_init": 1.0},
    "global_size": 28,
    "local_size": 14,
    "n_local": 2,
    "cache_size": 32,
    "n_prototypes": 24,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "batch_size": BATCH,
    "precision": "fp32",
    "lr": 0.05,
    "warmup": 0.0,
    "freeze_last_layer": 0.0,
    "dino_weight": LOSS_WEIGHT,
    "ibot_weight": LOSS_WEIGHT,
    "koleo_weight": 0.1 * LOSS_WEIGHT,
}
CASES = {
    "sinkhorn": {},
    "softmax": {"centering": "softmax", "shared_head": False, "ibot_bottleneck_dim": 4},
    "batch_norm": {"centering": "batch_norm"},
    "sgd": {"optimizer": "sgd_normalized", "koleo_weight": 0.0, "lr": 5.0},
    "micro": {"micro_batch": 2, "koleo_weight": 0.0},
    "masks off": {"mask_probability": 0.0, "ibot_weight": 0.0, "centering": "softmax"},
}


SHARDED = ("sinkhorn", "sgd", "micro")  # what keeps the weights does not change how they are centred
HALF = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "like ViT-g": {
        "precision": "bf16",
        "compile": True,
        "checkpoint_blocks": True,
        "drop_path": 0.4,
        "micro_batch": 2,
        "shared_head": False,
        "ibot_bottleneck_dim": 4,
    },
}


class Gathers(TorchDispatchMode):
    """Counts the collective operations inside the block."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            self.calls[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def config_of(**changes):
    return TrainConfig.model_validate({**SETTINGS, **changes})


def photos():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.ones(BATCH)


def run(config, world, first=0, last=STEPS, resume_from=None, save_to=None):
    """Losses of each step, averaged over the ranks, and the whole weights of student and average at the end.

    The weighted sum of the losses is given in units of `LOSS_WEIGHT`.
    """
    images, aspect = photos()
    setup, schedules = make_setup(config, world), make_schedules(config, 10)
    crops = crop_settings(config)
    if resume_from is not None:
        saved, broken = find_state(resume_from)
        assert not broken
        assert saved.step == first
        check_same_settings(saved, config.model_dump(mode="json"))
        load_state(saved, setup.parts)
    mine = torch.arange(BATCH)[world.rank * BATCH // world.size : (world.rank + 1) * BATCH // world.size]
    micro = config.micro_batch or len(mine)
    figures = []
    for step in range(first, last):
        micros = [
            make_crops(crops, images[p], aspect[p], step, p, crops.phase(0.0), world.device) for p in mine.split(micro)
        ]
        terms, _ = train_step(step_settings(config), setup, schedules, micros, step)
        means = torch.stack([terms["dino"], terms["ibot"], terms["koleo"], terms["loss"] / LOSS_WEIGHT])
        figures.append(sum_over_ranks(world)(means) / world.size)
    if save_to is not None:
        save_state(save_to, setup.parts, last, config.model_dump(mode="json"), {}, 2, world)
    networks = (setup.parts.student, setup.parts.ema)
    weights = {
        f"{i}.{k}": whole(v).clone() for i, network in enumerate(networks) for k, v in network.state_dict().items()
    }
    return torch.stack(figures), weights


def held_out(config, world):
    """The loss on the same images as held-out images, with the initial weights."""
    images, aspect = photos()
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    parts = HeldOutImages(images[mine], aspect[mine])
    return held_out_loss(step_settings(config), make_setup(config, world), crop_settings(config), parts, 0.05)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def rank_main(rank, port, folder):
    """What each of two processes does; its findings go to files."""
    torch.set_num_threads(THREADS)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    with join("cpu") as world:
        assert (world.rank, world.size) == (rank, 2)
        found = {}
        for strategy in ("ddp", "fsdp"):
            for name, changes in CASES.items():
                if strategy == "fsdp" and name not in SHARDED:
                    continue
                found[strategy, name] = run(config_of(**changes, strategy=strategy), world)
            found[strategy, "held out"] = held_out(config_of(strategy=strategy), world)
            out = folder / strategy
            if world.is_main:
                out.mkdir()
            run(config_of(strategy=strategy), world, last=3, save_to=out)
            found[strategy, "resumed"] = run(config_of(strategy=strategy), world, first=3, resume_from=out)
        for micro in (4, 2):
            with Gathers() as gathers:
                run(config_of(strategy="fsdp", micro_batch=micro), world, last=1)
            found["gathers", micro] = dict(gathers.calls)
        torch.compile = functools.partial(torch.compile, backend="eager")  # traced, but not translated to C++
        for name, changes in HALF.items():
            found["fsdp", name] = run(config_of(**changes, strategy="fsdp"), world)
            found["ddp", name] = run(config_of(**{**changes, "compile": False}, strategy="ddp"), world)
        x = torch.arange(6.0).reshape(3, 2) + 10 * rank
        found["sum"] = sum_over_ranks(world)(x)
        found["lse"] = logsumexp_over_ranks(world)(x[:1])
        found["agree"] = (agree(world, rank == 1), agree(world, False))
        found["from_main"] = from_main(world, f"rank {rank}")
        rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        loss = koleo_loss(rows, gather_rows(world, rows), offset=4 * rank)
        loss.backward()
        found["koleo"] = (rows.detach(), loss.detach(), rows.grad)
        torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # Both are forked from a process that has no threads yet and has imported what takes each of them six seconds.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp"])
    mp.start_processes(rank_main, args=(free_port(), folder), nprocs=2, start_method="forkserver")
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    # The large batch at once: what micro-batches and ranks are compared with.
    return {name: run(config_of(**{**changes, "micro_batch": None}), ALONE) for name, changes in CASES.items()}


def same_weights(found, expected):
    """To float rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("strategy", "name"), [("ddp", name) for name in CASES] + [("fsdp", name) for name in SHARDED])
def test_two_ranks_equal_one(two, one, strategy, name):
    figures, weights = one[name]
    for rank in range(2):
        found, theirs = two[1][rank][strategy, name]
        torch.testing.assert_close(found, figures, rtol=1e-5, atol=1e-5)
        same_weights(theirs, weights)


def difference(found, expected, start):
    """The distance between two networks' weights after training, as a share of the way from the start."""
    names = [f"0.{name}" for name in start]
    apart = sum((found[name] - expected[name]).square().sum() for name in names)
    return float((apart / sum((expected[f"0.{name}"] - x).square().sum() for name, x in start.items())).sqrt())


@pytest.mark.parametrize("name", HALF)
def test_sharded_weights_in_half_precision_train_like_whole_ones(two, one, name):
    start = make_setup(config_of(**{**HALF[name], "compile": False}), ALONE).parts.student.state_dict()
    for found in two[1]:
        figures, weights = found["ddp", name]
        sharded, theirs = found["fsdp", name]
        torch.testing.assert_close(sharded, figures, rtol=0.01, atol=0)
        assert difference(theirs, weights, start) < 0.05
    if name != "like ViT-g":  # the comparison could fail: the precision itself is seen
        assert difference(one["sinkhorn"][1], weights, start) > 2 * difference(theirs, weights, start)


def test_a_step_gathers_the_weights_of_the_student_once(two):
    """A network is two blocks and the rest, three units. The teacher's are gathered for each micro-batch."""
    for found in two[1]:
        for micro, n_micros in ((4, 1), (2, 2)):
            assert found["gathers", micro]["_allgather_base_"] == 3 + 3 * n_micros


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_compute_the_same_loss_on_held_out_images(two, strategy):
    expected = held_out(config_of(), ALONE)
    for rank in range(2):
        assert two[1][rank][strategy, "held out"] == pytest.approx(expected, rel=1e-5)


def test_the_comparison_could_fail(one):
    assert not torch.allclose(one["sinkhorn"][0], one["softmax"][0], rtol=1e-3)
    assert not torch.allclose(one["sinkhorn"][0][:, 0], one["batch_norm"][0][:, 0], rtol=1e-3)
    for name, changes in CASES.items():  # weights move by far more than the comparison allows
        start = make_setup(config_of(**changes), ALONE).parts.student.backbone.blocks[0].attn.proj.weight
        end = one[name][1]["0.backbone.blocks.0.attn.proj.weight"]
        assert (end - start).abs().max() > 1e-3, name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_two_ranks_wrote_is_gone_on_with_by_one(two, one, strategy):
    folder, found = two
    figures, weights = run(config_of(), ALONE, first=3, resume_from=folder / strategy)
    torch.testing.assert_close(figures, one["sinkhorn"][0][3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][strategy, "resumed"][0], one["sinkhorn"][0][3:], rtol=1e-5, atol=1e-5)
    same_weights(weights, one["sinkhorn"][1])


def test_micro_batches_equal_one_batch(one):
    figures, weights = one["micro"]
    for micro in (1, 4):
        found, theirs = run(config_of(koleo_weight=0.0, micro_batch=micro), ALONE)
        torch.testing.assert_close(found[:, [0, 1, 3]], figures[:, [0, 1, 3]], rtol=1e-5, atol=1e-5)
        same_weights(theirs, weights)


def test_what_the_ranks_tell_each_other(two):
    for rank, found in enumerate(two[1]):
        x = torch.arange(6.0).reshape(3, 2)
        torch.testing.assert_close(found["sum"], 2 * x + 10)
        torch.testing.assert_close(found["lse"], torch.logsumexp(torch.stack((x[:1], x[:1] + 10)), dim=0))
        assert found["agree"] == (True, False)
        assert found["from_main"] == "rank 0"
        rows = torch.cat([other["koleo"][0] for other in two[1]]).requires_grad_()
        koleo_loss(rows).backward()
        # each rank's loss is the mean over its rows: their mean is the whole one, and DDP averages gradients
        torch.testing.assert_close(found["koleo"][2] / 2, rows.grad[4 * rank : 4 * rank + 4])
