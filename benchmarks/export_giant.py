"""Measure the peak memory of exporting the largest backbone (ViT-g/14, 1.1 billion parameters) with random weights.

    python benchmarks/export_giant.py [--depth 40] [--stored float16] [--precision fp32,fp16] [--crop 224]

A separate process writes a checkpoint. Another process exports it as `dinov2 export` does, and its peak resident memory
is measured. The peak includes pages of mapped files (weights, external data) that the system can reclaim. A machine
with less memory is therefore slower, but does not run out of memory.

The script prints a table and, as the last line, the result as JSON, which is also written to benchmarks/results/. At
full size it temporarily needs about 20 GB of disk.
"""

import argparse
import datetime
import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model.config import ViTConfig, config_for

LIMIT_GIB = 16.0


def write_checkpoint(path: Path, config: ViTConfig) -> None:
    """Write a checkpoint with random weights. LayerScale is 0.5, so that every block affects the output."""
    import torch

    from model.checkpoint import save_checkpoint
    from model.vit import DinoVisionTransformer

    torch.manual_seed(0)
    model = DinoVisionTransformer(replace(config, layerscale_init=0.5))
    save_checkpoint(path, model.state_dict(), model.config, {"recipe": "none", "name": "giant"})


def export(path: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Export a checkpoint as `dinov2 export` does, and write the peak memory and the parity to result.json.

    The exported graphs are compared with torch on four generated images.
    """
    from model.engines import parity
    from model.export.checkpoint import export_checkpoint
    from model.export.options import CheckpointOptions, ExportOptions, GraphOptions

    graphs = GraphOptions(precisions=arguments.precision.split(","))
    asked = CheckpointOptions(resize=arguments.crop, crop=arguments.crop, graphs=graphs)
    options = ExportOptions(weights_dtype=arguments.stored, images=parity.sample_photos(4))
    artifact = export_checkpoint(str(path), out, asked, options)
    result = {
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "files": {name: record.bytes for name, record in artifact.manifest.files.items()},
        "parity": [record.model_dump(mode="json") for record in artifact.manifest.parity],
    }
    (out / "result.json").write_text(json.dumps(result))


def in_process(target: object, *arguments: object) -> None:
    """Run a function in a separate process, so that its peak memory can be measured.

    Raises:
        SystemExit: the process failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{getattr(target, '__name__', target)} failed with exit status {process.exitcode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vitg14_reg")
    parser.add_argument("--depth", type=int, help="number of blocks; default: as in the model")
    parser.add_argument("--stored", choices=["float32", "float16"], default="float32", help="type of the weights file")
    parser.add_argument("--precision", default="fp32", help="precisions of additional graphs, e.g. fp32,fp16")
    parser.add_argument("--crop", type=int, default=224, help="side of the input in pixels")
    parser.add_argument("--folder", type=Path, help="folder for the temporary files")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    config = config_for(arguments.model)
    config = replace(config, depth=arguments.depth or config.depth)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        path, out = Path(temporary) / "checkpoint.safetensors", Path(temporary) / "out"
        out.mkdir()
        in_process(write_checkpoint, path, config)
        started = time.monotonic()
        in_process(export, path, out, arguments)
        found = json.loads((out / "result.json").read_text())
        found |= {"checkpoint_bytes": path.stat().st_size, "seconds": round(time.monotonic() - started, 1)}
    today = datetime.date.today().isoformat()
    line = {"benchmark": "export-giant", "date": today, "model": arguments.model, "depth": config.depth}
    line |= {"stored": arguments.stored, "precision": arguments.precision, "crop": arguments.crop} | found
    table = Table(title=f"{arguments.model}, {config.depth} blocks, stored as {arguments.stored}")
    for column in ("checkpoint", "peak memory", "limit", "time"):
        table.add_column(column, justify="right")
    gigabytes = f"{found['checkpoint_bytes'] / 1e9:.2f} GB"
    table.add_row(gigabytes, f"{found['peak_rss_gib']} GiB", f"{LIMIT_GIB:g} GiB", f"{found['seconds']} s")
    Console(width=120).print(table)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{today}-export-giant.json").write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
