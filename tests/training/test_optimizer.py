"""The optimizers against plain definitions, and steps that must change nothing."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model.config import ViTConfig
from training.optimizer import NormalizedSGD, clip_gradients, make_optimizer, optimizer_step, set_schedule
from training.student_teacher import Network

KINDS = ["adamw", "sgd_normalized"]
RATES = {"backbone": 0.1, "head": 0.1, "last_layer": 0.05}


@pytest.fixture
def network():
    torch.manual_seed(0)
    vit = ViTConfig(embed_dim=8, depth=2, num_heads=2, img_size=28)
    return Network(vit, n_prototypes=6, hidden_dim=7, bottleneck_dim=5, shared_head=False, drop_path_rate=0.0)


def fill_gradients(network, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def optimizer_of(network, kind):
    return make_optimizer(network, layer_decay=0.9, patch_embed_lr_mult=0.2, betas=(0.9, 0.999), kind=kind)


def snapshot(network, optimizer):
    return copy.deepcopy((list(network.state_dict().values()), optimizer.state_dict()["state"]))


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_normalized_sgd_is_its_definition(network):
    optimizer = optimizer_of(network, "sgd_normalized")
    set_schedule(optimizer, RATES, 0.3)
    weights = {name: parameter.detach().double() for name, parameter in network.named_parameters()}
    averages = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for step in range(3):
        fill_gradients(network, step, scale=10.0**step)
        for unit in ("backbone", "dino_head", "own_ibot_head"):
            own = {n: p for n, p in network.named_parameters() if n.startswith(unit + ".")}
            norm = sum(float(p.grad.double().square().sum()) for p in own.values()) ** 0.5
            for name, parameter in own.items():
                group = groups[id(parameter)]
                averages[name] = 0.9 * averages[name] + 0.1 * parameter.grad.double() / norm
                weights[name] = weights[name] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * averages[name]
        optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)


def test_a_step_of_normalized_sgd_does_not_depend_on_the_size_of_the_gradient(network):
    other = copy.deepcopy(network)
    for copy_, scale in ((network, 1.0), (other, 1e-4)):
        optimizer = optimizer_of(copy_, "sgd_normalized")
        set_schedule(optimizer, RATES, 0.1)
        fill_gradients(copy_, scale=scale)
        clip_gradients(copy_, 1.0)
        optimizer.step()
    for left, right in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_normalized_sgd_without_any_gradient_or_with_zeros_keeps_the_weights(network):
    optimizer = optimizer_of(network, "sgd_normalized")
    set_schedule(optimizer, RATES, 0.0)
    before = copy.deepcopy(list(network.parameters()))
    optimizer.step()
    fill_gradients(network, scale=0.0)
    optimizer.step()
    assert_equal(list(network.parameters()), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 2])  # good steps before it
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(network, kind, after, bad):
    optimizer = optimizer_of(network, kind)
    set_schedule(optimizer, RATES, 0.3)
    yes, no = torch.tensor(True), torch.tensor(False)
    for step in range(after):
        fill_gradients(network, step)
        optimizer_step(optimizer, yes)
    fill_gradients(network, 7)
    before, before_state = snapshot(network, optimizer)
    network.backbone.cls_token.grad[0, 0, 0] = bad
    network.dino_head.mlp[0].weight.grad.fill_(bad)
    norms = clip_gradients(network, 3.0)
    finite = torch.stack(list(norms.values())).isfinite().all()
    assert not finite
    optimizer_step(optimizer, finite)
    weights, state = snapshot(network, optimizer)
    assert_equal(weights, before)
    if after:
        assert_equal(state, before_state)
    else:  # it was made, but holds no step
        assert all(not value.any() for entry in state.values() for value in entry.values())
    assert not hasattr(optimizer, "found_inf")
    optimizer_step(optimizer, no)  # nor does one that is finite itself, but was refused
    assert_equal(list(network.state_dict().values()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_counts_is_the_plain_step(network, kind):
    other = copy.deepcopy(network)
    plain, guarded = optimizer_of(network, kind), optimizer_of(other, kind)
    for step in range(3):
        for copy_, optimizer in ((network, plain), (other, guarded)):
            set_schedule(optimizer, RATES, 0.3)
            fill_gradients(copy_, step)
        plain.step()
        optimizer_step(guarded, torch.tensor(True))
    assert_equal(snapshot(network, plain), snapshot(other, guarded))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_goes_on_where_it_was_saved(network, kind):
    optimizer = optimizer_of(network, kind)
    set_schedule(optimizer, RATES, 0.3)
    fill_gradients(network, 0)
    optimizer.step()
    other = copy.deepcopy(network)
    resumed = optimizer_of(other, kind)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for copy_, own in ((network, optimizer), (other, resumed)):
        fill_gradients(copy_, 1)
        own.step()
    assert_equal(snapshot(network, optimizer), snapshot(other, resumed))


def test_clipping_is_per_sub_module_and_leaves_small_gradients(network):
    fill_gradients(network)
    for parameter in network.dino_head.parameters():
        parameter.grad *= 1e-3
    before = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    norms = clip_gradients(network, 0.5)
    assert list(norms) == ["backbone", "dino_head", "own_ibot_head"]
    for unit, norm in norms.items():
        own = {n: p.grad for n, p in network.named_parameters() if n.startswith(unit + ".")}
        expected = torch.cat([before[name].flatten() for name in own]).norm()
        torch.testing.assert_close(norm, expected)
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, before[name] * min(1.0, 0.5 / float(norm)))
    network.backbone.zero_grad()
    assert float(clip_gradients(network, 0.5)["backbone"]) == 0


def test_units_and_kinds(network):
    groups = optimizer_of(network, "adamw").param_groups
    assert {group["unit"] for group in groups} == {"backbone", "dino_head", "own_ibot_head"}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    with pytest.raises(ValueError, match="optimizer='lamb': choose adamw or sgd_normalized"):
        optimizer_of(network, "lamb")
    with pytest.raises(ValueError, match=r"beta=1.0 must be at least 0"):
        NormalizedSGD([{"params": [nn.Parameter(torch.zeros(1))], "unit": "all"}], beta=1.0)


@pytest.fixture
def mesh():
    """A group of one process: enough for weights to be sharded tensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_take_the_same_steps(network, kind, mesh):
    sharded = copy.deepcopy(network)
    fully_shard(sharded, mesh=mesh)
    optimizers = optimizer_of(network, kind), optimizer_of(sharded, kind)
    for step, good in enumerate([True, False, True]):
        fill_gradients(network, step)
        for own, parameter in zip(network.parameters(), sharded.parameters(), strict=True):
            parameter.grad = dist.tensor.distribute_tensor(own.grad, mesh, parameter.placements)
            if not good:
                parameter.grad.to_local().fill_(float("nan"))
                own.grad.fill_(float("nan"))
        norms = [clip_gradients(copy_, 2.0) for copy_ in (network, sharded)]
        torch.testing.assert_close(norms[0], norms[1], equal_nan=True)
        for optimizer, own_norms in zip(optimizers, norms, strict=True):
            set_schedule(optimizer, RATES, 0.3)
            optimizer_step(optimizer, torch.stack(list(own_norms.values())).isfinite().all())
    for own, parameter in zip(network.parameters(), sharded.parameters(), strict=True):
        assert torch.isfinite(own).all()
        torch.testing.assert_close(parameter.full_tensor(), own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: waiting of the host cannot be seen")
def test_the_host_does_not_wait(network, kind):
    network.cuda()
    optimizer = optimizer_of(network, kind)
    set_schedule(optimizer, RATES, 0.3)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            norms = clip_gradients(network, 3.0)
            optimizer_step(optimizer, torch.stack(list(norms.values())).isfinite().all())
    finally:
        torch.cuda.set_sync_debug_mode("default")
