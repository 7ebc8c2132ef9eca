"""Compare every kind of ONNX graph with torch in float32, for several models, sizes, batch sizes and precisions.

    python benchmarks/parity_table.py [--models dinov2_vits14 ...] [--sizes 224x224 ...] [--batches 1 3]

The weights are random. They are scaled so that activations stay near one in every layer, and biases and registers are
not near zero. LayerScale is 0.5 instead of the initial 1e-5, so that a missing or wrongly scaled layer changes the
output. The table compares only the arithmetic. For int8 graphs with trained weights, see docs/decisions/0018-int8.md.

In the column `where`, "ORT" means ONNX Runtime on a CPU. It has no bfloat16, and it computes float16 in float32 without
rounding between operators. "ORT, rounded" means the same graph in float32 with every result rounded to half precision
(`benchmarks/emulate.py`), which equals a GPU that accumulates in float32. The graph `dynamic` is a float32 graph for
any input size, which computes the position embedding at run time.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.emulate import emulate_half
from model.config import ViTConfig, config_for
from model.cpus import available_cpus
from model.engines.parity import compare, sample_photos
from model.engines.protocol import Features
from model.onnx_graph.build import build_onnx
from model.onnx_graph.spec import GraphSpec
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer

RESULTS = Path(__file__).parent / "results"
LAYERSCALE = 0.5
MODELS = {
    "dinov2_vits14": config_for("dinov2_vits14"),
    "dinov2_vits14_reg": config_for("dinov2_vits14_reg"),
    "dinov2_vitb14_reg": config_for("dinov2_vitb14_reg"),
    "giant, 2 blocks": dataclasses.replace(config_for("dinov2_vitg14"), depth=2),
    "tiny": ViTConfig(embed_dim=64, depth=2, num_heads=4, img_size=98, num_register_tokens=2),
}
ROWS = {  # name: the graph (size None means any size), and whether the results of its operators are rounded
    "fp32": (GraphSpec((0, 0)), False),
    "dynamic": (GraphSpec(None), False),
    "fp16": (GraphSpec((0, 0), "fp16"), False),
    "fp16 rounded": (GraphSpec((0, 0), "fp16"), True),
    "bf16 rounded": (GraphSpec((0, 0), "bf16"), True),
    "int8 s7": (GraphSpec((0, 0), "int8"), False),
    "int8 u8": (GraphSpec((0, 0), "int8", int8_weights="u8"), False),
}


def random_backbone(config: ViTConfig) -> DinoVisionTransformer:
    """Return a backbone with random weights. The standard deviation of a matrix is 1/sqrt(inputs). All other weights
    differ clearly from their initial values.
    """
    torch.manual_seed(0)
    model = DinoVisionTransformer(dataclasses.replace(config, layerscale_init=LAYERSCALE)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.endswith("weight"):
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            elif name in ("pos_embed", "cls_token", "register_tokens"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "gamma" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def photos(batch: int, size: tuple[int, int]) -> np.ndarray:
    """Return a batch of generated images with coloured waves, as normalised pixels [B, 3, H, W]."""
    spec, height, width = PreprocessSpec(), *size
    resized = [np.asarray(Image.fromarray(photo).resize((width, height))) for photo in sample_photos(batch)]
    scaled = np.stack(resized).astype(np.float32) / 255
    normalised = (scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def torch_features(model: DinoVisionTransformer, pixels: np.ndarray) -> Features:
    with torch.inference_mode():
        found = model.forward_features(torch.from_numpy(pixels))
    return Features(
        found["x_norm_clstoken"].numpy(), found["x_norm_patchtokens"].numpy(), found["x_norm_regtokens"].numpy()
    )


def session(graph: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rows_of(
    name: str, config: ViTConfig, sizes: list[tuple[int, int]], batches: list[int], threads: int
) -> Iterator[dict[str, str | int | float]]:
    """Yield one table row for each input size, batch size and graph. A graph for any size is loaded only once."""
    model = random_backbone(config)
    weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    inputs = {(size, batch): photos(batch, size) for size in sizes for batch in batches}
    expected = {key: torch_features(model, pixels) for key, pixels in inputs.items()}
    for row, (spec, rounded) in ROWS.items():
        loaded = None
        for size in sizes:
            if spec.size is not None or loaded is None:
                baked = spec if spec.size is None else dataclasses.replace(spec, size=size)
                graph = build_onnx(weights, model.config, baked)
                loaded = session(emulate_half(graph) if rounded else graph, threads)
            for batch in batches:
                outputs = loaded.run(["cls", "patches", "registers"], {"pixels": inputs[size, batch]})
                error, cls, patches, _ = compare(expected[size, batch], Features(*outputs))
                yield {
                    "model": name,
                    "size": f"{size[0]}x{size[1]}",
                    "batch": batch,
                    "graph": row.removesuffix(" rounded"),
                    "where": "ORT, rounded" if rounded else "ORT",
                    "max_abs_error": float(f"{error:.3g}"),
                    "min_cosine_cls": round(cls, 7),
                    "min_cosine_patches": round(patches, 7),
                }


def size_of(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(224, 224), (518, 518), (98, 98), (224, 336)])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the dated result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = {"model": 19, "size": 9, "batch": 6, "graph": 9, "where": 13, "max_abs_error": 14}
    columns |= {"min_cosine_cls": 15, "min_cosine_patches": 19}
    print("".join(f"{column:<{width}}" for column, width in columns.items()))
    rows = []
    for name in arguments.models:
        for row in rows_of(name, MODELS[name], arguments.sizes, arguments.batches, arguments.threads):
            print("".join(f"{row[column]!s:<{width}}" for column, width in columns.items()), flush=True)
            rows.append(row)
    result = {
        "benchmark": "parity-table",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "layerscale": LAYERSCALE,
        "rows": rows,
    }
    print(json.dumps(result))
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / f"{result['date']}-parity-table.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
