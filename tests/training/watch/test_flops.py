"""Counting a step's work: exactly what torch counts, part by part, and the published figures per image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ViTConfig, config_for
from training.data.masking import batch_masks
from training.student_teacher import Network
from training.watch import flops
from training.watch.flops import HeadShape, StepShape, expected_masked, known_peak_flops, step_flops

HEAD = HeadShape(n_prototypes=40, hidden_dim=24, bottleneck_dim=8)


def network(config, drop_path=0.0):
    return Network(
        config,
        n_prototypes=HEAD.n_prototypes,
        hidden_dim=HEAD.hidden_dim,
        bottleneck_dim=HEAD.bottleneck_dim,
        shared_head=True,
        drop_path_rate=drop_path,
    )


def counted(action):
    # The plain attention: its two products are what every kernel computes.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def tiny(**changes):
    return ViTConfig(**{"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"ffn": "swiglu"}, {"num_register_tokens": 4, "depth": 3}, {"patch_size": 7, "mlp_ratio": 3.0}],
    ids=str,
)
def test_each_part_is_what_torch_counts(changes):
    config = tiny(**changes)
    net, pixels = network(config), torch.randn(3, 3, 28, 28)
    tokens = net.backbone.prepare_tokens_with_masks(pixels)
    assert flops.patch_embed_flops(config, 28) * 3 == counted(lambda: net.backbone.patch_embed(pixels))
    assert flops.block_flops(config, 28) * 3 == counted(lambda: net.backbone.blocks[0](tokens))
    assert flops.backbone_flops(config, 28) * 3 == counted(lambda: net.backbone(pixels))
    assert flops.head_flops(16, HEAD) * 5 == counted(lambda: net.dino_head(torch.randn(5, 16)))


def test_drop_path_counts_the_kept_samples():
    config, pixels = tiny(), torch.randn(10, 3, 28, 28)
    net = network(config, drop_path=0.4).train()
    assert flops.backbone_flops(config, 28, kept=0.6) * 10 == pytest.approx(counted(lambda: net.backbone(pixels)))


def test_a_step_is_three_times_the_student_and_once_the_teacher():
    config, teacher_config = tiny(img_size=14), tiny(img_size=14, depth=3)
    # At 14 pixels there is one patch, so no position is resized at either crop size.
    student, teacher = network(config), network(teacher_config)
    batch, n_local, n_masked = 3, 2, 4

    def forward(net, n_locals):
        cls = net.backbone(torch.randn(2 * batch, 3, 14, 14))
        net.dino_head(cls)
        (net.own_ibot_head or net.dino_head)(torch.randn(n_masked, 16))
        if n_locals:
            net.dino_head(net.backbone(torch.randn(n_locals * batch, 3, 14, 14)))

    found = step_flops(
        config,
        StepShape(batch_size=batch, global_size=14, local_size=14, n_local=n_local, n_masked=n_masked),
        dino_head=HEAD,
        teacher=teacher_config,
    )
    expected_student, expected_teacher = (
        counted(lambda: forward(student, n_local)),
        counted(lambda: forward(teacher, 0)),
    )
    assert found.student_backbone + found.student_heads == 3 * expected_student
    assert found.teacher_backbone + found.teacher_heads == expected_teacher
    assert found.total == 3 * expected_student + expected_teacher


def test_backward_is_twice_forward_but_for_the_input_of_the_patch_embedding():
    config = tiny()
    net, pixels = network(config), torch.randn(3, 3, 28, 28)
    both = counted(lambda: net.backbone(pixels).sum().backward())
    assert both == 3 * 3 * flops.backbone_flops(config, 28) - 3 * flops.patch_embed_flops(config, 28)


SHARED = HeadShape(65_536)
LARGE = {"dino_head": HeadShape(131_072, 2048, 384), "ibot_head": HeadShape(131_072, 2048, 256)}


@pytest.mark.parametrize(
    ("name", "patch", "local_size", "heads", "drop_path", "gflop"),
    [
        ("dinov2_vits14", 14, 98, {"dino_head": SHARED}, 0.0, 166),
        ("dinov2_vitb14", 14, 98, {"dino_head": SHARED}, 0.0, 593),
        ("dinov2_vitl14", 16, 96, {"dino_head": SHARED}, 0.3, 1155),
        ("dinov2_vitl14", 14, 98, LARGE, 0.4, 1386),
        ("dinov2_vitg14", 14, 98, LARGE, 0.4, 5034),
    ],
)
def test_the_recipes_work_per_image(name, patch, local_size, heads, drop_path, gflop):
    config = replace(config_for(name), patch_size=patch, img_size=37 * patch)
    masked = expected_masked(128, (224 // patch) ** 2, (0.1, 0.5), 0.5)
    found = step_flops(
        config,
        StepShape(batch_size=64, global_size=224, local_size=local_size, n_local=8, n_masked=masked),
        drop_path=drop_path,
        **heads,
    )
    assert found.total / 64 / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_expected_number_of_masked_patches_is_the_maskings():
    drawn = [int(batch_masks(0, i, range(32), 32, (16, 16)).sum()) for i in range(40)]
    assert expected_masked(32, 256, (0.1, 0.5), 0.5) == pytest.approx(np.mean(drawn), rel=0.05)
    assert expected_masked(32, 256, (0.1, 0.5), 0.0) == 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("Something New", None),
    ],
)
def test_peaks_by_name(name, tflops):
    assert known_peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_a_cpus_peak_is_measured_only_on_request():
    cpu = torch.device("cpu")
    assert flops.device_peak_flops(cpu) is None
    assert flops.measured_peak_flops(cpu, side=64, attempts=2) > 0
    assert "threads" in flops.describe_device(cpu)
