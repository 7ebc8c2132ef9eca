"""Measuring tools of benchmarks/gpu_checks.py: networks, rates, latencies, parity with float32.

Legend: B batch, N patches, D width.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BATCH = {224: 64, 518: 16}
"""Images of a throughput row: about as many tokens at both sizes, and no more than TensorRT's largest profile."""
WINDOWS = 5
LATENCY_CALLS = 200
COMPARED = 4  # images
MIN_COSINE = (0.999, 0.998)  # of class tokens and patches, as model/engines/tensorrt_export.py asks of a plan


class SkipError(Exception):
    """A requirement of this kind of check that the machine does not meet."""


@dataclass(frozen=True)
class Setting:
    """The parent's settings for a check."""

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
        raise SkipError(f"no GPU: torch {torch.__version__} sees none")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return Setting(torch.device(arguments["device"]), arguments["tiny"], arguments)


def network_of(setting: Setting) -> tuple[Any, Any, Any]:
    """Return a random float32 network on the device, pixels [B, 3, H, W] there, and its (class tokens, patches)."""
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
    # Patches differ from each other and each is smooth, as in images; noise alone would average out.
    pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear")
    with torch.inference_mode():
        features = network.forward_features(pixels[:COMPARED])
        reference = tuple(features[f"x_norm_{part}"].cpu().numpy() for part in ("clstoken", "patchtokens"))
    return network, pixels, reference


def graph_file(folder: Path, weights: Any, config: Any, setting: Setting, precision: str, attention: str) -> Path:
    from model.onnx_graph.build import GraphSpec, write_onnx

    side = 56 if setting.tiny else setting.arguments["pixels"]
    spec = GraphSpec(size=(side, side), precision=precision, outputs=("cls", "patches"), attention=attention)
    write_onnx(weights, config, spec, folder / "graph.onnx")
    return folder / "graph.onnx"


def replayed(forward: Callable[[Any], Any], x: Any, setting: Setting) -> Any:
    """Return the pass over `x` as a CUDA graph, with `x` as its attribute `pixels`; without a GPU, the plain pass."""
    import torch

    if not setting.cuda:

        def run() -> Any:
            return forward(x)

        run.pixels = x  # type: ignore[attr-defined]
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation, and what libraries do at first
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
    """Return `amount` per second of a call: best and median of some windows of at least a fifth of a second."""
    window_s = 0.01 if setting.tiny else 0.2
    for _ in range(3):
        run()
    setting.wait()
    found = []
    for _ in range(WINDOWS):
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < window_s:
            for _ in range(4):  # enough on the queue to hide the wait
                run()
            setting.wait()
            calls += 4
        found.append(calls * amount / (time.perf_counter() - start))
    return max(found), sorted(found)[WINDOWS // 2]


def latency(request: Callable[[], object], setting: Setting) -> dict[str, float]:
    """Return the milliseconds per image, one image after the other."""
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
    """Return the lowest cosine of a class token and of a patch, and the largest absolute difference. NaN stays NaN."""
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
    """Return all figures of one engine and one network."""
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
