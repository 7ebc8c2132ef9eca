"""Run vision tasks in this process, without a server. The command line uses this module, and Python programs can, too.

from service.vision.local import open_vision

vision = open_vision()
answer = vision.run("segment", ["image.jpg"], format="rle")
answer["segmentation"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact, load_artifact
from model.cpus import available_cpus
from model.decode import DEFAULT_LIMITS, DecodeLimits
from model.engines.choice import load_engine
from model.engines.general import open_general
from model.engines.protocol import Engine
from model.preprocess import preprocess
from service.artifact_choice import choose_artifact
from service.errors import BrokenImage, InvalidRequest, ServiceError
from service.features.forward import Forward, Row
from service.features.images import decode
from service.features.pipeline import Analysed, Embedded, PipelineLimits, View, check_input_size
from service.features.served_model import ServedModel
from service.options import parse_options
from service.settings import load_settings
from service.vision import tasks
from service.vision.task import Answer, add_embedding


@dataclass(frozen=True)
class Vision:
    """A loaded model that runs vision tasks on images. Only one thread at a time may use it."""

    artifact: Artifact
    engine: Engine
    threads: int | None = None
    limits: DecodeLimits = DEFAULT_LIMITS
    max_input_patches: int = 4096

    @cached_property
    def model(self) -> ServedModel:
        return ServedModel(self.artifact, self._forward_zeros, self._forward_pixels)

    def _forward_zeros(self, height: int, width: int) -> npt.NDArray[np.float32]:
        return self._forward_pixels(np.zeros((3, height, width), np.float32)).patches

    def _forward_pixels(self, pixels: npt.NDArray[np.float32]) -> Row:
        [row] = self._forward(pixels[None])
        return row

    @cached_property
    def _forward(self) -> Forward:
        threads = self.threads or available_cpus()
        return Forward(self.engine, partial(open_general, self.artifact, self.engine, threads=threads))

    def run(self, name: str, images: bytes | str | Path | Sequence[bytes | str | Path], **options: Any) -> Answer:
        """Run a task on images and return its answer: a dictionary with numpy arrays, or a `File`.

        Args:
            name: the name of the task, which is also the last part of its endpoint's path.
            images: one image or several: encoded images (bytes), or paths of image files.
            options: the options of the task, as for its endpoint.

        Raises:
            InvalidRequest: the task is unknown, or an option or the number of images is not allowed.
            ServiceError: an image cannot be used.
            OSError: a file cannot be read.
        """
        if name not in tasks.SUMMARIES:
            raise InvalidRequest(f"unknown task {name!r}; the tasks are {', '.join(tasks.SUMMARIES)}")
        if isinstance(images, bytes | str | Path):
            images = [images]
        task = tasks.task(name)
        low, high = task.images
        if not low <= len(images) <= high:
            allowed = str(low) if low == high else f"{low} to {high}"
            raise InvalidRequest(f"the number of images is {len(images)}, but {name} accepts {allowed}")
        parsed = parse_options(task.options, options)
        view = task.view(parsed, self.model)
        results, embedded = [], []
        for image in images:
            analysed = self._analyse_file(image, view)
            results.append(task.compute(analysed, parsed, self.model))
            embedded.append(analysed.embedded)
        return add_embedding(task.encode(results, parsed), parsed, embedded)

    def _analyse_file(self, image: bytes | str | Path, view: View) -> Analysed:
        """Analyse an encoded image or an image file. An error of the image names the file."""
        if isinstance(image, bytes):
            return self.analyse(image, view)
        try:
            return self.analyse(Path(image).read_bytes(), view)
        except ServiceError as error:
            if error.param is not None:  # an option does not fit the image
                raise
            raise type(error)(f"{image}: {error.detail}") from error

    def analyse(self, image: bytes, view: View) -> Analysed:
        """Decode an image, run the network on it, and return all its features.

        Raises:
            ServiceError: the image cannot be used.
        """
        pixels = decode(image, self.limits)
        spec = view.spec or self.artifact.manifest.preprocess
        try:
            if view.spec is not None:
                check_input_size(pixels.shape[0], pixels.shape[1], spec, self.max_input_patches)
            network_input = preprocess(pixels, spec)
        except ValueError as error:
            raise BrokenImage(str(error)) from error
        [row] = self._forward(network_input[None], view.outputs)
        grid = network_input.shape[1] // spec.patch_size, network_input.shape[2] // spec.patch_size
        parts = row.parts
        if view.spec is None and not row.by_serving:  # vectors of two engines are never mixed
            parts = self._forward(network_input[None])[0].parts
        embedded = Embedded(parts, row.tokens)
        return Analysed(embedded, row.patches, row.registers, grid, pixels, spec, row.outputs)


def open_vision(
    model: str = "auto", data_dir: Path = Path("data"), engine: str = "auto", threads: int | None = None
) -> Vision:
    """Load a model and return it for vision tasks. The limits on images are those of the service's settings.

    Args:
        model: an artifact folder, a model's name, or auto, as for `dinov2 serve`.
        data_dir: the data folder.
        engine: the engine, as for `dinov2 serve`.
        threads: the number of CPU threads for a forward pass. If None, all CPUs are used.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the model cannot be loaded.
    """
    limits = PipelineLimits.of(load_settings({"data_dir": data_dir}))
    artifact = load_artifact(choose_artifact(model, data_dir), derived_dir=data_dir / "derived")
    loaded = load_engine(artifact, engine, threads=threads)
    return Vision(artifact, loaded, threads, limits.decode, limits.max_input_patches)
