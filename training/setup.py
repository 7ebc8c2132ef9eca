"""Set up a run: make the student, the teacher and the optimizer, and distribute them over the ranks."""

import functools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model.checkpoint import state_dict_of
from model.config import ViTConfig
from model.loading import read_model
from training.config import TrainConfig
from training.distributed import World, replicate, shard
from training.kernels import why_no_triton
from training.optimizer import make_optimizer
from training.state import FOLDER, KEPT_BEST, Parts, find_state
from training.step import Setup
from training.student_teacher import Network, make_teacher

LOSS_SCALE = 2.0**16  # the initial loss scale for fp16, as in torch's GradScaler


def make_autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for a precision: `fp32`, `bf16`, `fp16` or `auto`.

    `auto` means bf16 if the device has native bf16 matrix products. Otherwise it means fp16 on a GPU, because the GPUs
    before compute capability 8.0 have tensor cores for fp16, and fp32 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def compute_dtype(autocast: torch.autocast) -> torch.dtype:
    """Return the data type of matrix products inside the context `autocast`."""
    return autocast.fast_dtype if autocast._enabled else torch.float32


def attention_kernel(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context that selects the attention kernel for training.

    For bf16 on a CPU it selects plain matrix products. Otherwise it leaves the choice to torch. With bf16 on a CPU and
    small crops of 10 to 65 tokens, the backward pass of the fused kernel takes a quarter of a step's time. The backward
    pass of plain matrix products takes only a third of that time. In float32 the fused kernel is faster at every size
    (docs/decisions/0010-training-on-a-cpu.md).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and dtype == torch.bfloat16 else nullcontext()


def initial_weights(init: str, model: str, config: ViTConfig) -> dict[str, Tensor]:
    """Load the backbone weights that a run starts from, and return them as a state dict.

    Args:
        init: a source of `model.loading.read_model`: the name of published weights, a checkpoint or weights file, a
            run's folder, or an artifact's folder. The weights of a run's folder are those before whitening.
        model: the name of the run's network on torch hub. It is used if the file does not contain its architecture.
        config: the configuration of the run's network.

    Raises:
        ValueError: `init` is none of these, is damaged, contains a weight that is not finite, or contains a network
            whose configuration is not `config`.
        OSError: a file is missing or cannot be read.
        model.zoo.DownloadError: published weights cannot be downloaded.
    """
    kept = Path(init) / KEPT_BEST
    loaded = read_model(kept if kept.is_file() else init, arch=model)
    theirs, ours = asdict(loaded.config), asdict(config)
    if None not in (theirs["layerscale_init"], ours["layerscale_init"]):
        del theirs["layerscale_init"]  # the first value of gains that the weights replace
    different = {key: value for key, value in theirs.items() if value != ours[key]}
    if different:
        listed = ", ".join(f"{key}={value}, not {key}={ours[key]}" for key, value in different.items())
        raise ValueError(
            f"init={init} has a different network from the run's: {listed}. To train the network of the file, set "
            f"vit='{json.dumps(different)}'"
        )
    return state_dict_of(loaded)


def make_network(config: TrainConfig) -> Network:
    """Make the student with its initial weights, on the CPU.

    The weights depend only on the seed, the network's settings and `config.init`. This function seeds torch's global
    generator.
    """
    torch.manual_seed(config.seed)
    network = Network(
        config.vit_config,
        n_prototypes=config.n_prototypes,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        shared_head=config.shared_head or config.ibot_weight == 0,
        drop_path_rate=config.drop_path,
        ibot_bottleneck_dim=config.ibot_bottleneck_dim,
    )
    if config.init is not None:
        network.backbone.load_state_dict(initial_weights(config.init, config.model, config.vit_config))
        if (heads := initial_heads(config.init, network)) is not None:
            network.load_state_dict(heads, strict=False)  # all but the backbone
    return network


def initial_heads(init: str, network: Network) -> dict[str, Tensor] | None:
    """Return the heads of the run in the folder `init`, as a state dict, so that a finished run can continue.

    They are those of the student's moving average in the newest state. The result is None if `init` is not the folder
    of a run, or if its heads do not have the names and shapes of those of `network`.
    """
    if not (Path(init) / FOLDER).is_dir():
        return None
    saved, _ = find_state(Path(init))
    if saved is None:
        return None
    ema = torch.load(saved.path, map_location="cpu", weights_only=True, mmap=True)["ema"]
    heads = {name: tensor for name, tensor in ema.items() if not name.startswith("backbone.")}
    own = {name: tensor.shape for name, tensor in network.state_dict().items() if not name.startswith("backbone.")}
    return heads if own == {name: tensor.shape for name, tensor in heads.items()} else None


def make_setup(config: TrainConfig, world: World, frozen_teacher: nn.Module | None = None) -> Setup:
    """Make the networks, the optimizer and the buffers of a run in their initial state.

    Args:
        config: the run's settings.
        world: the rank of this process, the number of ranks and the device.
        frozen_teacher: the teacher for distillation, which is called like a `Network`. By default the teacher is the
            student's moving average.
    """
    autocast = make_autocast(config.precision, world.device)
    student = make_network(config).to(world.device)
    ema = make_teacher(student)
    if should_compile(config.compile, world.device):
        compile_blocks(student, frozen_teacher or ema)
    if config.checkpoint_blocks:
        for block in student.backbone.blocks:
            # The backward pass recomputes everything but a block's input.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    sharded = world.size > 1 and strategy_of(config) == "fsdp"
    if sharded:
        for network in (student, ema):
            shard(network, network.backbone.blocks, world, compute_dtype(autocast), trains=network is student)
    optimizer = make_optimizer(
        student,
        kind=config.optimizer,
        layer_decay=config.layer_decay,
        patch_embed_lr_mult=config.patch_embed_lr_mult,
        betas=config.betas,
    )
    buffers = {}
    if config.centering == "softmax":
        names = ("dino", "ibot") if config.ibot_weight > 0 else ("dino",)
        buffers = {name: torch.zeros(1, config.n_prototypes, device=world.device) for name in names}
    if compute_dtype(autocast) == torch.float16:
        buffers["loss_scale"] = torch.tensor(LOSS_SCALE, device=world.device)
        buffers["good_steps"] = torch.tensor(0.0, device=world.device)
    parts = Parts(student, ema, frozen_teacher or ema, optimizer, buffers)
    return Setup(parts, student if sharded else replicate(student, world), autocast, world)


def should_compile(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Return whether to compile the blocks, according to the setting `compile`.

    `auto` means to compile them on a GPU if Triton can run there.

    Raises:
        ValueError: the setting is True, but Triton cannot run on the GPU.
    """
    reason = why_no_triton() if device.type == "cuda" and setting is not False else None
    if setting is True and reason is not None:
        raise ValueError(f"compile=true is not possible here: {reason}")
    return device.type == "cuda" and reason is None if setting == "auto" else setting


def compile_blocks(*networks: nn.Module) -> None:
    """Compile the forward pass of each block of the networks in place with torch.compile.

    The checkpointing of blocks must be added around the compiled code. torch.compile skips torch's function for
    checkpointing, and also everything that it calls.
    """
    # There is a version for each crop size, for student and teacher, and for the main and the last phase. By default,
    # torch silently stops compiling after 8 versions.
    torch._dynamo.config.recompile_limit = 64
    # This optimisation splits compiled code at DDP's buckets. It is useless for a block that is
    # smaller than a bucket, and fails for a larger block.
    torch._dynamo.config.optimize_ddp = False
    for network in networks:
        for block in network.get_submodule("backbone.blocks").children():
            # There are few input sizes. Dynamic sizes fail with drop path, which selects a share of the batch.
            block.forward = torch.compile(block.forward, dynamic=False)


def strategy_of(config: TrainConfig) -> str:
    """Return the strategy for training on several ranks, `ddp` or `fsdp`.

    The setting `auto` means `fsdp` for networks at least as large as ViT-g, because their optimizer state is large.
    For smaller networks it means `ddp`, which is faster.
    """
    if config.strategy != "auto":
        return config.strategy
    return "fsdp" if config.vit_config.embed_dim * config.vit_config.depth >= 1536 * 40 else "ddp"
