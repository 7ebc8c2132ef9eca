"""Compare engines of other precisions with `onnxruntime:fp32` on labelled images.

    python benchmarks/precision_gate.py ARTIFACT IMAGES [--engines openvino:fp32 openvino:bf16]

IMAGES is a folder with `train/` and `val/`, each with one folder per class. The table shows the lowest cosines of class
tokens and of patches over all images of `val`. Then the k-NN gate of `dinov2 export` (model/engines/knn_gate.py): how
many images of `val`, and how many of `train` in leave-one-out, are classified correctly in float32 and by the engine.
Each image is decoded once, and all engines get the same pixels in batches of four.
"""

import argparse
import datetime
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.artifact import Artifact, load_artifact
from model.decode import decode
from model.engines import parity
from model.engines.choice import load_engine
from model.engines.knn_gate import ClassTokens, knn_gate
from model.engines.protocol import Engine
from model.folder import walk
from training.watch.flops import describe_device

RESULTS = Path(__file__).parent / "results"
REFERENCE = "onnxruntime:fp32"


def class_tokens(
    artifact: Artifact, engines: dict[str, Engine], files: list[Path], cosines: dict[str, list[float]] | None
) -> dict[str, np.ndarray]:
    """Return the class tokens [n, D] of the files by engine. If `cosines` is given, put the lowest cosines of class
    tokens and of patches with the first engine into it."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    manifest = artifact.manifest
    for top in range(0, len(files), parity.BATCH):
        images = [decode(path.read_bytes()) for path in files[top : top + parity.BATCH]]
        pixels = parity.pixels_at(images, manifest.preprocess, manifest.input_size)
        outputs = {name: engine.run(pixels) for name, engine in engines.items()}
        for name, features in outputs.items():
            parts[name].append(features.cls)
            if cosines is not None and name != REFERENCE:
                _, *lowest, _ = parity.compare(outputs[REFERENCE], features)
                cosines[name] = [min(pair) for pair in zip(cosines.get(name, [1.0, 1.0]), lowest, strict=True)]
    return {name: np.concatenate(tokens) for name, tokens in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of an exported model")
    parser.add_argument("images", type=Path, help="folder with train/ and val/")
    parser.add_argument("--engines", nargs="+", default=["openvino:fp32", "openvino:bf16"])
    parser.add_argument("--at-most", type=int, help="images of train and of val; fewer make a trial run faster")
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    arguments = parser.parse_args()
    artifact = load_artifact(arguments.artifact)
    engines = {name: load_engine(artifact, name) for name in (REFERENCE, *arguments.engines)}
    cosines: dict[str, list[float]] = {}
    tokens, labels = {}, {}
    for part in ("train", "val"):
        files = sorted(Path(listed.path) for listed in walk(arguments.images / part) if listed.is_image)
        step = -(-len(files) // (arguments.at_most or len(files)))
        files = files[::step]  # of all classes
        labels[part] = np.array([path.relative_to(arguments.images / part).parts[0] for path in files])
        tokens[part] = class_tokens(artifact, engines, files, cosines if part == "val" else None)
    names = np.unique(np.concatenate(list(labels.values())))
    numbers = {part: np.searchsorted(names, of) for part, of in labels.items()}
    by_engine = {
        name: ClassTokens(tokens["train"][name], numbers["train"], tokens["val"][name], numbers["val"])
        for name in engines
    }
    rows: list[dict[str, Any]] = []
    for name in arguments.engines:
        gate = knn_gate(by_engine[REFERENCE], by_engine[name])
        row = {"engine": name, "cosine_cls": cosines[name][0], "cosine_patches": cosines[name][1]}
        rows.append(row | {"gate": gate.model_dump()})
        print(f"{name}: cosine of class tokens {row['cosine_cls']:.6f}, of patches {row['cosine_patches']:.6f}")
        print(f"  gate {gate.status}: {gate.reason}")
    result = {
        "benchmark": "precision_gate",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python benchmarks/precision_gate.py {arguments.artifact.name} {arguments.images.name}",
        "model": artifact.manifest.name,
        "machine": describe_device(torch.device("cpu")),
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "openvino")},
        "rows": rows,
    }
    out = arguments.out or RESULTS / f"{result['date']}-precision-gate.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
