"""Tools of benchmarks/gpu_checks.py: random networks, rates, latencies, and comparisons with float32.

Legend: B batch, N patches, D width.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.engines.cuda_driver import no_gpu

BATCH = {224: 64, 518: 16}
"""The batch size for each input side in pixels. Both batches have about the same number of tokens, and TensorRT's
largest profile allows them.
"""
WINDOWS = 5
LATENCY_CALLS = 200
COMPARED = 4  # number of images that are compared with the reference
MIN_COSINE = (0.999, 0.998)  # for class tokens and patches; the limits of half precision in model/engines/parity.py


class SkipError(Exception):
    """An error that says which requirement of a check the machine does not meet."""


@dataclass(frozen=True)
class Setting:
    """The settings of a check, which benchmarks/gpu_suite.py passes to it."""

    device: Any  # torch.device
    tiny: bool
    arguments: dict[str, Any]

    @property
    def cuda(self) -> bool:
        return bool(self.device.type == "cuda")

    def wait(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize(self.device)


def setting_of(arguments: dict[str, Any]) -> Setting:
    import torch

    if arguments["device"] == "cuda" and not torch.cuda.is_available():
        raise SkipError(f"no GPU: {no_gpu() or f'torch {torch.__version__} finds none'}")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return Setting(torch.device(arguments["device"]), arguments["tiny"], arguments)


def network_of(setting: Setting) -> tuple[Any, Any, Any]:
    """Return a random float32 network, random pixels [B, 3, H, W], and the reference features.

    The network and the pixels are on the device. The features are the class tokens and patch tokens of the first
    `COMPARED` images, as NumPy arrays.
    """
    import torch

    from model.config import config_for
    from model.vit import DinoVisionTransformer

    config, side = config_for(setting.arguments["model"]), setting.arguments["pixels"]
    batch = BATCH.get(side, 16)
    if setting.tiny:
        config, side, batch = replace(config, embed_dim=32, depth=2, num_heads=2, img_size=56), 56, COMPARED
    torch.manual_seed(0)
    with setting.device:
        network = DinoVisionTransformer(replace(config, layerscale_init=0.5)).eval().requires_grad_(False)
        pixels = torch.randn(batch, 3, side // 14, side // 14)
    # As in an image, each patch is smooth and the patches differ. Plain noise would average out.
    pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear")
    with torch.inference_mode():
        features = network.forward_features(pixels[:COMPARED])
        reference = features["x_norm_clstoken"].cpu().numpy(), features["x_norm_patchtokens"].cpu().numpy()
    return network, pixels, reference


def graph_file(folder: Path, weights: Any, config: Any, setting: Setting, precision: str, attention: str) -> Path:
    from model.onnx_graph.build import write_onnx
    from model.onnx_graph.spec import GraphSpec

    side = 56 if setting.tiny else setting.arguments["pixels"]
    spec = GraphSpec(size=(side, side), precision=precision, outputs=("cls", "patches"), attention=attention)
    write_onnx(weights, config, spec, folder / "graph.onnx")
    return folder / "graph.onnx"


def replayed(forward: Callable[[Any], Any], x: Any, setting: Setting) -> Any:
    """Return a function that computes `forward(x)` by replaying a CUDA graph, or directly if there is no GPU.

    The attribute `pixels` of the function is `x`, so that a caller can change the input.
    """
    import torch

    if not setting.cuda:

        def run() -> Any:
            return forward(x)

        run.pixels = x  # type: ignore[attr-defined]
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the network and initialises libraries
        for _ in range(3):
            forward(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward(x)

    def replay() -> Any:
        graph.replay()
        return outputs

    replay.pixels = x  # type: ignore[attr-defined]
    return replay


def pinned(x: Any, setting: Setting) -> Any:
    return x.cpu().pin_memory() if setting.cuda else x.cpu()


def rates(run: Callable[[], object], setting: Setting, amount: float) -> tuple[float, float]:
    """Call `run` in several time windows, and return the best and the median rate per second.

    Each call counts as `amount`, for instance the number of images in a batch.
    """
    window_s = 0.01 if setting.tiny else 0.2
    for _ in range(3):
        run()
    setting.wait()
    found = []
    for _ in range(WINDOWS):
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < window_s:
            for _ in range(4):  # enough queued work to hide the time of waiting
                run()
            setting.wait()
            calls += 4
        found.append(calls * amount / (time.perf_counter() - start))
    return max(found), sorted(found)[WINDOWS // 2]


def latency(request: Callable[[], object], setting: Setting) -> dict[str, float]:
    """Call `request` repeatedly, and return the median and the 99th percentile of its time in milliseconds."""
    calls, times = 5 if setting.tiny else LATENCY_CALLS, []
    for number in range(-3, calls):
        start = time.perf_counter()
        request()
        setting.wait()
        if number >= 0:
            times.append(time.perf_counter() - start)
    times.sort()
    return {"ms_p50": round(times[calls // 2] * 1e3, 3), "ms_p99": round(times[int(calls * 0.99)] * 1e3, 3)}


def compare(reference: Any, found: Any) -> tuple[float, float, float]:
    """Compare the class tokens and patch tokens of `found` with `reference`.

    Return the lowest cosine of a class token, the lowest cosine of a patch token, and the largest absolute difference.
    NaN in the features leads to NaN in the results.
    """
    import numpy as np

    cosines, errors = [], []
    for ours, theirs in zip(found, reference, strict=True):
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        cosines.append(float(np.min((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))))
        errors.append(float(np.abs(a - b).max()))
    return cosines[0], cosines[1], float(np.max(errors))


def parity_row(parity: tuple[float, float, float]) -> dict[str, Any]:
    cls, patches, error = parity
    found = {"cosine_cls": round(cls, 6), "cosine_patches": round(patches, 6), "max_error": round(error, 5)}
    return found | {"passed": cls >= MIN_COSINE[0] and patches >= MIN_COSINE[1]}


def row_of(
    name: str,
    setting: Setting,
    batch_run: Callable[[], object],
    request: Callable[[], object],
    parity: tuple[float, float, float],
    started: float,
) -> dict[str, Any]:
    """Measure one engine with one network, and return the table row with all figures."""
    from model.config import config_for
    from training.watch.flops import backbone_flops, device_peak_flops

    model, side = setting.arguments["model"], setting.arguments["pixels"]
    batch = COMPARED if setting.tiny else BATCH.get(side, 16)
    best, median = rates(batch_run, setting, batch)
    flops, peak = best * backbone_flops(config_for(model), side), device_peak_flops(setting.device)
    row = {"engine": name, "model": model, "pixels": side, "batch": batch}
    row |= {"images_per_s": round(best, 1), "images_per_s_median": round(median, 1)}
    if not setting.tiny:
        row |= {"tflop_per_s": round(flops / 1e12, 1), "mfu": round(flops / peak, 4) if peak else None}
    return row | latency(request, setting) | parity_row(parity) | {"start_s": round(started, 1)}


def package_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
