"""The type of vision tasks. Each task is an endpoint, a command and a Python function.

A task computes a result for each image of a request, one image at a time, and encodes all results as one answer: JSON
or a file. The endpoint (`service/routes/vision.py`), the command (`cli/vision.py`) and the Python function
(`service/vision/local.py`) are made from the same `Task`, so they accept the same options and return the same answers.
"""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from service.features.pipeline import Analysed, Embedded, View
from service.features.served_model import ServedModel
from service.schemas import EmbeddingToo, VisionOptions
from service.vision.pictures import png_bytes

O = TypeVar("O", bound=VisionOptions)  # noqa: E741
S = TypeVar("S")

JSON: Final = "application/json"
PNG: Final = "image/png"
NPY: Final = "application/x-npy"


class File(NamedTuple):
    """An answer that is not JSON."""

    data: bytes
    media_type: str
    headers: Mapping[str, str] = {}
    fields: Mapping[str, Any] = {}  # what the JSON answer also contains if the file becomes a part of it


Answer = dict[str, Any] | File


def _nothing(options: VisionOptions, model: ServedModel) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Task(Generic[O, S]):
    """A vision task.

    name: the last part of the endpoint's path and the name of the command.
    summary: one line that says what the task does.
    description: the text about the endpoint in the OpenAPI document.
    options: the schema of the options. Its field `format` names one of `formats`.
    answer: the type of the JSON answer.
    formats: the media type of each format. If several formats have the same media type, the command uses the first of
        them by default for files of this type.
    compute: computes the result for one image, in a worker thread. It may raise any ServiceError.
    encode: makes the answer from the results for all images of a request, in a worker thread. The numpy arrays in the
        answer must be contiguous.
    outputs: returns the names of the inner outputs that `compute` needs (see `model/engines/protocol.py`). They may
        depend on the heads that the model has at the moment. This function also refuses options that contradict each
        other or do not fit the model.
    images: the lowest and the highest number of images in a request.
    headers: the names of the headers that the answer may have, in addition to those of all vision tasks.
    """

    name: str
    summary: str
    description: str
    options: type[O]
    answer: Any
    formats: Mapping[str, str]
    compute: Callable[[Analysed, O, ServedModel], S]
    encode: Callable[[Sequence[S], O], Answer]
    outputs: Callable[[O, ServedModel], Iterable[str]] = field(default=_nothing)
    images: tuple[int, int] = (1, 1)
    headers: tuple[str, ...] = ()

    @property
    def many(self) -> bool:
        """True if a request may have several images."""
        return self.images[1] > 1

    def view(self, options: O, model: ServedModel) -> View:
        """Return what the network must compute for each image of a request: the inner outputs and the preprocessing.

        Raises:
            InvalidRequest: the options name something that the model does not have.
        """
        return View(tuple(dict.fromkeys(self.outputs(options, model))), model.spec(options.size))


def add_embedding(answer: Answer, options: VisionOptions, embedded: Sequence[Embedded]) -> Answer:
    """Add the embedding of the image to an answer if the options ask for it. The result is then JSON: a file becomes a
    base64 string in the field with the name of its format. Otherwise, return the answer unchanged."""
    if not isinstance(options, EmbeddingToo) or not options.include:
        return answer
    if isinstance(answer, File):
        format_ = str(getattr(options, "format", "file"))
        answer = {format_: base64.b64encode(answer.data).decode("ascii"), **answer.fields}
    return answer | {"embedding": embedded[0].vector(options.pooling, options.normalize)}


def npy(array: npt.NDArray[Any]) -> File:
    """Return an array as a file in numpy's format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return File(buffer.getvalue(), NPY)


def png(pixels: npt.NDArray[Any]) -> File:
    """Return an image (uint8 [H, W, 3] or [H, W], or uint16 [H, W]) as a PNG file."""
    return File(png_bytes(pixels), PNG)
