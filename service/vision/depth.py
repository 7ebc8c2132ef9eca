"""The task "depth": estimate the distance of each pixel in metres with a depth head (`model/heads/`).

The head's depth map is enlarged bilinearly to the size of the image. Pixels outside the part of the image that the
network sees have no depth: they are 0 in the files, and grey in the coloured picture.

Legend: H, W size of the image in pixels; h, w size of the patch grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NotRequired

import numpy as np
import numpy.typing as npt
from pydantic import Field

from model.heads.record import LARGEST_DEPTH_M, depth_range_problem
from model.heads.store import Head
from service.answer_schemas import Box, VisionAnswer
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import DocumentedAs
from service.schemas import VisionOptions
from service.vision.heads import open_named, outputs_of, tokens_of
from service.vision.pictures import coloured, to_image
from service.vision.task import JSON, NPY, PNG, Answer, File, Task, npy, png

Floats = npt.NDArray[np.float32]

UNITS_PER_METRE: Final = (1000, 256)
"""The possible scales of a 16-bit PNG: millimetres up to 65.535 m, and KITTI's scale up to 255.996 m."""
_LARGEST_UNIT: Final = 65_535
_UNSEEN: Final = 128
_ROWS_PER_BLOCK: Final = 256
MAX_NUMBERS: Final = 2**25  # in an array


class DepthOptions(VisionOptions):
    """The options of `POST /v1/depth`."""

    format: Literal["json", "npy", "png", "png16"] = Field(
        "json",
        description="json: smallest, largest and median depth; npy: metres as a float32 array; png: coloured picture, "
        "near is light; png16: 16-bit PNG",
    )
    head: str | None = Field(
        None, max_length=64, description="name of the depth head; default: the only one that the model has"
    )
    min_depth: float | None = Field(
        None, gt=0, le=LARGEST_DEPTH_M, description="smallest depth in metres; default: that of the head"
    )
    max_depth: float | None = Field(
        None, gt=0, le=LARGEST_DEPTH_M, description="largest depth in metres; default: that of the head"
    )
    array: bool = Field(False, description="also return the head's depth map, in metres, for format=json")


class DepthAnswer(VisionAnswer):
    """The answer to `POST /v1/depth` as JSON. Depths are in metres."""

    head: str
    head_sha256: Annotated[str, Field(description="hash of the head's weights")]
    depth_range: Annotated[list[float], Field(description="smallest and largest depth that the head can return")]
    min: float
    max: float
    median: float
    crop_box: Annotated[Box, Field(description="the part of the image that the network sees")]
    size: Annotated[list[int], Field(description="height and width of the image in pixels")]
    depth: NotRequired[
        Annotated[
            Any, DocumentedAs(list[list[float]]), Field(description="the head's depth map, which covers crop_box")
        ]
    ]


@dataclass(frozen=True)
class _Depth:
    """The depth map of one image, in metres, and the part of the image that it covers."""

    metres: Floats  # 4h x 4w for a linear head, 32 ceil(h/2) x 32 ceil(w/2) for a DPT head
    size: tuple[int, int]  # H, W
    crop_box: tuple[float, float, float, float]
    depth_range: tuple[float, float]
    head: Head


def _outputs(options: DepthOptions, model: ServedModel) -> tuple[str, ...]:
    return outputs_of(model, "depth", options.head)


def _compute(analysed: Analysed, options: DepthOptions, model: ServedModel) -> _Depth | File:
    """Compute the depth map of an image. A file is also encoded here and not in `_encode`, because the number of images
    that are computed at the same time is limited, and so is their memory.

    Raises:
        InvalidRequest: there is no such head, the range of depths is empty or too large for the format, the input is
            too large for a DPT head, or the image is too large for an array.
        EngineFailed: the head cannot be used, or its result is not finite.
    """
    head = open_named(model, "depth", options.head)
    metres_of_head = head.record.depth_range
    assert metres_of_head is not None
    low, high = options.min_depth or metres_of_head[0], options.max_depth or metres_of_head[1]
    if (problem := depth_range_problem(low, high)) is not None:
        raise InvalidRequest(problem, param="max_depth" if options.max_depth is not None else "min_depth")
    if options.format == "png16":
        _units(high)  # refuse the range before the head runs
    if head.most_patches is not None and len(analysed.patches) > head.most_patches:
        raise InvalidRequest(
            f"the input has {len(analysed.patches)} patches, but the head {head.record.name!r} accepts at most "
            f"{head.most_patches}: choose a smaller size",
            param="size",
        )
    metres = head.depth(tokens_of(analysed), (low, high))
    if not np.isfinite(metres).all():
        raise EngineFailed("the depth is not finite")
    depth = _Depth(metres, analysed.size, analysed.crop_box, (low, high), head)
    return depth if options.format == "json" else _file(depth, options)


