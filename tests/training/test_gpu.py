"""What training does on a GPU, as far as a CPU can show: its precision, its compiled code, a host without a compiler.

`benchmarks/gpu_proofs.py` shows more, with private interfaces of torch.
"""

import functools
import importlib.util
import io
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.training.tiny import TINY
from tests.training.told import told
from training import kernels, setup, train
from training.config import TrainConfig
from training.distributed import World
from training.kernels import plain_cross_entropy, soft_cross_entropy, why_no_triton
from training.setup import compute_dtype, make_autocast, make_setup, should_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REASON = "Triton is missing for the test."


def config(**changes):
    return TrainConfig.model_validate({"data": "-", "out": "-", **TINY, **changes})


# Precision


@pytest.mark.parametrize(
    ("device", "native", "precision", "expected"),
    [
        (CUDA, True, "auto", torch.bfloat16),
        (CUDA, False, "auto", torch.float16),
        (CPU, True, "auto", torch.bfloat16),
        (CPU, False, "auto", torch.float32),
        (CUDA, False, "bf16", torch.bfloat16),
        (CUDA, True, "fp16", torch.float16),
        (CUDA, True, "fp32", torch.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_the_precision_of_a_device(device, native, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    assert compute_dtype(make_autocast(precision, device)) == expected


def test_the_loss_is_scaled_if_the_precision_of_the_device_is_fp16(monkeypatch):
    def half(precision, device):
        return torch.autocast(device.type, torch.float16 if precision == "auto" else torch.bfloat16)

    monkeypatch.setattr(setup, "make_autocast", half)
    alone = World(0, 1, CPU)
    assert {"loss_scale", "good_steps"} <= make_setup(config(precision="auto"), alone).parts.buffers.keys()
    assert "loss_scale" not in make_setup(config(precision="bf16"), alone).parts.buffers


# Compiled blocks


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_checkpointed_blocks_are_compiled_too_and_have_the_same_gradients(drop_path, monkeypatch):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    vit = {**TINY["vit"], "depth": 3}
    gradients = []
    for compiled, checkpointed in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        graphs.clear()
        parts = make_setup(
            config(vit=vit, compile=compiled, checkpoint_blocks=checkpointed, drop_path=drop_path),
            World(0, 1, CPU),
        ).parts
        torch.manual_seed(1)
        large, small = torch.randn(4, 3, *[parts.student.backbone.config.img_size] * 2), torch.randn(6, 3, 14, 14)
        output = parts.student(large, small, None, torch.arange(3))
        (output.global_logits.sum() + output.local_logits.square().sum() + output.patch_logits.sum()).backward()
        with torch.no_grad():
            parts.ema(large, None, None, torch.arange(3))
        gradients.append(parts.student.backbone.patch_embed.proj.weight.grad)
        # one graph for each crop size of the student and one for the teacher; all blocks share them
        assert len(graphs) == (3 if compiled else 0)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


# A host without a C compiler


@pytest.fixture
def probe():
    """Return a function that asks anew whether Triton can run, and forget the answer after the test."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def ask():
        why_no_triton.cache_clear()
        return why_no_triton()

    yield ask
    why_no_triton.cache_clear()


def test_no_compiler_is_found(probe, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe() == "Triton needs a C compiler, and neither gcc nor clang is installed"


def test_a_compiler_that_does_not_run_or_has_no_headers(probe, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert "cc does not run (" in probe()
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'probe.c:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    assert probe().endswith("cc does not compile: probe.c:1: fatal error: Python.h: No such file")


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="there is no C compiler here")
def test_a_working_compiler(probe, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if not (headers / "Python.h").is_file():
        pytest.skip(f"Python's header files are not installed in {headers}")
    assert probe() is None


def test_without_triton_nothing_is_compiled_unless_the_user_asks_for_it(monkeypatch):
    monkeypatch.setattr(setup, "why_no_triton", lambda: REASON)
    assert should_compile("auto", CUDA) is False
    assert should_compile(False, CUDA) is False
    assert should_compile(True, CPU) is True
    with pytest.raises(ValueError, match=f"compile=true is not possible here: {REASON}"):
        should_compile(True, CUDA)
    monkeypatch.setattr(setup, "why_no_triton", lambda: None)
    assert should_compile("auto", CUDA) is True
    assert should_compile("auto", CPU) is False


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    device = CUDA


def test_without_triton_the_loss_on_a_gpu_is_computed_by_torch(monkeypatch):
    student, targets = torch.randn(4, 6), torch.rand(2, 6)
    monkeypatch.setattr(kernels, "why_no_triton", lambda: REASON)
    monkeypatch.setattr(kernels, "torch_cross_entropy", lambda logits, *rest: plain_cross_entropy(student, *rest))
    monkeypatch.setitem(sys.modules, "training.triton_cross_entropy", None)  # an import would fail
    found = soft_cross_entropy(student.as_subclass(OnGpu), targets, 0.1)
    torch.testing.assert_close(found, plain_cross_entropy(student, targets, 0.1))
    monkeypatch.setattr(kernels, "why_no_triton", lambda: None)
    with pytest.raises(ImportError):
        soft_cross_entropy(student.as_subclass(OnGpu), targets, 0.1)


def test_the_user_is_warned_once(monkeypatch):
    monkeypatch.setattr(train, "why_no_triton", lambda: REASON)
    console = Console(file=io.StringIO(), width=200)
    for world in (World(0, 2, CUDA), World(1, 2, CUDA), World(0, 1, CPU)):
        train.warn_without_triton(world, console)
    [line] = told(console)
    assert line == f"warning: blocks are not compiled and no Triton kernel is used, so training is slower. {REASON}"
