"""Run one check of benchmarks/gpu_suite.py: `python benchmarks/gpu_checks.py KIND ARGUMENTS`, where ARGUMENTS is JSON.

A check prints a line {"row": {...}} for each result as soon as it is available, or {"skipped": "reason"}. It prints
nothing else on standard output. The networks have random weights, and LayerScale is 0.5, so that every block affects
the comparison with torch in float32 (without TF32). Only the check `served` uses trained weights.

Images/s are measured with a batch in GPU memory, as the best and the median of five time windows. MFU is the number of
operations per second (training/watch/flops.py) divided by the peak that the vendor states for dense bf16. Latency is
the time in which one image in host memory becomes a class token in host memory. A TensorRT row measures the CUDA graph
of the engine, which also copies the pixels and all features. The other rows copy only the class token.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_measure import (
    COMPARED,
    Setting,
    SkipError,
    compare,
    graph_file,
    latency,
    network_of,
    package_there,
    parity_row,
    pinned,
    rates,
    replayed,
    row_of,
    setting_of,
)
from benchmarks.tiny_training import TINY
from model.engines.cuda_driver import ask_driver, capability_without_bf16

Emit = Callable[[dict[str, Any]], None]
BESIDES_BUILD_S = 60
"""The part of a check's time limit in seconds that is left to it beside the build of a TensorRT plan."""
PACKAGES = ("torch", "triton", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")


def device(setting: Setting, emit: Emit) -> None:
    """Report the GPU, the installed packages, and the speed of a bf16 matrix product and of a copy."""
    import torch

    from training.watch.flops import describe_device, device_peak_flops

    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    row = {"device": describe_device(setting.device), "python": sys.version.split()[0], "packages": installed}
    if setting.cuda:
        report = ask_driver()
        row |= {"driver_cuda": "{}.{}".format(*report.cuda), "capability": "{}.{}".format(*report.capability)}
        properties = torch.cuda.get_device_properties(setting.device)
        row |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        row |= {"multiprocessors": properties.multi_processor_count}
    n = 128 if setting.tiny else 8192
    a, b = torch.randn(2, n, n, device=setting.device, dtype=torch.bfloat16)
    best, median = rates(lambda: a @ b, setting, 2 * n**3)
    row |= {"product_tflop_per_s": round(best / 1e12, 2), "product_tflop_per_s_median": round(median / 1e12, 2)}
    source = torch.zeros((1 << 20) if setting.tiny else (1 << 30), device=setting.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    best, _ = rates(lambda: target.copy_(source), setting, 2 * source.nbytes)
    peak = device_peak_flops(setting.device)
    emit(row | {"copy_gb_per_s": round(best / 1e9, 1), "peak_tflop_per_s": peak and peak / 1e12})


def cross_entropy(setting: Setting, emit: Emit) -> None:
    """Compare `soft_cross_entropy` and its gradient with the plain expression in float64. Then run the measurement of
    benchmarks/cross_entropy.py.
    """
    import torch

    from benchmarks.cross_entropy import measure
    from training.kernels import plain_cross_entropy, soft_cross_entropy

    if setting.cuda and not package_there("triton"):
        raise SkipError("triton is not installed")
    rows, k = (8, 96) if setting.tiny else (256, 65536)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(rows, k, generator=generator).to(setting.device, dtype).requires_grad_()
        targets = torch.randn(rows, k, generator=generator).softmax(-1).to(setting.device)
        exact = student.detach().double().requires_grad_()
        loss, expected = soft_cross_entropy(student, targets, 0.1), plain_cross_entropy(exact, targets, 0.1)
        loss.sum().backward()
        expected.sum().backward()
        value = float((loss - expected).abs().max() / expected.abs().max())
        gradient = float((student.grad - exact.grad).abs().max() / exact.grad.abs().max())
        found = {"dtype": str(dtype), "prototypes": k, "value_error": value, "gradient_error": gradient}
        emit(found | {"passed": value < 1e-5 and gradient < limit})
    for dtype in (torch.float32,) if setting.tiny else (torch.float32, torch.bfloat16):
        for row in measure(rows, k, dtype, setting.device, 2 if setting.tiny else 9):
            emit({"dtype": str(dtype), "rows": rows, **row})


TINY_STEP = TINY | {"model": "dinov2_vitt14", "batch_size": 4, "compile": False}


def training_step(setting: Setting, emit: Emit) -> None:
    """Run benchmarks/training_step.py. If a checkout of the official code is given, compare with it."""
    from benchmarks.training_step import COMMON, PRESETS, measure
    from training.config import TrainConfig
    from training.watch.flops import device_peak_flops
    from training.wiring import work_of_step

    asked = setting.arguments
    changes = {"batch_size": asked["batch"]} if asked.get("batch") else {}
    preset = TINY_STEP if setting.tiny else PRESETS[asked["preset"]] | {"compile": True} | changes
    config = TrainConfig.model_validate(COMMON | preset | {"precision": "auto"})
    official = Path(asked["official"]) if asked.get("official") else None
    _, report = measure(config, setting.device, 2 if setting.tiny else 10, official, 64 if setting.tiny else 2048)
    peak = device_peak_flops(setting.device)
    flops = report["images_per_s"]["ours"] * work_of_step(config) / config.batch_size
    emit({"preset": asked["preset"], **report, "mfu": round(flops / peak, 4) if peak else None})


def torch_bf16(setting: Setting, emit: Emit) -> None:
    """Measure torch in bf16: first eager, and then with compiled blocks in a CUDA graph of the whole forward pass."""
    import torch

    network, pixels, reference = network_of(setting)
    for module in network.modules():  # as in TorchEngine: cast once what autocast would cast in each pass
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(setting.device.type, torch.bfloat16, cache_enabled=False):
            features = network.forward_features(x)
        return features["x_norm_clstoken"].float(), features["x_norm_patchtokens"].float()

    with torch.inference_mode():
        for name in ("torch eager bf16", "torch compiled bf16, CUDA graph"):
            start = time.perf_counter()
            if name.startswith("torch compiled"):
                torch._dynamo.config.recompile_limit = (
                    64  # one per batch size; after the default of 8, torch silently stops compiling
                )
                for block in network.blocks:  # the blocks share their code, so each batch size is compiled once
                    block.compile(dynamic=False, backend="eager" if setting.tiny else "inductor")
            runs = {}
            for batch in sorted({1, len(pixels), COMPARED}):
                x = pixels[:batch].clone()
                runs[batch] = replayed(forward, x, setting) if "graph" in name else lambda x=x: forward(x)
                runs[batch]()
            setting.wait()
            started = time.perf_counter() - start
            found = tuple(part.cpu().numpy() for part in runs[COMPARED]())
            host, one = pinned(pixels[:1], setting), runs[1]

            def request(name: str = name, host: Any = host, one: Any = one) -> None:
                if "graph" in name:
                    one.pixels.copy_(host, non_blocking=True)
                    one()[0].cpu()
                else:
                    forward(host.to(setting.device, non_blocking=True))[0].cpu()

            emit(row_of(name, setting, runs[len(pixels)], request, compare(reference, found), started))


def onnxruntime_cuda(setting: Setting, emit: Emit) -> None:
    """Measure our ONNX graph in ONNX Runtime, with inputs and outputs bound to GPU memory.

    Without a GPU, the CPU provider is used.
    """
    if not package_there("onnx"):
        raise SkipError("onnx is not installed")
    try:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort
    except ImportError as error:
        raise SkipError(f"onnxruntime is not installed ({error})") from error
    provider = "CUDAExecutionProvider" if setting.cuda else "CPUExecutionProvider"
    if setting.cuda:
        ort.preload_dlls()  # before the test below, because a provider in a plugin registers when CUDA loads
    if provider not in ort.get_available_providers():
        raise SkipError(f"onnxruntime {ort.__version__} has no {provider}, which onnxruntime-gpu has")
    network, pixels, reference = network_of(setting)
    weights = {key: tensor.cpu().numpy() for key, tensor in network.state_dict().items()}
    config = network.config
    del network
    forms = [("bf16", "standard"), ("fp16", "standard"), ("fp16", "tiled")] if setting.cuda else [("fp32", "standard")]
    for precision, attention in forms:
        name = f"ONNX Runtime {provider.removesuffix('ExecutionProvider')} {precision}, {attention} attention"
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = graph_file(Path(folder), weights, config, setting, precision, attention)
                emit(_session_row(name, path, provider, setting, pixels, reference))
        except Exception as error:  # noqa: BLE001  another number format or attention form may work
            emit({"engine": name, "failed": f"{type(error).__name__}: {str(error)[:500]}"})
        else:
            if config.embed_dim >= 1024:  # one is enough for a large graph, which takes long to write and load
                break


def _session_row(name: str, path: Path, provider: str, setting: Setting, pixels: Any, reference: Any) -> dict[str, Any]:
    import onnxruntime as ort

    start = time.perf_counter()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    settings = [{"use_tf32": "0"} if setting.cuda else {}]
    session = ort.InferenceSession(path, options, providers=[provider], provider_options=settings)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} did not start")
    kind = setting.device.type

    def bound(batch: int) -> tuple[Callable[[], None], Any, Any]:
        value = ort.OrtValue.ortvalue_from_numpy(pixels[:batch].cpu().numpy(), kind, 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input("pixels", value)
        for output in ("cls", "patches"):
            binding.bind_output(output, kind, 0)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        run()
        return run, binding, value

    batch, (one, binding, value) = bound(len(pixels))[0], bound(1)
    few, several, _ = bound(COMPARED)
    started = time.perf_counter() - start
    few()
    found = tuple(output.numpy() for output in several.get_outputs())
    image = pixels[:1].cpu().numpy()

    def request() -> None:
        value.update_inplace(image)
        one()
        binding.get_outputs()[0].numpy()

    return row_of(name, setting, batch, request, compare(reference, found), started)


def tensorrt(setting: Setting, emit: Emit) -> None:
    """Build a TensorRT plan as `dinov2 build-engine` does, and measure it in the serving engine.

    The plan is in bf16, or in fp16 if the GPU cannot compute in bf16. The rate with copies includes those between
    ordinary and pinned memory, as in the service.
    """
    if not setting.cuda:
        raise SkipError("TensorRT runs on a GPU only")
    if not package_there("onnx"):
        raise SkipError("onnx is not installed")
    from model.engines.tensorrt_build import count_fused_attention
    from model.engines.tensorrt_engine import TensorRTEngine
    from model.engines.tensorrt_export import BuildOptions, make_job, run_job, targets_of
    from model.engines.tensorrt_plans import attention_form, find_toolchain

    try:
        toolchain = find_toolchain()
    except (ImportError, ValueError) as error:
        raise SkipError(str(error)) from error
    network, pixels, reference = network_of(setting)
    weights = {key: tensor.cpu().numpy() for key, tensor in network.state_dict().items()}
    config, size = network.config, tuple(pixels.shape[2:])
    del network
    precision = half_precision()
    name, start = f"{toolchain.library.name} {toolchain.library.version} {precision}", time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        attention = attention_form(precision, toolchain.library)
        path = graph_file(folder, weights, config, setting, precision, attention)
        options, targets = BuildOptions(precision=precision), targets_of(toolchain)
        job = make_job(toolchain.library.name, path, folder / "plan", size, options, targets=targets)
        limit_s = setting.arguments["limit_s"] - BESIDES_BUILD_S
        done = run_job(job, folder, time_limit_s=limit_s, progress=lambda event: None)
        plan = (folder / "plan").read_bytes()
    built = time.perf_counter() - start
    engine = TensorRTEngine(plan, toolchain, precision)
    started = time.perf_counter() - start
    host = pixels.cpu().numpy()
    found = engine.run(host[:COMPARED])
    engine.run(host)  # fills the buffers of the engine

    def replay() -> None:
        engine._graphs[len(host)]()  # the CUDA graph alone, without the copies between pinned and ordinary memory
        engine._cuda.wait(engine._stream)

    row = row_of(name, setting, replay, lambda: engine.run(host[:1]), compare(reference, found[:2]), started)
    best, _ = rates(lambda: engine.run(host), setting, len(host))
    row |= {
        "images_per_s_with_copies": round(best, 1),
        "build_s": round(built, 1),
        "plan_mb": round(len(plan) / 1e6, 1),
    }
    emit(row | {"fused": done.get("fused_attention", count_fused_attention(plan))})


def served(setting: Setting, emit: Emit) -> None:
    """Measure the bundled artifact in each GPU engine of the service. The engines are loaded as in the service."""
    import numpy as np

    from model.artifact import load_artifact
    from model.engines import parity
    from model.engines.choice import load_engine
    from model.preprocess import preprocess

    bundled = next(
        path for path in sorted((Path(__file__).parents[1] / "model" / "bundled").iterdir()) if path.is_dir()
    )
    plan = f"tensorrt:{half_precision()}" if setting.cuda else ""
    names = ("torch", "torch:bf16", "onnxruntime-cuda:bf16", "onnxruntime-cuda:fp16", plan, "auto")
    with tempfile.TemporaryDirectory() as derived:
        artifact = load_artifact(bundled, derived_dir=Path(derived))
        spec = artifact.manifest.preprocess
        photos = np.stack([preprocess(photo, spec) for photo in parity.sample_photos(16)])
        cpu = load_engine(artifact, "onnxruntime")
        reference = cpu.run(photos)
        batch = np.concatenate([photos] * 4)
        for name in names if setting.cuda else ("torch",):
            start = time.perf_counter()
            try:
                if name == plan:
                    _build_plan(artifact, cpu)
                engine = load_engine(artifact, name)
                engine.run(batch)
                started, found = time.perf_counter() - start, engine.run(photos)
            except Exception as error:  # noqa: BLE001  the error is the result
                emit({"engine": name, "failed": f"{type(error).__name__}: {str(error)[:500]}"})
                continue
            row = {"engine": name, "answers": f"{engine.name}:{engine.precision}", "start_s": round(started, 1)}
            best, median = rates(partial(engine.run, batch), setting, len(batch))
            row |= {"images_per_s": round(best, 1), "images_per_s_median": round(median, 1)}
            row |= latency(partial(engine.run, photos[:1]), setting)
            emit(row | parity_row(compare((reference.cls, reference.patches), (found.cls, found.patches))))


def half_precision() -> Literal["bf16", "fp16"]:
    """Return the 16-bit number format that this GPU computes fast."""
    return "fp16" if capability_without_bf16() else "bf16"


def _build_plan(artifact: Any, reference: Any) -> None:
    """Build the TensorRT plan of an artifact as `dinov2 build-engine` does."""
    from model.engines.tensorrt_export import BuildOptions, build_plan
    from model.engines.tensorrt_plans import find_toolchain, plans_folder

    options = BuildOptions(precision=half_precision(), time_limit_s=90)
    build_plan(artifact, find_toolchain(), reference, plans_folder(artifact.derived), options)


@contextmanager
def own_output() -> Iterator[Emit]:
    """Yield a function that prints a value as a line of JSON. Other output of this process goes to standard error."""
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)

        def emit(value: dict[str, Any]) -> None:
            lines.write(json.dumps(value) + "\n")
            lines.flush()

        yield emit


CHECKS: dict[str, Callable[[Setting, Emit], None]] = {
    "device": device,
    "cross_entropy": cross_entropy,
    "training_step": training_step,
    "served": served,
    "torch": torch_bf16,
    "onnxruntime": onnxruntime_cuda,
    "tensorrt": tensorrt,
}
OUR_PACKAGES = ("model", "training", "service", "cross_entropy")


def main() -> int:
    kind, arguments = sys.argv[1], json.loads(sys.argv[2])
    with own_output() as emit:
        try:
            CHECKS[kind](setting_of(arguments), lambda row: emit({"row": row}))
        except SkipError as error:
            emit({"skipped": str(error)})
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] in OUR_PACKAGES or error.name == "training_step":
                raise  # a module of this project is missing, which is a fault
            emit({"skipped": f"{error.name} is not installed"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
