"""Exports a model to an artifact: writes weights and ONNX graphs, checks the graphs' results, and writes the manifest.

The export is atomic. All files are written into a temporary folder next to the target. After the graphs have been
compared with the reference model, one rename gives the folder its final name, so a failed or killed export leaves no
folder that looks like an artifact.

Weights are written, hashed and put into graphs one tensor at a time, and `comparison.py` loads one engine at a time. An
export therefore needs memory for at most two copies of the weights: the caller's copy and one engine's copy.
`benchmarks/export_giant.py` measures the memory that an export needs.
"""

import datetime
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from model.artifact import (
    MANIFEST,
    MODEL_CARD,
    ONNX,
    WEIGHTS,
    Artifact,
    FileRecord,
    GraphRecord,
    Manifest,
    StoredWeights,
    describe_file,
    fingerprint,
    graph_name,
    input_size,
    load_artifact,
)
from model.engines import parity
from model.export.comparison import Comparison
from model.export.options import Backbone, ExportOptions, WeightsDtype
from model.files import publish, working_folder, write_text
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec

log = logging.getLogger(__name__)


def export_artifact(
    backbone: Backbone, out_dir: Path, options: ExportOptions, graphs: Sequence[GraphSpec] = ()
) -> Artifact:
    """Write `<out_dir>/<name>-<first 8 digits of the fingerprint>/` and return the verified artifact.

    Args:
        backbone: the model.
        out_dir: the folder of artifacts. It is created if missing.
        options: the options for writing and comparing the artifact.
        graphs: the graphs to write in addition to `model.onnx`. Each is compared with the reference (see
            `model/export/comparison.py`) at its own size, or at two sizes if it accepts any size. A bf16 graph that
            ONNX Runtime cannot run on the CPU is not compared.

    Raises:
        ParityError: a graph's results in ONNX Runtime differ too much from the reference's. For an int8 graph, this
            error is not raised. Instead, the graph is stored with a failed gate.
        ValueError: a size is not a multiple of the patch size, or `options.keep_onnx` is False and a graph is too large
            to be rebuilt from the weights.
        OSError: the folder cannot be written.
    """
    size = input_size(backbone.preprocess)
    specs = {ONNX: GraphSpec(size=size)} | {graph_name(spec.size, spec.precision): spec for spec in graphs}
    out_dir.mkdir(parents=True, exist_ok=True)
    with working_folder(out_dir, ".exporting-") as temporary:
        folder, digest = _write_weights(backbone, temporary, options.weights_dtype)
        onnx_files = _write_graphs(backbone, folder, specs, keep_onnx=options.keep_onnx)
        images = list(options.images) if options.images is not None else parity.sample_photos()
        comparison = Comparison(folder, backbone.config, backbone.preprocess, images, options.labelled)
        comparison.run(specs)
        if options.model_card is not None:
            (folder / MODEL_CARD).write_text(options.model_card)
        manifest = Manifest(
            name=backbone.name,
            fingerprint=digest,
            config=backbone.config,
            preprocess=backbone.preprocess,
            input_size=size,
            parity=comparison.records,
            graphs=[
                GraphRecord(file=file, not_compared=comparison.not_compared.get(file), **asdict(spec))
                for file, spec in specs.items()
                if file != ONNX
            ],
            provenance=dict(backbone.provenance),
            licence=backbone.licence,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=_describe(folder, onnx_files, specs),
        )
        write_text(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
        load_artifact(folder)  # checks every hash and the fingerprint, as a server does
        if not options.keep_onnx:
            for file in onnx_files:
                (folder / file).unlink()
        target = _publish(folder, out_dir)
    return Artifact(target, manifest, {name: target / name for name in manifest.files if (target / name).exists()})


def _write_weights(backbone: Backbone, temporary: Path, dtype: WeightsDtype) -> tuple[Path, str]:
    """Write the weights into a new artifact folder in `temporary`, and return that folder and the fingerprint."""
    stored = {key: np.ascontiguousarray(array.astype(dtype, copy=False)) for key, array in backbone.weights.items()}
    digest = fingerprint(stored, backbone.config, backbone.preprocess)
    folder = temporary / f"{backbone.name}-{digest[:8]}"
    folder.mkdir()
    try:
        save_file(stored, folder / WEIGHTS)
    except SafetensorError as error:  # raised on a full disk
        raise OSError(f"{folder / WEIGHTS}: cannot be written: {error}") from error
    return folder, digest


def _write_graphs(backbone: Backbone, folder: Path, specs: Mapping[str, GraphSpec], *, keep_onnx: bool) -> list[str]:
    """Write every graph from the stored weights, and return the names of all written files.

    Raises:
        ValueError: `keep_onnx` is False, but a graph is too large to be built from the weights later.
    """
    files: list[str] = []
    for file, spec in specs.items():
        log.info("writing %s", file)
        written = write_onnx(StoredWeights(folder / WEIGHTS), backbone.config, spec, folder / file)
        if not keep_onnx and len(written) > 1:
            raise ValueError(
                f"{backbone.name}: {file} needs {len(written)} files and cannot be derived: set keep_onnx=True"
            )
        files += written
    return files


def _describe(folder: Path, onnx_files: Sequence[str], specs: Mapping[str, GraphSpec]) -> dict[str, FileRecord]:
    """Return the manifest's records of all files in `folder`, keyed by file name."""
    files = {WEIGHTS: describe_file(folder / WEIGHTS)}
    files |= {file: describe_file(folder / file, derived=file in specs) for file in onnx_files}
    if (folder / MODEL_CARD).exists():
        files[MODEL_CARD] = describe_file(folder / MODEL_CARD)
    return files


def _publish(folder: Path, out_dir: Path) -> Path:
    """Move the finished folder into `out_dir` and return its new path. A folder of the same name is replaced."""
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes its file owner-only, but a container's user must read it
    target = out_dir / folder.name
    if target.exists():  # replaced in spite of the same fingerprint, because its manifest may be old or damaged
        os.rename(target, folder.parent / "replaced")
    publish(folder, target)
    return target
