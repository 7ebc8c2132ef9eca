"""Tests of the TensorRT engine with a fake that computes in host memory: padding, capture, release and errors."""

import gc
from pathlib import Path

import numpy as np
import pytest

from model.engines.cuda_memory import Cuda, CudaError, describe_gpu
from model.engines.protocol import BUCKETS, bucket_of
from model.engines.tensorrt_engine import TensorRTEngine, choose_profile
from tests.model.engines.fake_tensorrt import SIDE, FakeCuda, fake_plan, fake_toolchain, features_of

RTX = pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "tensorrt_rtx"])


def pixels_of(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, SIDE, SIDE), dtype=np.float32)


def launched(cuda: FakeCuda) -> list[tuple]:
    return [call for call in cuda.calls if call[0] == "cudaGraphLaunch"]


@RTX
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 5, 16, 17, 33, 64, 65, 130])
def test_every_batch_gets_its_own_features(batch: int, rtx: bool) -> None:
    engine = TensorRTEngine(fake_plan(), fake_toolchain(FakeCuda(), rtx=rtx), "bf16")
    engine.run(pixels_of(64, seed=9))  # leaves older images in the padding
    found = engine.run(pixels_of(batch))
    expected = features_of(pixels_of(batch))
    for name, value in found._asdict().items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], atol=1e-6)
    assert (engine.name, engine.precision) == ("tensorrt_rtx" if rtx else "tensorrt", "bf16")


def test_a_model_without_registers_gives_none() -> None:
    engine = TensorRTEngine(fake_plan(registers=0), fake_toolchain(FakeCuda()), "fp16")
    assert engine.run(pixels_of(3)).registers.shape == (3, 0, 6)


def test_results_are_the_callers_own() -> None:
    engine = TensorRTEngine(fake_plan(), fake_toolchain(FakeCuda()), "bf16")
    first = engine.run(pixels_of(2))
    before = first.cls.copy()
    engine.run(pixels_of(2, seed=1))
    assert np.array_equal(first.cls, before)


def test_one_graph_a_bucket_captured_once_with_the_right_profile() -> None:
    cuda = FakeCuda()
    engine = TensorRTEngine(fake_plan(), fake_toolchain(cuda), "bf16")
    assert cuda.names().count("cudaStreamBeginCapture") == len(BUCKETS)
    profiles = {1: 0, 2: 1, 4: 1, 8: 1, 16: 1, 32: 2, 64: 2}
    # Once to warm up, once into the graph.
    assert [call for call in cuda.calls if call[0] == "execute"] == [
        ("execute", bucket, profile) for bucket, profile in profiles.items() for _ in range(2)
    ]
    cuda.calls.clear()
    for batch in (3, 4, 3, 1, 40):
        engine.run(pixels_of(batch))
    graphs = [call[1] for call in launched(cuda)]
    assert graphs[0] == graphs[1] == graphs[2]
    assert len(set(graphs)) == 3
    assert set(cuda.names()) == {"cudaSetDevice", "cudaGraphLaunch", "cudaStreamSynchronize"}


def test_the_order_in_which_a_bucket_is_made_ready() -> None:
    cuda = FakeCuda()
    TensorRTEngine(fake_plan(), fake_toolchain(cuda), "bf16")
    begin = cuda.names().index("cudaStreamBeginCapture")
    copies = ["cudaMemcpyAsync", "execute", *["cudaMemcpyAsync"] * 3]
    assert cuda.names()[begin - 6 : begin + 9] == [
        *copies,
        "cudaStreamSynchronize",  # the warm-up is over before the capture begins
        "cudaStreamBeginCapture",
        *copies,
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
    ]


def test_contexts_share_one_piece_of_memory() -> None:
    toolchain = fake_toolchain(FakeCuda())
    TensorRTEngine(fake_plan(), toolchain, "bf16")
    (engine,) = toolchain.library.module.engines
    assert len(engine.contexts) == len(BUCKETS)
    assert len({context.memory for context in engine.contexts}) == 1


@RTX
def test_close_gives_everything_back(rtx: bool) -> None:
    cuda = FakeCuda()
    engine = TensorRTEngine(fake_plan(), fake_toolchain(cuda, rtx=rtx), "bf16")
    assert cuda.live
    assert cuda.open
    engine.close()
    assert not cuda.live
    assert not cuda.open
    names = cuda.names()
    assert names[-1] == "cudaStreamDestroy"
    assert names.index("cudaGraphExecDestroy") < names.index("cudaFree")  # nothing is freed under a graph
    assert engine._jit is None  # it would hold the library's engine
    engine.close()  # twice is once


