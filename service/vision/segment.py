"""The task "segment": divide an image into regions, by one of several methods."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple, NotRequired

import numpy as np
import numpy.typing as npt
from pydantic import FailFast, Field
from typing_extensions import TypedDict

from service.answer_schemas import Box, FloatVector, RunLengths, VisionAnswer
from service.errors import EngineFailed, InvalidRequest
from service.features.patches import unit_rows
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import JSON_TEXT, OptionalWhole, Whole
from service.schemas import Body, EmbeddingToo, MaskIn, Side
from service.vision.cluster import MAX_GROUPS, cluster
from service.vision.cut import MAX_PATCHES
from service.vision.foreground import segment_foreground
from service.vision.heads import open_named, outputs_of
from service.vision.linear import segment_linear
from service.vision.mask import coco_rle_encode, overlay_png, png_mask
from service.vision.multi import MAX_OBJECTS, several_cuts
from service.vision.object_score import MIN_SCORE
from service.vision.patch_grid import PatchGrid
from service.vision.pictures import png_bytes
from service.vision.polygons import as_json, polygons
from service.vision.prompt import region_in_box, similar_region
from service.vision.region import box_weights, mask_weights, point_weights
from service.vision.regions import describe_regions, labels_png, pixel_labels, tinted
from service.vision.task import JSON, PNG, Answer, File, Task

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Method = Literal["foreground", "cluster", "cut", "multi", "prompt", "linear"]

MAX_PROMPTS: Final = 16
MAX_POINTS: Final = 64


class PointIn(Body):
    """A point of the image, in pixels of the upright image."""

    x: Side
    y: Side
    positive: bool = Field(True, description="false: the point is not in the region")


class PromptIn(Body):
    """What the user points at: points, a box or a mask, or points together with a box or a mask."""

    points: Annotated[list[PointIn], FailFast()] = Field(default_factory=list, max_length=MAX_POINTS)
    box: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=4, max_length=4, description="[x, y, width, height] in pixels of the upright image"
    )
    mask: MaskIn | None = None


class SegmentOptions(EmbeddingToo):
    """The options of `POST /v1/segment`."""

    method: Method = Field(
        "foreground",
        description="foreground: first principal component; cluster: groups of similar patches; cut: one object, by a "
        "normalised cut; multi: several objects, by repeated cuts; prompt: the regions that `prompts` point at; "
        "linear: the class of each pixel, by a trained segmentation head",
    )
    format: Literal["png", "rle", "polygons", "overlay"] = Field(
        "png",
        description="mask or labels as PNG, masks as COCO RLE in JSON, polygons in JSON, or the image with tinted "
        "regions as PNG",
    )
    k: OptionalWhole = Field(
        None, ge=2, le=MAX_GROUPS, description="cluster: number of groups; default: the best from 2 to 8"
    )
    max_objects: Whole = Field(10, ge=1, le=MAX_OBJECTS, description="multi: highest number of objects")
    min_score: float = Field(
        MIN_SCORE, ge=0, le=1, allow_inf_nan=False, description="cut and multi: lowest score of an object"
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="cut and multi: cosine above which patches are linked; default: computed from the image",
    )
    prompts: Annotated[list[PromptIn], FailFast(), Field(max_length=MAX_PROMPTS), JSON_TEXT] = Field(
        default_factory=list, description="prompt: what to segment; each prompt gives one region"
    )
    connected: bool = Field(
        True,
        description="prompt with points or a mask: true returns only the part at the prompt; false returns all similar "
        "parts of the image",
    )
    head: str | None = Field(
        None,
        max_length=64,
        description="linear: name of the segmentation head; default: the only one that the model has",
    )
    refine: bool | None = Field(
        None, description="let outlines follow the edges of the image; default: true, but false for foreground"
    )
    tolerance: float = Field(
        1.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="polygons: highest distance from the exact outline in pixels",
    )


class Region(TypedDict):
    """A region of an image."""

    label: Annotated[int, Field(description="value of its pixels in the PNG of labels")]
    name: NotRequired[Annotated[str, Field(description="linear: name of the class, which has the number label - 1")]]
    score: NotRequired[Annotated[float, Field(description="how likely it is an object, from 0 to 1")]]
    area: Annotated[int, Field(description="number of pixels")]
    box: Box
    segmentation: NotRequired[RunLengths]
    polygons: NotRequired[Annotated[list[list[int]], Field(description="outlines, each as [x1, y1, x2, y2, ...]")]]
    holes: NotRequired[Annotated[list[list[int]], Field(description="outlines of holes")]]


class SegmentAnswer(VisionAnswer):
    """The answer to `POST /v1/segment` as JSON. `regions` is in the answers of all methods except foreground, and
    `found` in those of cut and multi. `segmentation`, `polygons`, `holes` and `contrast` belong to foreground."""

    segmentation: NotRequired[RunLengths]
    polygons: NotRequired[list[list[int]]]
    holes: NotRequired[list[list[int]]]
    contrast: NotRequired[float]
    found: NotRequired[bool]
    head: NotRequired[Annotated[str, Field(description="linear: name of the head")]]
    regions: NotRequired[list[Region]]
    png: NotRequired[Annotated[str, Field(description="the mask or the labels as a PNG in base64")]]
    overlay: NotRequired[Annotated[str, Field(description="the image with tinted regions, as a PNG in base64")]]
    embedding: NotRequired[FloatVector]
    crop_box: Box


class _Regions(NamedTuple):
    """The label of each pixel of an image, the score of each region if the method has scores, and the other fields of
    the answer."""

    labels: Labels
    scores: list[float] | None
    about: dict[str, Any]
    names: Sequence[str] = ()  # the class of each region, for a head


@dataclass(frozen=True)
class _Segmented:
    """The regions of one image in the requested format, with the numbers that describe them."""

    content: dict[str, Any] | File
    about: dict[str, Any]


def _compute(analysed: Analysed, options: SegmentOptions, model: ServedModel) -> _Segmented:
    """Divide an image into regions.

    Raises:
        EngineFailed: a feature is not finite, or the number of patches does not match the size of the image.
        InvalidRequest: an option does not fit the image.
    """
    if options.method == "foreground":
        return _foreground(analysed, options)
    found = _linear(analysed, options, model) if options.method == "linear" else _label_free(analysed, options, model)
    about = found.about | {"crop_box": list(analysed.crop_box)}
    regions = describe_regions(found.labels, found.scores, options.format, options.tolerance)
    for region in regions if found.names else []:
        region["name"] = found.names[region["label"] - 1]
    if options.format in ("rle", "polygons"):
        return _Segmented({"regions": regions}, about)
    if options.format == "overlay":
        data = png_bytes(tinted(analysed.image, found.labels))
    else:
        data = png_mask(found.labels > 0) if options.method == "cut" else labels_png(found.labels)
    return _Segmented(File(data, PNG), about | {"regions": regions})


def _label_free(analysed: Analysed, options: SegmentOptions, model: ServedModel) -> _Regions:
    grid = PatchGrid.of(analysed.size, analysed.crop_box, analysed.grid)
    features = unit_rows(grid.select(object_features(analysed, model)))
    return _METHODS[options.method](features, grid, analysed, options)


def object_features(analysed: Analysed, model: ServedModel) -> Floats:
    """Return the features by which patches are compared, [N, D]: the keys of the last block."""
    return analysed.outputs[f"keys.{model.config.depth - 1}"][1 + model.config.num_register_tokens :]


def refined_image(analysed: Analysed, options: SegmentOptions) -> npt.NDArray[np.uint8] | None:
    """Return the image, whose edges the outlines then follow, or None if `refine` is false."""
    return None if options.refine is False else analysed.image


def check_patches(features: Floats, method: str) -> None:
    """Check the number of patches, because the time and the memory of a cut grow with its square.

    Raises:
        InvalidRequest: there are too many patches.
    """
    if len(features) > MAX_PATCHES:
        raise InvalidRequest(
            f"the network's input has {len(features):,} patches; method={method} accepts at most {MAX_PATCHES:,}. "
            "Choose a smaller size",
            param="size",
        )


def _foreground(analysed: Analysed, options: SegmentOptions) -> _Segmented:
    try:
        foreground = segment_foreground(analysed.patches, *analysed.size, analysed.spec)
    except ValueError as error:  # the features are wrong: a fault of the engine, not of the image
        raise EngineFailed(f"the engine's features cannot be used: {error}") from error
    mask = foreground.mask
    if options.refine:
        grid = PatchGrid.of(analysed.size, analysed.crop_box, analysed.grid)
        mask = pixel_labels(grid, [foreground.patch_mask[grid.rows, grid.columns]], analysed.image) > 0
    about = {"contrast": foreground.contrast, "crop_box": foreground.crop_box}
    if options.format == "rle":
        return _Segmented({"segmentation": coco_rle_encode(mask)}, about)
    if options.format == "polygons":
        return _Segmented(as_json(polygons(mask, options.tolerance)), about)
    data = png_mask(mask) if options.format == "png" else overlay_png(analysed.image, mask)
    return _Segmented(File(data, PNG), about)


def _cluster(features: Floats, grid: PatchGrid, analysed: Analysed, options: SegmentOptions) -> _Regions:
    groups = cluster(features, options.k).reshape(grid.shape)
    masks = [groups == number for number in range(int(groups.max()) + 1)]
    return _Regions(pixel_labels(grid, masks, refined_image(analysed, options), cover=True), None, {})


def _objects(features: Floats, grid: PatchGrid, analysed: Analysed, options: SegmentOptions) -> _Regions:
    """Find one object (cut) or several objects (multi)."""
    check_patches(features, options.method)
    found = several_cuts(
        features,
        grid.shape,
        max_objects=1 if options.method == "cut" else options.max_objects,
        min_score=options.min_score,
        threshold=options.threshold,
    )
    labels = pixel_labels(grid, [each.mask for each in found], refined_image(analysed, options), one_part=True)
    return _Regions(labels, [each.score for each in found], {"found": bool(labels.any())})


def _prompt(features: Floats, grid: PatchGrid, analysed: Analysed, options: SegmentOptions) -> _Regions:
    masks = [
        _prompted(features, grid, prompt, f"prompts.{index}", options) for index, prompt in enumerate(options.prompts)
    ]
    return _Regions(pixel_labels(grid, masks, refined_image(analysed, options)), None, {})


def _prompted(features: Floats, grid: PatchGrid, prompt: PromptIn, where: str, options: SegmentOptions) -> Mask:
    """Return the patches of the region that a prompt points at, bool [h, w].

    Raises:
        InvalidRequest: the prompt does not fit the image, or has no positive part.
    """
    place = grid.size, grid.crop_box, grid.full
    positive, negative = np.zeros(grid.shape, bool), np.zeros(grid.shape, bool)
    for point in prompt.points:
        weights = point_weights((point.x, point.y), *place, where)
        chosen = positive if point.positive else negative
        row, column = np.argwhere(weights)[0]  # a point in padding belongs to the nearest patch
        inner = (
            np.clip(row - grid.rows.start, 0, grid.shape[0] - 1),
            np.clip(column - grid.columns.start, 0, grid.shape[1] - 1),
        )
        chosen[inner] = True
    if prompt.box is not None and prompt.mask is not None:
        raise InvalidRequest(f"{where}: either box or mask, not both", param="prompts")
    if prompt.box is not None:
        x, y, width, height = prompt.box
        inside = grid.crop_weights(box_weights((x, y, width, height), *place[1:], grid.size, where))
        return region_in_box(features, _half_covered(inside), positive, negative)
    if prompt.mask is not None:
        positive |= _half_covered(grid.crop_weights(mask_weights(prompt.mask.model_dump(), *place, where)))
    if not (positive & ~negative).any():
        raise InvalidRequest(f"{where}: a positive point, a box or a mask is needed", param="prompts")
    return similar_region(features, positive & ~negative, negative, connected=options.connected)


def _half_covered(shares: Floats) -> Mask:
    """Return the patches that are at least half covered. If there are none, return those that are covered the most."""
    return np.asarray(shares >= min(0.5, float(shares.max())))


def _linear(analysed: Analysed, options: SegmentOptions, model: ServedModel) -> _Regions:
    head = open_named(model, "segmentation", options.head)
    return _Regions(segment_linear(head, analysed), None, {"head": head.record.name}, head.record.classes)


_METHODS: Final[dict[str, Callable[[Floats, PatchGrid, Analysed, SegmentOptions], _Regions]]] = {
    "cluster": _cluster,
    "cut": _objects,
    "multi": _objects,
    "prompt": _prompt,
}

_BELONGS_TO: Final = {
    "head": ("linear",),
    "refine": ("foreground", "cluster", "cut", "multi", "prompt"),
    "k": ("cluster",),
    "max_objects": ("multi",),
    "min_score": ("cut", "multi"),
    "threshold": ("cut", "multi"),
    "prompts": ("prompt",),
    "connected": ("prompt",),
}


def _outputs(options: SegmentOptions, model: ServedModel) -> Iterable[str]:
    """Return the inner outputs that the method needs.

    Raises:
        InvalidRequest: an option does not belong to the method, or one that it needs is missing.
    """
    for name, methods in _BELONGS_TO.items():
        if name in options.model_fields_set and options.method not in methods:
            raise InvalidRequest(
                f"{name} has no effect with method={options.method}; it belongs to method={' and '.join(methods)}",
                param=name,
            )
    if options.method == "prompt" and not options.prompts:
        raise InvalidRequest("method=prompt needs prompts: a list of objects with points, box or mask", param="prompts")
    if options.method == "linear":
        return outputs_of(model, "segmentation", options.head)
    return () if options.method == "foreground" else (f"keys.{model.config.depth - 1}",)


def _encode(results: Sequence[_Segmented], options: SegmentOptions) -> Answer:
    [segmented] = results
    if isinstance(segmented.content, File):
        return segmented.content._replace(fields=segmented.about)
    return segmented.content | segmented.about


TASK: Final = Task(
    name="segment",
    summary="Segment an image",
    description="""Divide one image into regions. Send the image in the JSON field `image`, as a file in
a form, or as the raw body.

`method` is `foreground` (the object against its background), `cluster` (groups of similar patches), `cut` (one object),
`multi` (several objects), `prompt` (the regions that `prompts` point at) or `linear` (the class of each pixel, by a
trained segmentation head of the model; all other methods need no labels). `cut` and `multi` give each object a score
from 0 to 1. If no object reaches `min_score`, `found` is false, and the mask is empty.

`format=png` returns a PNG of the size of the upright image: for `foreground` and `cut` a mask with the values 0 and
255, for other methods the label of each pixel. `format=overlay` returns the image as a PNG with the regions tinted.
`format=rle` and `format=polygons` return JSON with COCO run lengths or polygons. With `include=embedding`, the answer
is JSON for every format. It also contains the embedding of the image, and a PNG is encoded as a base64 string.""",
    options=SegmentOptions,
    answer=SegmentAnswer,
    formats={"png": PNG, "rle": JSON, "polygons": JSON, "overlay": PNG},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
)
