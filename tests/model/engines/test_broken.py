"""Which errors of a runtime mean that only a new process can use the GPU again."""

import pytest

from model.engines.broken import is_sticky


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "text",
    [
        "CUDA: cudaStreamSynchronize failed: an illegal memory access was encountered (error 700)",
        "CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=x ; expr=cudaStreamSynchronize(stream);",
        "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`",
        "CUDA: cudaMemcpyAsync failed: uncorrectable ECC error encountered (error 214)",
        "[defaultAllocator.cpp::deallocate::61] Error Code 1: Cuda Runtime (misaligned address)",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
    ],
)
def test_errors_that_break_the_context(text: str) -> None:
    assert is_sticky(RuntimeError(text))
    assert is_sticky(caused(ValueError("the engine failed"), RuntimeError(text)))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA failure 2: out of memory ; GPU=0",
        "pixels of shape (1, 3, 27, 28): this model takes [B, 3, 28, 28]",
        "",
    ],
)
def test_errors_after_which_the_next_pass_may_succeed(text: str) -> None:
    assert not is_sticky(caused(ValueError("the engine failed"), RuntimeError(text)))
    assert not is_sticky(RuntimeError(text))


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_sticky(first)
