"""Measure the images/s of our training step, compared with a step built from the modules of the official code.

    python benchmarks/training_step.py [--official CHECKOUT] [--preset small|vits14|...] [--rounds 6]

CHECKOUT is a checkout of facebookresearch/dinov2. Without it, only our step runs.

The official step needs xFormers, which needs a GPU. This benchmark therefore calls the official blocks, heads, losses
and parameter groups in the order of `dinov2/train/ssl_meta_arch.py`. It calls the blocks once per crop size, with their
own fallback to `scaled_dot_product_attention`. Both steps take turns in one process with the same batch of crops, so
that other load affects both. The ratio is the median of the ratios of all rounds. The limit is the fastest matrix
product of the same run. Both steps start from the same weights, and the losses of the first step must agree.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.data.crops import Crops, make_crops
from training.distributed import World
from training.setup import attention_kernel, compute_dtype, make_setup
from training.step import Setup, train_step
from training.watch.flops import describe_device
from training.wiring import crop_settings, make_schedules, step_settings, work_of_step

RESULTS = Path(__file__).parent / "results"
COMMON = {"data": "-", "out": "-", "epochs": 1, "drop_path": 0.0, "freeze_last_layer": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    # the crop sizes and widths of the recipes for CPUs
    "small": {
        "model": "dinov2_vitt14",
        "vit": {"depth": 4, "img_size": 84, "layerscale_init": 1.0},
        "global_size": 84,
        "local_size": 42,
        "n_local": 4,
        "n_prototypes": 1024,
        "head_hidden_dim": 512,
        "head_bottleneck_dim": 128,
        "batch_size": 32,
    },
    "vits14": {
        "model": "dinov2_vits14",
        "vit": {"img_size": 224, "pos_embed_rule": "antialias"},
        "n_prototypes": 65536,
        "batch_size": 4,
    },
    "vitb14": {"model": "dinov2_vitb14", "vit": {"img_size": 224, "pos_embed_rule": "antialias"}, "batch_size": 64},
    "vitl14": {
        "model": "dinov2_vitl14",
        "vit": {"img_size": 224, "pos_embed_rule": "antialias"},
        "n_prototypes": 131072,
        "shared_head": False,
        "drop_path": 0.4,
        "batch_size": 32,
    },
}


class Official:
    """A training step that is built from the modules of the official code."""

    def __init__(self, checkout: Path, config: TrainConfig, ours: Setup) -> None:
        os.environ["XFORMERS_DISABLED"] = "1"
        warnings.filterwarnings("ignore")
        sys.path.insert(0, str(checkout))
        from dinov2.layers import DINOHead, MemEffAttention, NestedTensorBlock
        from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
        from dinov2.models.vision_transformer import DinoVisionTransformer
        from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

        vit, device = config.vit_config, ours.world.device
        self.config, self.autocast = config, ours.autocast
        shared = config.shared_head

        def network(drop_path: float) -> nn.ModuleDict:
            head = partial(
                DINOHead,
                in_dim=vit.embed_dim,
                out_dim=config.n_prototypes,
                hidden_dim=config.head_hidden_dim,
                bottleneck_dim=config.head_bottleneck_dim,
            )
            parts = {
                "backbone": DinoVisionTransformer(
                    img_size=vit.img_size,
                    patch_size=vit.patch_size,
                    embed_dim=vit.embed_dim,
                    depth=vit.depth,
                    num_heads=vit.num_heads,
                    init_values=vit.layerscale_init,
                    ffn_layer="mlp" if vit.ffn == "mlp" else "swiglu",
                    block_chunks=0,
                    drop_path_rate=drop_path,
                    drop_path_uniform=True,
                    block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
                    interpolate_antialias=True,
                    interpolate_offset=0.0,
                ),
                "dino_head": head(),
            }
            if not shared:
                parts["ibot_head"] = head()
            return nn.ModuleDict(parts).to(device)

        self.student, self.teacher = network(config.drop_path), network(0.0)
        own = ours.parts.student.state_dict()
        for key, value in self.student.state_dict().items():
            # torch's weight_norm has other names for the direction and the length
            name = key.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v").replace("ibot_head", "own_ibot_head")
            value.copy_(own[name])
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.eval().requires_grad_(False)
        self.student.train()
        self.dino, self.ibot, self.koleo = (
            DINOLoss(config.n_prototypes),
            iBOTPatchLoss(config.n_prototypes),
            KoLeoLoss(),
        )
        self.dino.to(device), self.ibot.to(device)
        groups = []
        for module in self.student.values():
            found = get_params_groups_with_decay(
                model=module, lr_decay_rate=config.layer_decay, patch_embed_lr_mult=config.patch_embed_lr_mult
            )
            groups += list(fuse_params_groups(found))
        for group in groups:
            group["foreach"] = True
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas)

    def head(self, network: nn.ModuleDict, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        if "ibot_head" in network:
            return network["dino_head"](cls), network["ibot_head"](patches)
        out = network["dino_head"](torch.cat((cls, patches)))
        return out[: len(cls)], out[len(cls) :]

    @torch.no_grad()
    def targets(self, crops: Crops, temp: float) -> tuple[Tensor, Tensor]:
        found = self.teacher["backbone"](crops.globals_, is_training=True)
        a, b = found["x_norm_clstoken"].chunk(2)
        patches = torch.index_select(found["x_norm_patchtokens"].flatten(0, 1), 0, crops.selected)
        cls, patches = self.head(self.teacher, torch.cat((b, a)), patches)
        cls = self.dino.sinkhorn_knopp_teacher(cls, temp).view(2, -1, cls.shape[-1])
        # the method for patches needs a process group; the method for class tokens does the same computation
        return cls, self.dino.sinkhorn_knopp_teacher(patches, temp)

    def step(self, crops: Crops, lr: float, weight_decay: float, momentum: float, temp: float) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_multiplier"], weight_decay * group["wd_multiplier"]
        self.optimizer.zero_grad(set_to_none=True)
        # in the official code, the data loader computes these
        weights = (1 / crops.masks.sum(-1).clamp(min=1))[crops.selected // crops.masks.shape[1]]
        with self.autocast:
            cls_targets, patch_targets = self.targets(crops, temp)
            backbone = self.student["backbone"]
            large = backbone(crops.globals_, masks=crops.hidden, is_training=True)
            small = backbone(crops.locals_, is_training=True)["x_norm_clstoken"]
            patches = torch.index_select(large["x_norm_patchtokens"].flatten(0, 1), 0, crops.selected)
            n_small, cls = len(small), large["x_norm_clstoken"]
            logits, patch_logits = self.head(self.student, torch.cat((small, cls)), patches)
            n_pairs = 2 + 2 * config.n_local
            local_loss = self.dino(logits[:n_small].chunk(config.n_local), cls_targets) / n_pairs
            global_loss = self.dino([logits[n_small:]], [cls_targets.flatten(0, 1)]) * 2 / n_pairs
            koleo = sum(self.koleo(part) for part in cls.chunk(2))
            ibot = self.ibot.forward_masked(
                patch_logits, patch_targets, crops.masks, n_masked_patches=len(patches), masks_weight=weights
            )
            loss = config.dino_weight * (local_loss + global_loss) + config.koleo_weight * koleo
            loss = loss + config.ibot_weight * ibot
        loss.backward()
        for module in self.student.values():
            nn.utils.clip_grad_norm_(module.parameters(), config.clip_grad)
        self.optimizer.step()
        with torch.no_grad():
            mine, theirs = list(self.teacher.parameters()), list(self.student.parameters())
            torch._foreach_mul_(mine, momentum)
            torch._foreach_add_(mine, theirs, alpha=1 - momentum)
        return float(loss.detach())


def limit(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """Return the best GFLOP/s of an n x n matrix product. On a GPU, n is multiplied by 4."""
    if device.type == "cuda":
        n *= 4
    a, best = torch.randn(n, n, device=device, dtype=dtype), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    config: TrainConfig, device: torch.device, rounds: int, official: Path | None = None, side: int = 2048
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Measure the steps in turns. Return the images/s of each step in each round, and a report for the result file.

    Args:
        config: settings of the training run.
        device: device to train on.
        rounds: number of rounds after the warm-up round.
        official: checkout of the official code to compare with, or None to measure only our step.
        side: number of rows of the matrices whose product sets the limit. On a GPU, it is multiplied by 4.
    """
    batch = config.batch_size
    ours = make_setup(config, World(0, 1, device))
    theirs = Official(official, config, ours) if official else None
    dtype = compute_dtype(ours.autocast)
    schedules = make_schedules(config, 1000)
    images = torch.randint(0, 256, (batch, 3, config.cache_size, config.cache_size), dtype=torch.uint8)
    settings = crop_settings(config)
    crops = make_crops(settings, images, torch.ones(batch), 0, torch.arange(batch), settings.phase(0.0), device)
    step, rates = 500, {name: [] for name in ("ours", "official") if name == "ours" or theirs}
    # a step in the middle of the schedules
    values = (schedules.lr["head"][step], schedules.weight_decay[step], schedules.momentum[step])
    temp, first = schedules.teacher_temp[step], {}
    for number in range(rounds + 1):
        for name in rates:
            start = time.perf_counter()
            if name == "official":
                assert theirs is not None
                loss = theirs.step(crops, *map(float, values), float(temp))  # type: ignore[call-arg]
            else:
                with attention_kernel(device, dtype):
                    loss = train_step(step_settings(config), ours, schedules, [crops], step)[0]["loss"].item()
            wait(device)
            first.setdefault(name, loss)
            if number:  # the first round warms up
                rates[name].append(batch / (time.perf_counter() - start))
    report = {
        "machine": describe_device(device),
        "torch": torch.__version__,
        "batch": batch,
        "dtype": str(dtype),
        "images_per_s": {name: round(float(np.median(found)), 3) for name, found in rates.items()},
        "gflop_per_image": round(work_of_step(config) / batch / 1e9, 1),
        "limit_gflop_per_s": round(limit(device, dtype, side), 1),
    }
    if theirs:
        difference = abs(first["ours"] / first["official"] - 1)
        assert difference < (1e-4 if dtype == torch.float32 else 2e-2), first
        ratio = float(np.median(np.array(rates["ours"]) / np.array(rates["official"])))
        report |= {"ratio": round(ratio, 3), "loss_difference": difference}
    return rates, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="checkout of facebookresearch/dinov2")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of our step with torch.compile")
    arguments = parser.parse_args()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    )
    preset = PRESETS[arguments.preset] | ({"batch_size": arguments.batch} if arguments.batch else {})
    changes = {"precision": arguments.precision, "compile": arguments.compile}
    config = TrainConfig.model_validate(COMMON | preset | changes)
    rates, report = measure(config, device, arguments.rounds, arguments.official)
    gflop, peak = report["gflop_per_image"], report["limit_gflop_per_s"]
    print(
        f"{arguments.preset}: batch {config.batch_size}, {config.global_size} + {config.n_local} x"
        f" {config.local_size} px, {report['dtype']}"
    )
    print(f"{'':<10}{'img/s median':>14}{'best':>8}{'GFLOP/s':>10}{'of limit':>10}")
    for name, found in rates.items():
        median = float(np.median(found))
        print(f"{name:<10}{median:>14.2f}{max(found):>8.2f}{median * gflop:>10.0f}{median * gflop / peak:>10.0%}")
    if "ratio" in report:
        rounds = ", ".join(f"{a / b:.2f}" for a, b in zip(*rates.values(), strict=True))
        print(f"ratio {report['ratio']:.2f} (rounds: {rounds})")
    command = shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
    report = {
        "benchmark": "training_step",
        "date": datetime.date.today().isoformat(),
        "command": command.replace(str(arguments.official), "CHECKOUT"),
        "preset": arguments.preset,
        "compile": arguments.compile,
        **report,
    }
    text = json.dumps(report)
    name = f"{report['date']}-training-step-{arguments.preset}-{device.type}.json"
    (RESULTS / name).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
