"""Show what the training does on a GPU, on a machine without one.

    python benchmarks/gpu_proofs.py kernels|waits|memory|fsdp|all [--out FILE]

- `kernels` compiles the Triton kernels for seven generations of GPUs. No kernel spills registers to memory, and every
  kernel reads 16 bytes at a time.
- `waits` runs training steps in every variant. No operation makes the host wait for the GPU.
- `memory` computes the peak memory of a step of the recipes.
- `fsdp` runs ViT-g's recipe on one of 8 ranks. A step needs less than the stated memory, and gathers the student's
  weights once.

All but `kernels` use fake CUDA tensors, which have a shape, a type and a device, but no data (`gpu_fakes.py`). They
need `g++` and private interfaces of torch, and were written for torch 2.13.0 (the build for CPUs) and Triton 3.9.0. A
memory figure contains what a step allocates in eager mode with flash attention, but neither CUDA's context nor
fragmentation. The program fails if a result is not as expected.
"""

import argparse
import ctypes
import datetime
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

FAKES = Path(__file__).with_name("gpu_fakes.cpp")
LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
GIB = 2**30


def register_fake_gpu() -> None:
    """Compile and load the C++ code that lets torch handle fake CUDA tensors. Call it before torch is imported.

    Raises:
        FileNotFoundError: there is no C++ compiler `g++`.
        subprocess.CalledProcessError: the code does not compile, for example with another version of torch.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    folder = Path(found.origin).parent
    headers = [f"-I{folder / 'include' / name}" for name in ("", "torch/csrc/api/include")]
    with tempfile.TemporaryDirectory() as temporary:
        library = Path(temporary, "gpu_fakes.so")
        command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", *headers, str(FAKES), "-o", str(library)]
        subprocess.run(command, check=True)
        for path in (*(folder / "lib" / name for name in LIBRARIES), library):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def prove_kernels() -> dict[str, Any]:
    """Compile both kernels for all GPUs and types. Raise ValueError if one spills registers."""
    from benchmarks.gpu_kernels import Arguments, compile_kernel

    kinds = (
        Arguments("bf16", "bf16", factored=True),
        Arguments("bf16", "bf16", factored=True, teachers=1),
        Arguments("fp32", "fp32", factored=True, teachers=1),
        Arguments("fp32", "fp32", factored=False, teachers=1),
        Arguments("bf16", "fp32", factored=False, teachers=1),
        Arguments("fp16", "fp16", factored=True),
    )
    registers, without_vectors = [], []
    for capability in CAPABILITIES:
        for name in ("_forward", "_backward"):
            for arguments in kinds:
                code = compile_kernel(name, capability, arguments)
                label = f"{name} sm_{capability} {arguments}"
                print(f"{label}: {code.registers} registers, {dict(code.instructions)}", flush=True)
                if code.stack_bytes or code.local_bytes:
                    raise ValueError(f"{label} spills: {code}")
                registers.append(code.registers)
                without_vectors += [] if code.instructions["LDG.E.128"] else [label]
    if without_vectors:
        raise ValueError(f"kernels without loads of 16 bytes: {without_vectors}")
    return {"kernels": len(registers), "registers": [min(registers), max(registers)]}


PLAIN = {"vit": {"img_size": 224, "depth": 3}, "batch_size": 8, "micro_batch": None, "drop_path": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "sinkhorn": {"centering": "sinkhorn"},
    "softmax": {"centering": "softmax"},
    "batch_norm": {"centering": "batch_norm"},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "micro-batches": {"micro_batch": 4},
    "sgd": {"optimizer": "sgd_normalized"},
    "drop path": {"drop_path": 0.3},
    "two heads": {"shared_head": False},
    "checkpointing": {"checkpoint_blocks": True},
    "checkpointing and drop path": {"checkpoint_blocks": True, "drop_path": 0.3},
    "no local crops": {"n_local": 0},
    "no iBOT": {"ibot_weight": 0.0},
    "without Triton": {},
}


def prove_waits() -> dict[str, Any]:
    """Run two steps of a ViT-S with 3 blocks in each variant.

    In the first step, the matrices that resize the positions are copied to the GPU. There they are cached.

    Raises:
        ValueError: the second step copies a tensor between the host and the GPU.
        torch._subclasses.fake_tensor.DataDependentOutputException: the host reads a value.
        torch._subclasses.fake_tensor.DynamicOutputShapeException: the host needs a shape that depends on values.
    """
    from benchmarks.gpu_fakes import Copies, fake_run, settings

    for name, changes in VARIANTS.items():
        config = settings("vits14", **(PLAIN | changes))
        with fake_run(config, triton=name != "without Triton") as run:
            run.step(0)
            with Copies() as copies:
                run.step(1)
        if copies.places:
            raise ValueError(f"{name}: the host waits for {copies.places}")
        print(f"{name}: {copies.operations} operations, and none makes the host wait", flush=True)
    return {"variants": list(VARIANTS)}


SINGLE: dict[str, tuple[str, dict[str, Any], float]] = {
    # recipe, changes, GiB of the GPUs that its comment names
    "vits14": ("vits14", {"batch_size": 256}, 24),
    "vits14, micro-batches of 256": ("vits14", {"batch_size": 256, "micro_batch": 256}, 80),
    "vitb14": ("vitb14", {"batch_size": 256}, 40),
    "vitl14": ("vitl14", {"batch_size": 32}, 80),
}


def prove_memory() -> dict[str, Any]:
    """Compute the peak memory of a step on one of the ranks of each recipe. Raise ValueError if it does not fit."""
    from benchmarks.gpu_fakes import Memory, fake_run, settings

    peaks = {}
    for name, (recipe, changes, limit) in SINGLE.items():
        config = settings(recipe, **changes)
        with fake_run(config) as run, Memory(run.parameters()) as memory:
            run.step(0)
            run.step(1)
        peaks[name] = round(memory.peak / GIB, 1)
        print(f"{name}: {peaks[name]} GiB for {config.micro_batch} images in a micro-batch", flush=True)
        if peaks[name] > 0.9 * limit:
            raise ValueError(f"{name} takes {peaks[name]} GiB, more than nine tenths of {limit} GiB")
    return {"peak_gib": peaks}


RANKS = 8
FSDP_LIMIT_GIB = 28.0
DEPTH_G = 40


def prove_fsdp() -> dict[str, Any]:
    """Run two steps of two micro-batches of ViT-g's recipe on a rank of a fake process group.

    Raises:
        ValueError: a step needs more than `FSDP_LIMIT_GIB` or gathers the student's weights more than once.
    """
    from benchmarks.gpu_fakes import Collectives, Memory, fake_ranks, fake_run, settings

    config = settings("vitg14", batch_size=16 * RANKS)
    with fake_ranks(RANKS) as world, fake_run(config, world) as run, Memory(run.parameters()) as memory:
        run.step(0)
        with Collectives() as collectives:
            run.step(1)
    peak, calls = round(memory.peak / GIB, 1), dict(collectives.calls)
    print(f"ViT-g on {RANKS} ranks: {peak} GiB a rank, collective operations of a step: {calls}", flush=True)
    units = DEPTH_G + 1  # the blocks and the rest are gathered separately
    expected = units + 2 * units  # once for the student, once in each micro-batch for the teacher
    if calls.get("_allgather_base_") != expected:
        raise ValueError(f"a step gathers weights {calls.get('_allgather_base_')} times, not {expected} times")
    if peak > FSDP_LIMIT_GIB:
        raise ValueError(f"a rank needs {peak} GiB, more than {FSDP_LIMIT_GIB}")
    return {"ranks": RANKS, "peak_gib": peak, "collectives": calls}


PROOFS: dict[str, Callable[[], dict[str, Any]]] = {
    "kernels": prove_kernels,
    "waits": prove_waits,
    "memory": prove_memory,
    "fsdp": prove_fsdp,
}


def why_not(proof: str) -> str | None:
    """Return why a proof cannot run here, or None if it can."""
    if proof == "kernels":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    return None if shutil.which("g++") else "g++ is not installed"


def main() -> None:
    """Run the proofs that the command line names, and write their results to a file.

    `all` skips proofs that cannot run here.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=[*PROOFS, "all"])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    skipped = {name: reason for name in PROOFS if (reason := why_not(name)) is not None}
    if arguments.proof in skipped:
        parser.error(f"{arguments.proof}: {skipped[arguments.proof]}")
    names = [name for name in PROOFS if name not in skipped] if arguments.proof == "all" else [arguments.proof]
    for name, reason in skipped.items() if arguments.proof == "all" else ():
        print(f"{name} is skipped: {reason}", flush=True)
    if set(names) - {"kernels"}:
        register_fake_gpu()
    results: dict[str, Any] = {}
    for name in names:
        start = time.monotonic()
        results[name] = PROOFS[name]() | {"seconds": round(time.monotonic() - start, 1)}
    import torch

    facts = {"torch": torch.__version__, "python": platform.python_version(), "date": str(datetime.date.today())}
    text = json.dumps(facts | results, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