def test_an_engine_that_is_let_go_keeps_nothing() -> None:
    cuda = FakeCuda()
    TensorRTEngine(fake_plan(), fake_toolchain(cuda), "bf16")
    gc.collect()
    assert not cuda.live
    assert not cuda.open


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaHostAlloc"])
@pytest.mark.parametrize("successes", [0, 1, 3])
def test_too_little_memory_is_said_and_leaves_nothing(name: str, successes: int) -> None:
    cuda = FakeCuda(fail={name: (successes, 2)})
    with pytest.raises(CudaError, match=rf"{name} \(\d+ MiB .*\) failed: out of memory \(error 2\)"):
        TensorRTEngine(fake_plan(), fake_toolchain(cuda), "bf16")
    assert not cuda.live
    assert not cuda.open


@pytest.mark.parametrize("name", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_what_cannot_be_captured_runs_call_by_call(name: str, caplog: pytest.LogCaptureFixture) -> None:
    cuda = FakeCuda(fail={name: (2, 900)})  # the first two buckets are captured
    engine = TensorRTEngine(fake_plan(), fake_toolchain(cuda), "bf16")
    assert "batch 4 cannot be captured as a CUDA graph; it runs as separate calls" in caplog.text
    cuda.calls.clear()
    for batch in (1, 4, 9):
        expected = features_of(pixels_of(batch))
        np.testing.assert_allclose(engine.run(pixels_of(batch)).cls, expected["cls"], atol=1e-6)
    assert len(launched(cuda)) == 1
    engine.close()
    assert not cuda.live
    assert not cuda.open


def test_a_stream_that_the_library_cannot_capture_is_not_captured() -> None:
    cuda = FakeCuda()
    engine = TensorRTEngine(fake_plan(capturable=False), fake_toolchain(cuda), "bf16")
    assert "cudaStreamBeginCapture" not in cuda.names()
    found = engine.run(pixels_of(5)).patches
    np.testing.assert_allclose(found, features_of(pixels_of(5))["patches"], atol=1e-6)


def test_a_failing_gpu_is_an_error_with_cudas_words() -> None:
    cuda = FakeCuda()
    engine = TensorRTEngine(fake_plan(), fake_toolchain(cuda), "bf16")
    cuda.fail["cudaStreamSynchronize"] = (0, 700)
    with pytest.raises(CudaError, match=r"cudaStreamSynchronize failed: unspecified failure \(error 700\)"):
        engine.run(pixels_of(1))


def test_an_old_message_does_not_explain_a_new_failure() -> None:
    toolchain = fake_toolchain(FakeCuda())
    engine = TensorRTEngine(fake_plan(capturable=False), toolchain, "bf16")
    engine._log_message("ERROR", "an old message")
    toolchain.library.module.engines[0].plan["fails"] = [1]
    for context in engine._contexts.values():
        context.plan = toolchain.library.module.engines[0].plan
    with pytest.raises(CudaError, match="tensorrt failed at batch 1: it gave no reason"):
        engine.run(pixels_of(1))


def test_the_settings_of_the_contexts_live_as_long_as_the_contexts() -> None:
    toolchain = fake_toolchain(FakeCuda(), rtx=True)
    engine = TensorRTEngine(fake_plan(), toolchain, "bf16")
    assert engine._settings is toolchain.library.module.engines[0].config
    engine.close()
    assert engine._settings is None


def test_a_pass_that_fails_at_load_is_said() -> None:
    with pytest.raises(CudaError, match="tensorrt failed at batch 8: it gave no reason"):
        TensorRTEngine(fake_plan(fails=[8]), fake_toolchain(FakeCuda()), "bf16")


def test_plans_that_cannot_run_here_are_refused() -> None:
    with pytest.raises(ValueError, match="tensorrt cannot load the plan: the magic tag does not match"):
        TensorRTEngine(b"torn", fake_toolchain(FakeCuda()), "bf16")
    with pytest.raises(ValueError, match=r"tensorrt_rtx refuses this plan on this GPU \(diagnostics 0x4\)"):
        TensorRTEngine(fake_plan(valid=False), fake_toolchain(FakeCuda(), rtx=True), "bf16")
    with pytest.raises(ValueError, match="not a plan of this project: its tensors are images, cls, patches"):
        TensorRTEngine(fake_plan(input="images"), fake_toolchain(FakeCuda()), "bf16")
    with pytest.raises(ValueError, match=r"no profile for batch 32, only \[\(1, 16\)\]"):
        TensorRTEngine(fake_plan(profiles=((1, 16),)), fake_toolchain(FakeCuda()), "bf16")


def test_another_size_is_refused() -> None:
    engine = TensorRTEngine(fake_plan(), fake_toolchain(FakeCuda()), "bf16")
    with pytest.raises(ValueError, match=rf"this model takes \[B, 3, {SIDE}, {SIDE}\]"):
        engine.run(np.zeros((1, 3, 14, 14), np.float32))


def test_kernels_compiled_on_the_gpu_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "plan.jit"
    toolchain = fake_toolchain(FakeCuda(), rtx=True)
    TensorRTEngine(fake_plan(), toolchain, "bf16", jit_cache=cache)
    assert cache.read_bytes() == b"compiled kernels"
    TensorRTEngine(fake_plan(), toolchain, "bf16", jit_cache=cache)
    first, second = (engine.config for engine in toolchain.library.module.engines)
    assert first.cache.given is None
    assert second.cache.given == b"compiled kernels"
    assert second.strategy == "user managed"
    assert second.dynamic_shapes_kernel_specialization_strategy == "eager"
    cache.write_bytes(b"torn")
    TensorRTEngine(fake_plan(), toolchain, "bf16", jit_cache=cache)
    assert "kernels are compiled again" in caplog.text
    full = tmp_path / "full.jit"
    TensorRTEngine(fake_plan(), fake_toolchain(FakeCuda()), "bf16", jit_cache=full)
    assert not full.exists()  # the full library compiles when it builds


def test_buckets_and_profiles() -> None:
    assert [bucket_of(batch) for batch in (0, 1, 2, 3, 9, 17, 33, 64)] == [1, 1, 2, 4, 16, 32, 64, 64]
    assert choose_profile([(1, 64), (2, 16)], 8) == 1  # the narrower one is tuned for it
    assert choose_profile([(1, 64), (2, 16)], 1) == 0


def test_the_gpu_is_described(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 12.2.0\n"
    )
    gpu = describe_gpu(Cuda(FakeCuda()), driver_file=version)
    assert (gpu.name, gpu.capability, gpu.driver) == ("NVIDIA Fake 4090", (8, 9), "580.65.06 (CUDA 13.0)")
    assert describe_gpu(Cuda(FakeCuda()), driver_file=tmp_path / "none").driver == "unknown (CUDA 13.0)"


def test_no_gpu_is_said() -> None:
    with pytest.raises(ValueError, match=r"no GPU that CUDA can use: .*driver version is insufficient"):
        describe_gpu(Cuda(FakeCuda(fail={"cudaGetDeviceCount": (0, 35)})))
    with pytest.raises(ValueError, match="no GPU 0: CUDA finds 0"):
        describe_gpu(Cuda(FakeCuda(devices=0)))


def test_nvidias_bindings_take_the_arguments_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU each call must fail because the GPU is missing, not because an argument is wrong."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="NVIDIA's bindings: pip install cuda-bindings")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU: the calls would touch memory that is not theirs")
    cuda = Cuda(runtime)
    array = np.zeros(4, np.float32)
    calls = [
        lambda: cuda.use(0),
        cuda.stream,
        lambda: cuda.allocate(64),
        cuda.free_memory,
        lambda: cuda.pinned((2, 2)),
        lambda: cuda.free_pinned(array),
        lambda: cuda.to_device(64, array, 0),
        lambda: cuda.to_host(array, 64, 0),
        lambda: cuda.wait(0),
        lambda: cuda.capture(1, lambda: None),
        lambda: cuda.launch(runtime.cudaGraphExec_t(64), 1),
        lambda: cuda.call("cudaStreamEndCapture", 1),
        lambda: cuda.call("cudaGraphInstantiate", runtime.cudaGraph_t(64), 0),
        lambda: cuda.call("cudaGraphDestroy", runtime.cudaGraph_t(64)),
        lambda: cuda.call("cudaGraphExecDestroy", runtime.cudaGraphExec_t(64)),
        lambda: cuda.call("cudaStreamDestroy", 1),
        lambda: cuda.call("cudaFree", 64),
    ]
    for call in calls:
        with pytest.raises(CudaError, match=r"driver version is insufficient|no CUDA-capable device"):
            call()
    with pytest.raises(ValueError, match="no GPU that CUDA can use"):
        describe_gpu(cuda)
