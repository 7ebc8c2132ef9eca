"""Recognizes errors after which an engine cannot work again in this process.

Some CUDA errors are *sticky*: a kernel has damaged the CUDA context of the process, or the GPU has failed, and every
later call of CUDA fails too. Only a new process can use the GPU again. The runtimes raise exceptions of different
types, so the errors are recognized by CUDA's own texts, which are part of all of them.

Source: the descriptions of `cudaError_t` in CUDA's documentation ("the process must be terminated and relaunched"), and
the texts of `cudaGetErrorString`.
"""

import re
from collections.abc import Iterator
from typing import Final

_STICKY: Final = re.compile(
    "|".join(
        (
            r"illegal memory access",  # 700
            r"the launch timed out and was terminated",  # 702
            r"context is destroyed",  # 709
            r"device-side assert",  # 710
            r"hardware stack error",  # 714
            r"illegal instruction",  # 715
            r"misaligned address",  # 716
            r"not supported on global/shared address space",  # 717
            r"invalid program counter",  # 718
            r"unspecified launch failure",  # 719
            r"uncorrectable (ECC|NVLink) error",  # 214, 220
            r"CUDA_ERROR_(ILLEGAL_(ADDRESS|INSTRUCTION)|LAUNCH_(FAILED|TIMEOUT)|CONTEXT_IS_DESTROYED|ASSERT|"
            r"HARDWARE_STACK_ERROR|MISALIGNED_ADDRESS|INVALID_(ADDRESS_SPACE|PC)|ECC_UNCORRECTABLE|"
            r"NVLINK_UNCORRECTABLE)",
        )
    ),
    re.IGNORECASE,
)


def is_sticky(error: BaseException) -> bool:
    """Return whether `error`, or an error that caused it, is one after which every later forward pass fails too."""
    return any(_STICKY.search(str(each)) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        following = following.__cause__ or following.__context__
