"""Count the floating-point operations of a training step, and find the peak speed of the device, to compute MFU.

MFU, model FLOPs utilisation (arXiv 2204.02311, appendix B), is the useful work per second divided by the device's peak.
The useful work is the work that the algorithm needs: the matrix products of the networks, where each multiply-add
counts as two operations. Recomputation to save memory, losses, optimizer, augmentation and elementwise operations are
not counted, so additional work of these kinds cannot raise the MFU.

For each image of N patches, with T = 1 + R + N tokens, width D, feed-forward width F and patch side p, and for each
layer:

    patch embedding   2 * N * 3 p^2 * D
    attention         2 * T * D * 3D  +  2 * T * D * D  (qkv, projection)  +  4 * T^2 * D  (scores, weighted sum)
    feed-forward      4 * T * D * F  (MLP)     or     6 * T * D * F  (SwiGLU: three products)
    head, per token   2 * (D * H + H * H + H * Z + Z * K)      hidden H, bottleneck Z, prototypes K

    forward of a step's student = 2B global crops (masked patches cost as much as others) + V B local crops, the heads
                                  on (2 + V) B class tokens and M masked patches
    forward of a step's teacher = 2B global crops, the heads on 2B class tokens and M masked patches
    a step                      = 3 * student + 1 * teacher

The student counts 3 times because the backward pass needs two products for each product of the forward pass: one for
the gradient of the input and one for the gradient of the weight. The patch embedding does not compute the gradient of
its input, but the product (0.05 % of the work) is counted anyway, as is customary. Drop path computes each branch only
for the share of samples that it keeps. The position embedding is resized once per batch, which is not counted.

Legend: R register tokens, B images per step, V local views, M masked patches of the batch.
"""

import re
import time
from dataclasses import dataclass

import torch

from model.config import ViTConfig

# Peaks of dense products in 10^12 operations per second, with bf16 inputs and fp32 accumulation, or with fp16 inputs if
# the GPU has no bf16 (V100, T4). The first pattern that matches the name is used. The values are from the makers' data
# sheets, and values "with sparsity" are halved. Sources: NVIDIA data sheets of each product (A100 312;
# H100 SXM 989, PCIe 756, NVL 835; H200 989, NVL 835; B200 2,250; L4 121; L40S 362; L40 181; A40 150; A30 165; A10 125;
# T4 65; V100 SXM 125, PCIe 112), NVIDIA's architecture papers of Ampere GA102 (RTX 3090 71, A6000 155), Ada (RTX 4090
# 165, 4080 97.5, RTX 6000 Ada 364) and Blackwell (RTX 5090 209.5); AMD data sheets (MI250X 383, MI300X 1,307).
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bG?B200\b", 2250),
    (r"\bH200 NVL\b", 835),
    (r"\bG?H200\b", 989),
    (r"\bH100 PCIe\b", 756),
    (r"\bH100 NVL\b", 835),
    (r"\bG?H100\b", 989),
    (r"\bA100\b", 312),
    (r"\bL40S\b", 362),
    (r"\bL40\b", 181),
    (r"\bL4\b", 121),
    (r"\bA40\b", 150),
    (r"\bA30\b", 165),
    (r"\bA10\b", 125),
    (r"\bRTX 6000 Ada\b", 364),
    (r"\bRTX A6000\b", 155),
    (r"\bRTX 5090$", 209.5),
    (r"\bRTX 4090$", 165),
    (r"\bRTX 4080$", 97.5),
    (r"\bRTX 3090$", 71),
    (r"\bT4\b", 65),
    (r"\bV100-SXM", 125),
    (r"\bV100-PCIE", 112),
    (r"\bMI300X\b", 1307),
    (r"\bMI250X\b", 383),
)


@dataclass(frozen=True)
class HeadShape:
    """The sizes of a projection head: the number of prototypes, the hidden width and the bottleneck width."""

    n_prototypes: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256


@dataclass(frozen=True)
class StepShape:
    """The input of a training step: the number of images over all processes, and the crops of each image."""

    batch_size: int
    global_size: int  # sides of the crops in pixels
    local_size: int
    n_local: int  # local crops per image
    n_masked: float  # masked patches of the batch (`expected_masked`); 0 without iBOT


@dataclass(frozen=True)
class StepFlops:
    """The floating-point operations of one training step, by network part. The numbers for the student include the
    backward pass."""

    student_backbone: float
    student_heads: float
    teacher_backbone: float
    teacher_heads: float

    @property
    def total(self) -> float:
        return self.student_backbone + self.student_heads + self.teacher_backbone + self.teacher_heads


def patch_embed_flops(config: ViTConfig, size: int) -> int:
    """Count the floating-point operations of the patch embedding for one image of `size` x `size` pixels."""
    return 2 * (size // config.patch_size) ** 2 * 3 * config.patch_size**2 * config.embed_dim


def block_flops(config: ViTConfig, size: int) -> int:
    """Count the floating-point operations of one block's forward pass for one image of `size` x `size` pixels."""
    tokens = 1 + config.num_register_tokens + (size // config.patch_size) ** 2
    width, products = config.embed_dim, 3 if config.ffn == "swiglu" else 2
    attention = 2 * tokens * 4 * width * width + 4 * tokens * tokens * width
    return attention + products * 2 * tokens * width * config.hidden_dim


def backbone_flops(config: ViTConfig, size: int, *, kept: float = 1.0) -> float:
    """Count the floating-point operations of the backbone's forward pass for one image of `size` x `size` pixels.

    `kept` is the share of samples for which drop path computes a block's branches.
    """
    return patch_embed_flops(config, size) + config.depth * block_flops(config, size) * kept


def head_flops(width: int, head: HeadShape) -> int:
    """Count the floating-point operations of a projection head's forward pass for one token with `width` features."""
    hidden, bottleneck = head.hidden_dim, head.bottleneck_dim
    return 2 * (width * hidden + hidden * hidden + hidden * bottleneck + bottleneck * head.n_prototypes)


def expected_masked(n_images: int, n_patches: int, ratio: tuple[float, float], probability: float) -> float:
    """Return the expected number of masked patches in a batch.

    `probability` is the share of images in which patches are masked. In these images, the share of masked patches
    is, on average, the middle of the range `ratio`. The result is slightly too high, because `training/data/masking.py`
    rounds down.
    """
    return int(n_images * probability) * n_patches * (ratio[0] + ratio[1]) / 2


def step_flops(
    config: ViTConfig,
    shape: StepShape,
    *,
    dino_head: HeadShape,
    ibot_head: HeadShape | None = None,
    drop_path: float = 0.0,
    teacher: ViTConfig | None = None,
) -> StepFlops:
    """Count the floating-point operations of one training step with the formula in this module's docstring.

    Args:
        config: the student's backbone.
        shape: the images and crops of the step.
        dino_head: the head for class tokens.
        ibot_head: the head for patches. If it is None, it has the sizes of `dino_head`.
        drop_path: the share of samples for which the student skips a residual branch.
        teacher: the teacher's backbone. If it is None, the teacher has the same backbone as the student.
    """
    batch_size, n_local = shape.batch_size, shape.n_local
    kept = max(1, round(2 * batch_size * (1 - drop_path))) / (2 * batch_size)
    kept_local = max(1, round(n_local * batch_size * (1 - drop_path))) / max(1, n_local * batch_size)
    student = 2 * batch_size * backbone_flops(config, shape.global_size, kept=kept)
    if n_local:
        student += n_local * batch_size * backbone_flops(config, shape.local_size, kept=kept_local)
    teacher = teacher or config
    ibot_head = ibot_head or dino_head

    def heads(width: int, class_tokens: int) -> float:
        return class_tokens * head_flops(width, dino_head) + shape.n_masked * head_flops(width, ibot_head)

    return StepFlops(
        student_backbone=3 * student,
        student_heads=3 * heads(config.embed_dim, (2 + n_local) * batch_size),
        teacher_backbone=2 * batch_size * backbone_flops(teacher, shape.global_size),
        teacher_heads=heads(teacher.embed_dim, 2 * batch_size),
    )


def known_peak_flops(name: str) -> float | None:
    """Return the peak speed of a GPU in floating-point operations per second, or None if it is unknown.

    The peak is that of dense matrix products in bf16, or in fp16 if the GPU has no bf16. `name` is the name that
    `torch.cuda.get_device_name` returns. Parts of a GPU (MIG) and laptop GPUs have the name of the full GPU but not its
    peak, so their peak is unknown.
    """
    if "MIG" in name or "Laptop" in name:
        return None
    return next((peak * 1e12 for pattern, peak in PEAK_TFLOPS if re.search(pattern, name, re.IGNORECASE)), None)


def measured_peak_flops(device: torch.device, side: int = 1024, attempts: int = 5) -> float:
    """Multiply two float32 matrices of `side` x `side` and return the speed in floating-point operations per second.

    This measurement is used for devices that `PEAK_TFLOPS` does not list, mainly CPUs. Other load on the device lowers
    the speed, so the best of several attempts is returned.
    """
    a = torch.ones(side, side, device=device)
    b = torch.ones(side, side, device=device)
    best = float("inf")
    for _ in range(attempts + 1):  # the first attempt warms up the device
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def device_peak_flops(device: torch.device, *, measure: bool = False) -> float | None:
    """Return the peak speed of a device in floating-point operations per second.

    The peak of a known GPU is read from a table. For any other device, the speed is measured if `measure` is True.
    Otherwise the result is None.
    """
    listed = known_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return measured_peak_flops(device) if listed is None and measure else listed


def describe_device(device: torch.device) -> str:
    """Return a description of the hardware: the GPU's name, or the processor's name and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    try:
        with open("/proc/cpuinfo") as file:  # Linux
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"
