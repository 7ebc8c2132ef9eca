"""Images/s of the engines on this machine, beside transformers' Dinov2Model and the machine's own limit.

    python benchmarks/engine.py [--model dinov2_vits14] [--batches 1 8] [--rounds 12]

Random weights: speed does not depend on them. All runtimes share one process and take turns within each round, so that
a busy neighbour hurts all alike; the ratios are medians of per-round ratios against torch eager. The limit is the best
float32 matrix product of the same run.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from model.config import ViTConfig, config_for
from model.engine import available_cpus
from model.engine_onnx import OnnxEngine
from model.onnx_graph import GraphSpec, write_onnx
from model.vit import DinoVisionTransformer

RESULTS = Path(__file__).parent / "results"
SIZE = 224


def flops(config: ViTConfig, size: int) -> float:
    """Floating-point operations (multiply and add count as two) of one image."""
    n = (size // config.patch_size) ** 2
    tokens, d = 1 + config.num_register_tokens + n, config.embed_dim
    ffn = (2 if config.ffn == "mlp" else 3) * d * config.hidden_dim
    block = 2 * tokens * (4 * d * d + ffn) + 4 * tokens * tokens * d
    return config.depth * block + 2 * n * 3 * config.patch_size**2 * d


def runtimes(name: str, threads: int, folder: Path) -> dict[str, Callable[[np.ndarray], object]]:
    """Each runtime as a function of pixels [B, 3, H, W]."""
    config = config_for(name)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    ours = DinoVisionTransformer(config).eval()
    weights = {key: tensor.numpy() for key, tensor in ours.state_dict().items()}
    write_onnx(weights, config, GraphSpec((SIZE, SIZE)), folder / "model.onnx")
    onnx = OnnxEngine(folder / "model.onnx", threads=threads)
    theirs = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            image_size=config.img_size,
            patch_size=config.patch_size,
        )
    ).eval()

    def run_torch(model: torch.nn.Module) -> Callable[[np.ndarray], object]:
        def run(pixels: np.ndarray) -> object:
            with torch.inference_mode():
                return model(torch.from_numpy(pixels))

        return run

    return {"torch": run_torch(ours), "onnxruntime": onnx.run, "transformers": run_torch(theirs)}


def matrix_product_rate(rounds: int = 8, n: int = 2048) -> float:
    """Best float32 GFLOP/s of an n x n matrix product in torch."""
    a = torch.randn(n, n)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=available_cpus())
    arguments = parser.parse_args()
    gflop = flops(config_for(arguments.model), SIZE) / 1e9
    peaks = [matrix_product_rate()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engines = runtimes(arguments.model, arguments.threads, Path(folder))
        for batch in arguments.batches:
            pixels = np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(arguments.rounds + 1):
                for name, run in engines.items():
                    start = time.perf_counter()
                    run(pixels)
                    seconds[name].append(time.perf_counter() - start)
            eager = np.array(seconds["torch"][1:])  # the first round warms up
            for name, times in seconds.items():
                array = np.array(times[1:])
                rate = batch / array.min()
                rows.append(
                    {
                        "engine": name,
                        "batch": batch,
                        "images_per_s": round(rate, 2),
                        "images_per_s_median": round(batch / float(np.median(array)), 2),
                        "gflop_per_s": round(rate * gflop, 1),
                        "ratio_to_torch": round(float(np.median(eager / array)), 3),
                    }
                )
            peaks.append(matrix_product_rate())
    print(f"{'engine':<14}{'batch':>6}{'img/s best':>12}{'median':>9}{'GFLOP/s':>9}{'of limit':>9}{'vs torch':>10}")
    for row in rows:
        share = row["gflop_per_s"] / max(peaks)
        print(
            f"{row['engine']:<14}{row['batch']:>6}{row['images_per_s']:>12}{row['images_per_s_median']:>9}"
            f"{row['gflop_per_s']:>9}{share:>9.0%}{row['ratio_to_torch']:>10}"
        )
    result = {
        "benchmark": "engine",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": arguments.model,
        "size": SIZE,
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matrix_product_gflop_per_s": round(max(peaks), 1),
        "rows": rows,
    }
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-engine.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
