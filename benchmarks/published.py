"""Measure how long a published model takes from its name to a verified artifact, and how much memory this needs.

    python benchmarks/published.py [--models dinov2_vits14_reg,...] [--folder FOLDER]

A local server offers files with random weights in Meta's format, because the benchmark must not depend on a network.
For each model, a separate process in which torch cannot be imported does what `dinov2 serve --model NAME` does at the
first start: download, export, and comparison of the graph with the numpy reference. The table shows the seconds of each
step and the peak resident memory. The peak includes pages of mapped files, which the system can reclaim.

The script also writes the result to benchmarks/results/. ViT-g temporarily needs about 20 GB of disk.
"""

import argparse
import datetime
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from model.config import config_for
from model.cpus import available_cpus
from model.vit import DinoVisionTransformer
from model.zoo import resolve

MODELS = "dinov2_vits14_reg,dinov2_vitb14,dinov2_vitl14,dinov2_vitg14"
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent

WITHOUT_TORCH = """
import json, resource, sys, time
sys.modules["torch"] = None
from pathlib import Path
from model.artifact import load_artifact
from service.artifact_choice import choose_artifact

steps, started = {}, time.monotonic()

def report(line):
    global step, began
    name = line.split(" ")[0]
    if name != step:
        steps[step], step, began = time.monotonic() - began, name, time.monotonic()

step, began = "start", started
path = choose_artifact(sys.argv[1], Path(sys.argv[2]), report)
report("loading")
artifact = load_artifact(path)
report("end")
[record] = artifact.manifest.parity
print(json.dumps({
    "seconds": {name: round(seconds, 1) for name, seconds in steps.items() if name != "start"},
    "total_s": round(time.monotonic() - started, 1),
    "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "reference": record.reference,
    "max_abs_error": record.max_abs_error,
    "min_cosine_cls": record.min_cosine_cls,
}))
"""


def write_weights(name: str, folder: Path) -> int:
    """Write a file with random weights where a mirror of Meta's server has it, and return its size in bytes.

    LayerScale is 0.5, so that every block affects the output.
    """
    torch.manual_seed(0)
    model = DinoVisionTransformer(replace(config_for(name), layerscale_init=0.5))
    path = folder / resolve(name).path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path.stat().st_size


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name is the base class's
        """Print nothing."""


def measure(name: str, mirror: Path, folder: Path) -> dict[str, object]:
    """Download and export a model in a process without torch, and return its result."""
    handler = functools.partial(QuietHandler, directory=str(mirror))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, name, str(folder)],
            cwd=ROOT,
            env=os.environ | {"DINOV2_META_URL": url, "DINOV2_HUGGING_FACE_URL": url},
            stdout=subprocess.PIPE,
            check=True,
        )
        server.shutdown()
    result: dict[str, object] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="names of published models, separated by commas")
    parser.add_argument("--folder", type=Path, help="folder for the temporary files")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            mirror, data = Path(temporary) / "mirror", Path(temporary) / "data"
            size = write_weights(name, mirror)
            rows.append({"model": name, "file_bytes": size, **measure(name, mirror, data)})
            print(json.dumps(rows[-1]), flush=True)
    table = Table(title="from a published name to a verified artifact, without torch")
    for column in ("model", "file", "download", "export and comparison", "load", "peak memory", "largest error"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = row["seconds"]
        shown = [f"{seconds.get(step, 0)} s" for step in ("downloading", "exporting", "loading")]
        gigabytes, error = f"{row['file_bytes'] / 1e9:.2f} GB", f"{row['max_abs_error']:.1e}"
        table.add_row(row["model"], gigabytes, *shown, f"{row['peak_rss_gib']} GiB", error)
    Console(width=120).print(table)
    today = datetime.date.today().isoformat()
    result = {"benchmark": "published", "date": today, "cpus": available_cpus(), "torch": False, "models": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{today}-published.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
