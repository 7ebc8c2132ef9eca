"""The command `dinov2 build-engine`, which builds a TensorRT engine for the GPU of this machine and compares its
features with those of a reference engine.

Heavy packages are imported only when the command runs.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.shared import DATA, ArtifactsDirOption, fail, tell_next

if TYPE_CHECKING:
    from model.artifact import Artifact
    from model.engines.protocol import Engine

PHOTOS = 32
"""The maximum number of images that are read from a folder to check parity and to measure activation ranges for fp8."""


def build_engine(
    artifact: Annotated[
        str,
        typer.Argument(
            help="An artifact folder, a model's name, or auto (the newest artifact in the data folder, else the "
            "bundled one)."
        ),
    ],
    precision: Annotated[
        Literal["bf16", "fp16", "fp8"],
        typer.Option(
            help="Number format of the plan. fp8 needs a GPU of compute capability 8.9 or higher, and its value ranges "
            "are measured on --images."
        ),
    ] = "bf16",
    data_dir: ArtifactsDirOption = DATA,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images for the comparison with the reference. Default: generated images."),
    ] = None,
    library: Annotated[
        Literal["tensorrt", "tensorrt_rtx"] | None,
        typer.Option(help="Library that builds the plan. Default: tensorrt if it is installed, else tensorrt_rtx."),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File in which TensorRT stores kernel timings, which make later builds faster."),
    ] = None,
    refit: Annotated[bool, typer.Option(help="Build a plan that accepts new weights later.")] = False,
    refit_from: Annotated[
        Path | None,
        typer.Option(
            help="Plan that was built with --refit for a model of the same shape. Its weights are replaced with the "
            "artifact's, without a build."
        ),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option(help="Build the plan even if one that passed the comparison exists.")
    ] = False,
    time_limit: Annotated[float, typer.Option(min=1, help="Time limit of the build in seconds.")] = 3600,
) -> None:
    """Build a TensorRT plan, which is an engine compiled for the GPU of this machine. The plan is used only if its
    features match those of a reference engine (docs/tensorrt.md)."""
    from model.artifact import load_artifact
    from model.engines.tensorrt_export import BuildOptions, build_plan
    from model.engines.tensorrt_plans import figures, find_toolchain, plans_folder
    from service.artifact_choice import choose_artifact, read_photos

    try:
        toolchain = find_toolchain(library)  # first, because nothing else is useful without a GPU
        chosen = load_artifact(choose_artifact(artifact, data_dir), derived_dir=data_dir / "derived")
        given: dict[str, Any] = {"photos": read_photos(images, PHOTOS)} if images else {}
        options = BuildOptions(
            precision=precision,
            refit=refit,
            refit_from=refit_from,
            timing_cache=timing_cache,
            time_limit_s=time_limit,
            rebuild=rebuild,
            **given,
        )
        if precision == "fp8":
            options = _with_activations(options, chosen)
        with _Shown() as progress:
            path, record = build_plan(
                chosen, toolchain, _reference(chosen), plans_folder(chosen.derived), options, progress=progress
            )
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise fail(error) from error
    typer.echo(
        f"{path}\n{toolchain.library.name} {toolchain.library.version} on {toolchain.gpu.name}, "
        f"{record.bytes / 2**20:.0f} MiB\nparity with {record.reference} at batches "
        f"{', '.join(str(parity.batch) for parity in record.parity)}: {figures(record.parity)}"
    )
    tell_next(f"dinov2 serve --model {shlex.quote(str(chosen.path))} --engine tensorrt:{precision}")


def _reference(artifact: "Artifact") -> "Engine":
    """Return a float32 engine for the artifact on the CPU. It runs torch if torch is installed, and ONNX Runtime
    otherwise."""
    from importlib.util import find_spec

    from model.artifact import ONNX, WEIGHTS
    from model.cpus import available_cpus

    if find_spec("torch") is not None:
        from model.engines.torch_engine import TorchEngine

        return TorchEngine(artifact.file(WEIGHTS), artifact.manifest.config, threads=available_cpus(), device="cpu")
    from model.engines.onnxruntime_engine import OnnxEngine

    return OnnxEngine(artifact.file(ONNX), threads=available_cpus())


def _with_activations(options: Any, artifact: "Artifact") -> Any:
    """Return a copy of the options that also contains the activation ranges for fp8. These ranges are measured on
    `options.photos`."""
    from dataclasses import replace

    from model.engines.activations import measure_activations
    from model.engines.parity import pixels_at

    manifest = artifact.manifest
    pixels = pixels_at(options.photos, manifest.preprocess, manifest.input_size)
    return replace(options, activations=measure_activations(artifact.weights, manifest.config, pixels))


class _Shown:
    """Displays the progress of a build: progress bars on a terminal, otherwise one line for each main phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Shown":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        phase = event["phase"]
        if "steps" in event:
            if not sys.stderr.isatty() and event.get("parent") is None:
                typer.echo(f"{phase} ...", err=True)
            self._tasks[phase] = self._progress.add_task(phase, total=event["steps"])
        elif phase in self._tasks and event.get("done"):
            self._progress.remove_task(self._tasks.pop(phase))
        elif phase in self._tasks:
            self._progress.update(self._tasks[phase], completed=event["step"] + 1)
