"""Exports a checkpoint file of any known format, or a published model, to an artifact."""

from pathlib import Path
from typing import Any

from model import zoo
from model.artifact import Artifact, input_size
from model.export.artifact import export_artifact
from model.export.graphs import wanted_graphs
from model.export.options import Backbone, CheckpointOptions, ExportOptions
from model.preprocess import changed_spec, read_spec
from model.weights import is_own_checkpoint, read_checkpoint, read_weights


def export_checkpoint(source: str, out_dir: Path, asked: CheckpointOptions, options: ExportOptions) -> Artifact:
    """Export a checkpoint file of any format that `read_weights` reads, or a published model, to an artifact.

    Args:
        source: the path of a checkpoint, or the name of a published model (see `model/zoo.py`). A published model is
            downloaded.
        out_dir: the folder of artifacts. It is created if missing.
        asked: the options for reading the checkpoint, and the graphs to add.
        options: the options for writing and comparing the artifact.

    Raises:
        ValueError: `source` is neither a checkpoint nor the name of a published model, `asked.arch` is missing, or an
            option is invalid.
        zoo.DownloadError: a published model cannot be downloaded.
        ParityError, OSError: see `export_artifact`.
    """
    backbone = read_backbone(source, asked)
    graphs = wanted_graphs(backbone.config, input_size(backbone.preprocess), asked.graphs)
    return export_artifact(backbone, out_dir, options, graphs)


def read_backbone(source: str, asked: CheckpointOptions) -> Backbone:
    """Read the checkpoint file `source`, or download the published model of this name, and return the model.

    Raises:
        ValueError, zoo.DownloadError: see `export_checkpoint`.
    """
    provenance: dict[str, Any]
    arch, licence, path = asked.arch, asked.licence, Path(source)
    if path.is_file() and is_own_checkpoint(path):
        weights, config, provenance = read_checkpoint(path)
    elif path.is_file():
        if arch is None:
            raise ValueError(f"{source} does not record its architecture: add --arch, e.g. --arch dinov2_vits14")
        weights, config = read_weights(arch, weights=path)
        provenance = {"file": path.name}
    elif path.is_dir():
        raise ValueError(f"{source} is a folder: give a checkpoint file, such as a run's checkpoint.safetensors")
    else:
        try:
            entry = zoo.resolve(source)
        except ValueError as error:
            raise ValueError(f"{source}: no such file; {error}") from error
        weights, config = read_weights(entry.name, download=asked.download)
        url = zoo.downloaded_source(entry, asked.download).url
        provenance, arch, licence = {"url": url}, entry.name, entry.licence
    evaluated = read_spec(provenance.get("preprocess", {"patch_size": config.patch_size}))
    return Backbone(
        name=asked.name or provenance.get("name") or arch or path.stem,
        weights=weights,
        config=config,
        preprocess=changed_spec(evaluated, fit=asked.fit, resize=asked.resize, crop=asked.crop),
        provenance=provenance,
        licence=licence,
    )
