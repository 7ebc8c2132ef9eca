"""Compile the Triton kernels of training for any NVIDIA GPU, without one, and read what is in the machine code.

Triton comes with NVIDIA's assembler `ptxas`, which produces the machine code, and with `cuobjdump` and `nvdisasm`,
which print it. `tests/training/test_kernels.py` and `benchmarks/gpu_proofs.py` use this module.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from training import triton_cross_entropy

LOADS_AND_STORES = r"\b(?:LDG|STG)\.E(?:\.128)?"
"""Instructions that read or write global memory, 16 bytes at a time (`.128`) or fewer."""


@dataclass(frozen=True)
class Arguments:
    """The types of the arguments for which a kernel is compiled. The names of types are Triton's, such as `bf16`."""

    student: str
    targets: str
    factored: bool  # the targets are given as logits and two vectors
    teachers: int = 2  # views of the teacher


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel: registers and memory of each thread, and the numbers of loads and stores."""

    registers: int
    stack_bytes: int
    local_bytes: int
    instructions: Counter[str]


def tool(name: str) -> str | None:
    """Return the path of one of the programs that come with Triton, or None if this build does not have it."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.is_file() else None


def compile_kernel(name: str, capability: int, arguments: Arguments) -> Code:
    """Compile the kernel `_forward` or `_backward` for GPUs of a compute capability, and return what is in the code.

    `capability` is, for example, 90 for 9.0. Pointers and the number of prototypes are multiples of 16, as in training.
    """
    kernel = getattr(triton_cross_entropy, name)
    constants = {"N_TEACHERS": arguments.teachers, "FACTORED": arguments.factored, "BLOCK": triton_cross_entropy.BLOCK}
    if not arguments.factored:
        constants |= {"u": None, "v": None}
    half, floats, integers = (
        f"*{arguments.student}",
        ("student_scale", "target_scale"),
        ("n_targets", "n_students", "k"),
    )
    types = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= {"student": half, "targets": f"*{arguments.targets}"} | ({"out": half} if "out" in types else {})
    types |= dict.fromkeys(floats, "fp32") | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    source = ASTSource(
        kernel,
        types,
        constexprs={(place(argument),): value for argument, value in constants.items()},
        attrs={(place(a),): [["tt.divisibility", 16]] for a, kind in types.items() if kind.startswith("*") or a == "k"},
    )
    options = {"num_warps": triton_cross_entropy.WARPS, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(compiled.asm["cubin"])


def _read(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise ValueError(f"cuobjdump does not print the registers: {usage[-300:]}")
        registers, stack, local = map(int, found.groups())
        instructions = Counter(re.findall(LOADS_AND_STORES, _output("nvdisasm", file.name)))
    return Code(registers, stack, local, instructions)


def _output(name: str, *arguments: str) -> str:
    program = tool(name)
    if program is None:
        raise FileNotFoundError(f"this build of triton has no {name}")
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr
