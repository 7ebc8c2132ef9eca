"""The cross-entropy in pieces and in Triton kernels, against its definition in float64.

The kernels run here wherever there is a GPU; elsewhere a process of its own runs this file's `triton` cases in Triton's
interpreter, which has to be asked for before Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from training.kernels import plain_cross_entropy, soft_cross_entropy, torch_cross_entropy
from training.teacher_targets import TeacherTargets

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
BODIES = ["torch", *(["triton"] if HAS_TRITON and (CUDA or INTERPRETED) else [])]
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 1e-5)}


@pytest.fixture(params=BODIES)
def body(request):
    if request.param == "torch":
        return torch_cross_entropy
    from training.triton_cross_entropy import triton_cross_entropy

    return triton_cross_entropy


def draw(rows, targets, k, dtype=torch.float32, scale=1.0, seed=0):
    """Student logits [rows, k], unnormalised targets [*targets, k] and a gradient [rows]."""
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(rows, k, generator=generator) * scale).to(dtype)
    probs = (torch.randn(*targets, k, generator=generator) * 3).softmax(-1)
    probs = probs * torch.rand(*targets, 1, generator=generator).add(0.5)  # mass is not one
    return student.to(DEVICE), probs.to(DEVICE), torch.randn(rows, generator=generator).to(DEVICE)


def check(body, student, targets, grad, temp=0.1):
    """Value and gradient of `body` beside autograd of the definition in float64."""
    exact = student.double().requires_grad_()
    expected = plain_cross_entropy(exact, targets, temp)
    expected.backward(grad.double())
    student = student.clone().requires_grad_()
    loss = body(student, targets, temp)
    loss.backward(grad)
    assert loss.dtype == torch.float32
    assert student.grad.dtype == student.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    rtol, atol = TOLERANCE[student.dtype]
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=rtol, atol=atol * float(exact.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 37, 2048, 5001])  # less than a block, odd, a block, several with a rest
def test_value_and_gradient(body, dtype, k):
    check(body, *draw(3, (3,), k, dtype))


def test_student_views_share_targets_and_teacher_views_add_up(body):
    student, probs, grad = draw(6, (2, 3), 45)
    check(body, student, probs, grad)
    loss = body(student, probs, 0.1).view(2, 3)
    for view in range(2):
        expected = sum(plain_cross_entropy(student[view * 3 : view * 3 + 3], teacher, 0.1) for teacher in probs)
        torch.testing.assert_close(loss[view], expected, rtol=1e-5, atol=1e-5)


def test_large_logits(body):
    student, probs, grad = draw(4, (2,), 301, scale=300.0)  # 9,000 after the temperature: exp alone would overflow
    check(body, student, probs, grad)
    check(body, student - 5000, probs, grad)  # a maximum far below 0


def test_targets_in_half_precision_and_logits_with_gaps(body):
    student, probs, grad = draw(8, (4,), 64)
    check(body, student[::2], probs.bfloat16(), grad[::2])
    check(body, student.T.contiguous().T, probs, grad)


def test_targets_left_as_logits(body):
    for shape in ((3,), (2, 3)):
        student, teacher, grad = draw(6, shape, 77, seed=1)
        generator = torch.Generator().manual_seed(2)
        u, v = torch.randn(*shape, generator=generator).to(DEVICE), torch.randn(77, generator=generator).to(DEVICE)
        targets = TeacherTargets(teacher.bfloat16(), u, v, 0.07)
        check(body, student, targets, grad)
        torch.testing.assert_close(body(student, targets, 0.1), body(student, targets.probs(), 0.1))


def test_not_a_number_comes_out_as_one(body):
    student, probs, _ = draw(3, (3,), 50)
    student[0, 7], student[1, 7] = float("nan"), float("inf")
    assert torch.isfinite(body(student, probs, 0.1)).tolist() == [False, False, True]


def test_autocast_does_not_lower_the_precision(body):
    student, probs, _ = draw(4, (4,), 333)
    expected = body(student, probs, 0.1)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(body(student, probs, 0.1), expected, rtol=0, atol=0)


def test_pieces_smaller_than_a_view(monkeypatch):
    monkeypatch.setattr("training.kernels.chunk_elements", lambda device: 130)  # 2 rows of 60
    check(torch_cross_entropy, *draw(10, (5,), 60))


def test_teacher_targets_by_rows():
    targets = TeacherTargets(torch.randn(2, 3, 5), torch.randn(2, 3), torch.randn(5), 0.07)
    expected = torch.exp(targets.logits / 0.07 - targets.u[..., None] - targets.v)
    torch.testing.assert_close(targets.probs(), expected)
    torch.testing.assert_close(targets[1].probs(), expected[1])


def test_no_rows():
    student = torch.zeros(0, 6, requires_grad=True)
    loss = soft_cross_entropy(student, torch.zeros(0, 6), 0.1)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert student.grad.shape == (0, 6)


@pytest.mark.parametrize(
    ("student", "targets"), [((4, 6), (4, 5)), ((4, 6), (3, 6)), ((4, 6), (0, 6)), ((2, 2, 6), (2, 6)), ((4, 6), (6,))]
)
def test_shapes_that_do_not_fit(student, targets):
    with pytest.raises(ValueError, match=rf"student logits \[{student[0]}, .* do not fit targets"):
        soft_cross_entropy(torch.zeros(student), torch.zeros(targets), 0.1)


def test_targets_with_a_gradient_are_refused():
    with pytest.raises(ValueError, match="targets require a gradient"):
        soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True), 0.1)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(CUDA or INTERPRETED, reason="this process runs the kernels itself")
def test_the_kernels_in_their_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernels_compile_for_gpus(kernel, capability, tmp_path, monkeypatch):
    """The code reads 16 bytes at a time and keeps everything in registers. A compiler needs no GPU for this.

    benchmarks/gpu_proofs.py compiles more types for more GPUs.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from benchmarks.gpu_kernels import Arguments, compile_kernel, tool

    if tool("cuobjdump") is None or tool("nvdisasm") is None:
        pytest.skip("this build of triton has no cuobjdump or no nvdisasm")
    code = compile_kernel(kernel, capability, Arguments("bf16", "bf16", factored=True))
    assert (code.stack_bytes, code.local_bytes) == (0, 0)
    assert code.registers <= 128
    assert "LDG.E.128" in code.instructions
    if kernel == "_backward":
        assert "STG.E.128" in code.instructions


def test_the_arguments_of_the_kernels_have_one_alignment():
    """Triton compiles a kernel again for pointers that are not multiples of 16 bytes."""
    pointers = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **sizes: pointers.extend(
                a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)
            )

    pytest.importorskip("triton", reason="triton is not installed")
    from training import triton_cross_entropy as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_forward", Kernel())
        patch.setattr(module, "_backward", Kernel())
        for rows in (2, 3, 5, 8):
            student, probs, grad = draw(rows, (rows,), 16)
            module.triton_cross_entropy(student.requires_grad_(), probs, 0.1).backward(grad)
    assert len(pointers) == 4 * (5 + 6)
    assert {pointer % 16 for pointer in pointers} == {0}


@pytest.mark.skipif(not CUDA, reason="no CUDA GPU here: the kernels are tested in Triton's interpreter only")
def test_cuda_at_full_size():
    student, probs, grad = draw(16, (2, 8), 131_072, torch.bfloat16)
    check(soft_cross_entropy, student, probs, grad)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    soft_cross_entropy(student.requires_grad_(), probs, 0.1).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * student.numel() * 2  # the gradient, and no second copy
