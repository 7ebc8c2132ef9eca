"""Exports any source that `model/loading.py` reads to an artifact."""

from pathlib import Path

from model.artifact import Artifact, input_size
from model.export.artifact import export_artifact
from model.export.graphs import wanted_graphs
from model.export.options import Backbone, CheckpointOptions, ExportOptions
from model.loading import read_model
from model.preprocess import changed_spec


def export_checkpoint(source: str, out_dir: Path, asked: CheckpointOptions, options: ExportOptions) -> Artifact:
    """Export a checkpoint, a run, an artifact or a published model to an artifact.

    Args:
        source: a source of `model.loading.read_model`.
        out_dir: the folder of artifacts. It is created if missing.
        asked: the options for reading the checkpoint, and the graphs to add.
        options: the options for writing and comparing the artifact.

    Raises:
        ValueError, OSError: see `read_backbone`.
        ParityError, OSError: see `export_artifact`.
    """
    backbone = read_backbone(source, asked)
    graphs = wanted_graphs(backbone.config, input_size(backbone.preprocess), asked.graphs)
    return export_artifact(backbone, out_dir, options, graphs)


def read_backbone(source: str, asked: CheckpointOptions) -> Backbone:
    """Read a checkpoint, a run, an artifact or a published model, and return the model.

    Raises:
        ValueError: the source is not a model, `asked.arch` is missing, an option is invalid, or the model's name cannot
            be the name of a folder.
        zoo.DownloadError: a published model cannot be downloaded.
        OSError: a file is missing or cannot be read.
    """
    loaded = read_model(source, arch=asked.arch, download=asked.download)
    return Backbone(
        name=asked.name or loaded.name,
        weights=loaded.arrays,
        config=loaded.config,
        preprocess=changed_spec(loaded.preprocess, fit=asked.fit, resize=asked.resize, crop=asked.crop),
        provenance=loaded.provenance,
        licence=loaded.licence or asked.licence,
    )