def _encode(results: Sequence[_Depth | File], options: DepthOptions) -> Answer:
    [depth] = results
    return depth if isinstance(depth, File) else _as_json(depth, options.array)


def _file(depth: _Depth, options: DepthOptions) -> File:
    """Encode the depths at the size of the image.

    Raises:
        InvalidRequest: the image has too many pixels for an array, or no 16-bit PNG holds the largest depth.
    """
    height, width = depth.size
    if options.format == "npy" and height * width > MAX_NUMBERS:
        raise InvalidRequest(
            f"format=npy: the answer would be {height * width:,} numbers ({height} x {width}), but at most "
            f"{MAX_NUMBERS:,} are allowed; use format=png16",
            param="format",
        )
    metres = to_image(depth.metres, depth.size, depth.crop_box)
    if options.format == "npy":
        return npy(metres)
    headers = {"X-Depth-Min": f"{depth.metres.min():.6g}", "X-Depth-Max": f"{depth.metres.max():.6g}"}
    if options.format == "png16":
        units = _units(depth.depth_range[1])
        headers["X-Depth-Units-Per-Metre"] = str(units)
        values = np.empty(metres.shape, np.uint16)
        for rows in _blocks(len(metres)):
            values[rows] = np.minimum(np.rint(metres[rows] * units), _LARGEST_UNIT)
        return png(values)._replace(headers=headers)
    return png(_picture(metres))._replace(headers=headers)


def _as_json(depth: _Depth, array: bool) -> dict[str, Any]:
    record, metres = depth.head.record, depth.metres
    answer: dict[str, Any] = {
        "head": record.name,
        "head_sha256": record.sha256,
        "depth_range": list(depth.depth_range),
        "min": float(metres.min()),
        "max": float(metres.max()),
        "median": float(np.median(metres)),
        "crop_box": depth.crop_box,
        "size": list(depth.size),
    }
    return answer | {"depth": np.ascontiguousarray(metres)} if array else answer


def _picture(metres: Floats) -> npt.NDArray[np.uint8]:
    """Draw depths [H, W] as a picture, uint8 [H, W, 3]. The nearest pixel is light, and the farthest pixel is dark."""
    seen = metres > 0
    high = float(metres.max())
    low = float(metres.min(where=seen, initial=high))
    picture = np.empty((*metres.shape, 3), np.uint8)
    for rows in _blocks(len(metres)):
        picture[rows] = coloured((metres[rows] - low) / max(high - low, 1e-6), "magma_r")
        picture[rows][~seen[rows]] = _UNSEEN
    return picture


def _blocks(height: int) -> Iterator[slice]:
    """Return blocks of rows. The temporary arrays for all rows of a large image would use too much memory."""
    return (slice(start, start + _ROWS_PER_BLOCK) for start in range(0, height, _ROWS_PER_BLOCK))


def _units(largest: float) -> int:
    """Return the units per metre of a 16-bit PNG for depths up to `largest` metres.

    Raises:
        InvalidRequest: the depth is too large for every scale.
    """
    for units in UNITS_PER_METRE:
        if largest * units <= _LARGEST_UNIT:
            return units
    raise InvalidRequest(
        f"max_depth={largest:g}: a 16-bit PNG holds depths up to {_LARGEST_UNIT / UNITS_PER_METRE[-1]:.3f} m; use npy",
        param="format",
    )


TASK: Final = Task(
    name="depth",
    summary="Estimate the depth of each pixel",
    description="""Estimate the distance of each pixel of one image in metres. Send the image in the JSON field `image`,
as a file in a form, or as the raw body. The model needs a depth head: `dinov2 heads add` adds one of Meta's, and
`dinov2 train-head depth` trains one.

`format=json` returns the smallest, the largest and the median depth, and with `array=true` the map of the head.
`format=npy` returns metres as a float32 array of the size of the image. `format=png16` returns a 16-bit PNG in
millimetres, or in 1/256 m if `max_depth` is above 65.535 m. The header `X-Depth-Units-Per-Metre` is 1000 or 256.
`format=png` returns a picture in which near pixels are light and far pixels are dark. Its headers `X-Depth-Min` and
`X-Depth-Max` are the depths of the lightest and the darkest pixel. Pixels that the network does not see are 0 in the
files, and grey in the picture. With `size`, the network sees the whole image.""",
    options=DepthOptions,
    answer=DepthAnswer,
    formats={"json": JSON, "npy": NPY, "png": PNG, "png16": PNG},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
    headers=("X-Depth-Min", "X-Depth-Max", "X-Depth-Units-Per-Metre"),
)
