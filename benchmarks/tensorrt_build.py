"""Build our graphs with TensorRT for RTX, which needs no GPU, and measure the time and the result.

    python benchmarks/tensorrt_build.py [--models dinov2_vits14 dinov2_vits14_reg] [--precisions bf16 fp16 fp8]
                                        [--targets SM80 SM89 SM120] [--sizes 224] [--one-profile]

The weights are random, because a build does not depend on them. The builds run one after another, each in a separate
process. They have the three profiles of the service (batch sizes 1, 2-16 and 17-64), or only 2-16 with --one-profile.
The table has the seconds, the size of the plan, and the number of fused attention kernels. `rest_s` is the time of
the process outside parsing and building, for instance for importing the library. A failed build is also a row.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from model.config import ViTConfig, config_for
from model.cpus import available_cpus
from model.engines.tensorrt_build import BuildError, count_fused_attention, find_library
from model.engines.tensorrt_export import run_job
from model.engines.tensorrt_plans import PROFILES
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec

RESULTS = Path(__file__).parent / "results"


def random_weights(config: ViTConfig) -> dict[str, np.ndarray]:
    """Return random weights with the names and shapes of Meta's checkpoints. The weights are small, so that activations
    fit every number format.
    """
    rng, d, hidden = np.random.default_rng(0), config.embed_dim, config.hidden_dim
    first, second = ("mlp.fc1", "mlp.fc2") if config.ffn == "mlp" else ("mlp.w12", "mlp.w3")
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + config.grid**2, d),
        "register_tokens": (1, config.num_register_tokens, d),
        "patch_embed.proj.weight": (d, 3, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for index in range(config.depth):
        block = f"blocks.{index}"
        wide = hidden if config.ffn == "mlp" else 2 * hidden
        linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), first: (wide, d), second: (d, hidden)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"{block}.{name}"] = (d,)
    return {name: rng.standard_normal(shape, dtype=np.float32) / 20 for name, shape in shapes.items()}


def build(model: str, precision: str, target: str, size: int, profiles: tuple, folder: Path) -> dict:
    """Build one plan, and return the table row with its figures or with the reason for the failure."""
    config = config_for(model)
    registers = ("registers",) if config.num_register_tokens else ()
    attention = "upcast" if precision == "fp16" else "standard"
    spec = GraphSpec((size, size), precision, outputs=("cls", "patches", *registers), attention=attention)
    weights = random_weights(config)
    largest = {name.removesuffix(".weight"): 4.0 for name, value in weights.items() if value.ndim == 2}
    write_onnx(weights, config, spec, folder / "graph.onnx", activations=largest if precision == "fp8" else None)
    job = {
        "action": "build",
        "library": "tensorrt_rtx",
        "onnx": str(folder / "graph.onnx"),
        "plan": str(folder / "plan"),
        "input": "pixels",
        "profiles": [[[batch, 3, size, size] for batch in profile] for profile in profiles],
        "targets": [target],
    }
    row = {"model": model, "size": size, "precision": precision, "attention": attention, "target": target}
    row |= {"profiles": len(profiles), "blocks": config.depth}
    start = time.perf_counter()
    try:
        done = run_job(job, folder, time_limit_s=1800, progress=lambda event: None)
    except BuildError as error:
        return row | {"refused": str(error)[:200]}
    rest = time.perf_counter() - start - done["parse_s"] - done["build_s"]
    plan = (folder / "plan").read_bytes()
    row |= {"parse_s": done["parse_s"], "build_s": done["build_s"], "rest_s": round(rest, 3)}
    return row | {"plan_bytes": len(plan), "fused_attention": count_fused_attention(plan)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dinov2_vits14", "dinov2_vits14_reg"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16", "fp8"])
    parser.add_argument("--targets", nargs="+", default=["SM80", "SM89", "SM120"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--one-profile", action="store_true")
    arguments = parser.parse_args()
    library = find_library("tensorrt_rtx")
    profiles = PROFILES[1:2] if arguments.one_profile else PROFILES
    print(f"{'model':<20}{'size':>5}{'':>2}{'format':<8}{'target':<8}{'parse s':>8}{'build s':>9}{'MB':>8}{'fused':>7}")
    rows = []
    for model in arguments.models:
        for size in arguments.sizes:
            for precision in arguments.precisions:
                for target in arguments.targets:
                    with tempfile.TemporaryDirectory() as folder:
                        row = build(model, precision, target, size, profiles, Path(folder))
                    rows.append(row)
                    start = f"{model:<20}{size:>5}{'':>2}{precision:<8}{target:<8}"
                    if "refused" in row:
                        print(f"{start}failed: {row['refused'][:70]}", flush=True)
                        continue
                    wanted = row["blocks"] * row["profiles"]
                    print(
                        f"{start}{row['parse_s']:>8}{row['build_s']:>9}{row['plan_bytes'] / 1e6:>8.1f}"
                        f"{row['fused_attention']:>4}/{wanted}",
                        flush=True,
                    )
    result = {
        "benchmark": "tensorrt-build",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "library": f"{library.name} {library.version}",
        "gpu": None,  # TensorRT for RTX builds for a target architecture without a GPU
        "machine": platform.processor() or platform.machine(),
        "cpus": available_cpus(),
        "rows": rows,
    }
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-tensorrt-build.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
