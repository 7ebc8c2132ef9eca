"""The task "segment": divide an image into regions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import Field

from service.answer_schemas import Box, FloatVector, RunLengths, VisionAnswer
from service.errors import EngineFailed
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schemas import EmbeddingToo
from service.vision.foreground import segment_foreground
from service.vision.mask import coco_rle_encode, overlay_png, png_mask
from service.vision.task import JSON, PNG, Answer, File, Task


class SegmentOptions(EmbeddingToo):
    """The options of `POST /v1/segment`."""

    format: Literal["png", "rle", "overlay"] = Field(
        "png", description="mask as PNG, mask as COCO RLE in JSON, or the image with tinted foreground as PNG"
    )


class SegmentAnswer(VisionAnswer):
    """The answer to `POST /v1/segment` as JSON."""

    segmentation: NotRequired[RunLengths]
    png: NotRequired[Annotated[str, Field(description="the mask as a PNG in base64")]]
    overlay: NotRequired[Annotated[str, Field(description="the image with tinted foreground, as a PNG in base64")]]
    embedding: NotRequired[FloatVector]
    contrast: float
    crop_box: Box


@dataclass(frozen=True)
class _Segmented:
    """The mask of one image in the requested format, with the numbers that describe it."""

    content: dict[str, Any] | File
    contrast: float
    crop_box: tuple[float, float, float, float]


def _compute(analysed: Analysed, options: SegmentOptions, model: ServedModel) -> _Segmented:
    """Compute the mask of an image.

    Raises:
        EngineFailed: a feature is not finite, or the number of patches does not match the size of the image.
    """
    try:
        foreground = segment_foreground(analysed.patches, *analysed.size, analysed.spec)
    except ValueError as error:  # the features are wrong: a fault of the engine, not of the image
        raise EngineFailed(f"the engine's features cannot be used: {error}") from error
    content: dict[str, Any] | File
    if options.format == "rle":
        content = {"segmentation": coco_rle_encode(foreground.mask)}
    else:
        mask = foreground.mask
        content = File(png_mask(mask) if options.format == "png" else overlay_png(analysed.image, mask), PNG)
    return _Segmented(content, foreground.contrast, foreground.crop_box)


def _encode(results: Sequence[_Segmented], options: SegmentOptions) -> Answer:
    [segmented] = results
    about = {"contrast": segmented.contrast, "crop_box": segmented.crop_box}
    if isinstance(segmented.content, File):
        return segmented.content._replace(fields=about)
    return segmented.content | about


TASK: Final = Task(
    name="segment",
    summary="Segment an image",
    description="""Separate the foreground of one image from its background. Send the image in the JSON field
`image`, as a file in a form, or as the raw body.

`format=png` returns the mask as a PNG, `format=overlay` returns the image as a PNG with the foreground tinted, and
`format=rle` returns JSON with the mask as COCO run lengths. With `include=embedding`, the answer is JSON for every
format. It also contains the embedding of the image, and a PNG is encoded as a base64 string.""",
    options=SegmentOptions,
    answer=SegmentAnswer,
    formats={"png": PNG, "rle": JSON, "overlay": PNG},
    compute=_compute,
    encode=_encode,
)
