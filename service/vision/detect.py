"""The task "detect": find objects without labels, and return their boxes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydantic import Field
from typing_extensions import TypedDict

from service.answer_schemas import Box, VisionAnswer
from service.errors import InvalidRequest
from service.features.patches import unit_rows
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import Whole
from service.schemas import VisionOptions
from service.vision.lost import several_lost
from service.vision.multi import MAX_OBJECTS, Found, several_cuts
from service.vision.object_score import MIN_SCORE
from service.vision.patch_grid import PatchGrid
from service.vision.regions import describe_regions, label_colours, pixel_labels
from service.vision.segment import check_patches, object_features
from service.vision.task import JSON, PNG, Answer, File, Task, png

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class DetectOptions(VisionOptions):
    """The options of `POST /v1/detect`."""

    method: Literal["lost", "cut"] = Field(
        "cut", description="cut: repeated normalised cuts; lost: LOST with centred similarities"
    )
    format: Literal["json", "overlay"] = Field(
        "json", description="boxes as JSON, or the image with the boxes as a PNG"
    )
    max_objects: Whole = Field(10, ge=1, le=MAX_OBJECTS, description="highest number of boxes; the best come first")
    min_score: float = Field(MIN_SCORE, ge=0, le=1, allow_inf_nan=False, description="lowest score of an object")
    max_overlap: float = Field(
        0.5,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="highest intersection over union of two boxes; if it is higher, the box with the lower "
        "score is left out",
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="cut: cosine above which patches are linked; default: computed from the image",
    )
    refine: bool = Field(True, description="let the boxes enclose outlines that follow the edges of the image")


class Detected(TypedDict):
    """An object."""

    box: Box
    score: Annotated[float, Field(description="how likely it is an object, from 0 to 1")]
    area: Annotated[int, Field(description="number of pixels of the object")]


class DetectAnswer(VisionAnswer):
    """The answer to `POST /v1/detect` as JSON."""

    found: Annotated[bool, Field(description="false if no object reaches min_score")]
    objects: Annotated[list[Detected], Field(description="the objects, best first")]
    crop_box: Box


@dataclass(frozen=True)
class _Detected:
    """The objects in one image, and the picture with their boxes if the request asks for it."""

    objects: list[dict[str, Any]]
    crop_box: list[float]
    picture: File | None


def suppress(boxes: Sequence[Sequence[float]], max_overlap: float) -> list[int]:
    """Return the indices of the boxes that remain after non-maximum suppression, in ascending order. `boxes` contains
    (x, y, width, height) for each box, and is sorted by score, best first. A box is left out if its intersection over
    union with an earlier remaining box is above `max_overlap`."""
    kept: list[int] = []
    for index, (x, y, width, height) in enumerate(boxes):
        for other in kept:
            left, top, other_width, other_height = boxes[other]
            across = min(x + width, left + other_width) - max(x, left)
            down = min(y + height, top + other_height) - max(y, top)
            shared = max(across, 0) * max(down, 0)
            if shared > max_overlap * (width * height + other_width * other_height - shared):
                break
        else:
            kept.append(index)
    return kept


def _compute(analysed: Analysed, options: DetectOptions, model: ServedModel) -> _Detected:
    """Find the objects in an image.

    Raises:
        EngineFailed: a feature is not finite.
        InvalidRequest: the image has too many patches.
    """
    grid = PatchGrid.of(analysed.size, analysed.crop_box, analysed.grid)
    features = unit_rows(grid.select(object_features(analysed, model)))
    check_patches(features, options.method)
    found = _found(features, grid.shape, options)
    image = analysed.image if options.refine else None
    labels = pixel_labels(grid, [each.mask for each in found], image, one_part=True)
    regions = describe_regions(labels, [each.score for each in found], "json", 0)
    kept = suppress([region["box"] for region in regions], options.max_overlap)
    objects = [{key: regions[index][key] for key in ("box", "score", "area")} for index in kept]
    picture = png(drawn(analysed.image, objects)) if options.format == "overlay" else None
    return _Detected(objects, list(analysed.crop_box), picture)


def _found(features: Floats, grid: tuple[int, int], options: DetectOptions) -> list[Found]:
    if options.method == "lost":
        return several_lost(features, grid, max_objects=options.max_objects, min_score=options.min_score)
    return several_cuts(
        features,
        grid,
        max_objects=options.max_objects,
        min_score=options.min_score,
        threshold=options.threshold,
    )


def drawn(image: Pixels, objects: Sequence[dict[str, Any]]) -> Pixels:
    """Draw the boxes and the scores of objects on the image [H, W, 3]."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 150))
    text = max(10, round(min(picture.size) / 25))
    for number, found in enumerate(objects, start=1):
        colour = tuple(int(value) for value in label_colours()[number])
        x, y, width, height = found["box"]
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=colour, width=line)
        label = f"{found['score']:.2f}"
        place = x + line + 1, y + line
        draw.rectangle(draw.textbbox(place, label, font_size=text), fill=colour)
        draw.text(place, label, fill=(0, 0, 0), font_size=text)
    return np.asarray(picture)


def _outputs(options: DetectOptions, model: ServedModel) -> Iterable[str]:
    """Return the inner output that both methods need.

    Raises:
        InvalidRequest: an option does not belong to the chosen method.
    """
    if options.method == "lost" and options.threshold is not None:
        raise InvalidRequest("threshold has no effect with method=lost; it belongs to method=cut", param="threshold")
    return (f"keys.{model.config.depth - 1}",)


def _encode(results: Sequence[_Detected], options: DetectOptions) -> Answer:
    [detected] = results
    answer = {"found": bool(detected.objects), "objects": detected.objects, "crop_box": detected.crop_box}
    return answer if detected.picture is None else detected.picture._replace(fields=answer)


TASK: Final = Task(
    name="detect",
    summary="Find objects without labels",
    description="""Find the objects in one image and return a box, a score and an area for each, without labels. Send
the image in the JSON field `image`, as a file in a form, or as the raw body.

`score` from 0 to 1 says how likely it is that the box shows an object. If no object reaches `min_score`, `found` is
false and `objects` is empty. Boxes are [x, y, width, height] in pixels of the upright image. `format=overlay` returns
the image with the boxes as a PNG.""",
    options=DetectOptions,
    answer=DetectAnswer,
    formats={"json": JSON, "overlay": PNG},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
)
