"""The task "attention": show which patches the class token attends to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from model.config import ViTConfig
from service.answer_schemas import Box, VisionAnswer
from service.errors import InvalidRequest
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import DocumentedAs
from service.schemas import VisionOptions
from service.vision.attention_figure import Cell, draw_figure, figure_size, layout, seen_image
from service.vision.attention_maps import (
    HeadFusion,
    PatchAttention,
    class_weights,
    entropy,
    fuse_heads,
    patch_attention,
    renormalised,
    rollout,
    stretched,
    top_mass,
)
from service.vision.indices import ALL, Indices, chosen
from service.vision.mask import overlay_png
from service.vision.pictures import ColourMap, blend, coloured, to_image
from service.vision.task import JSON, NPY, PNG, Answer, File, Task, npy, png

Floats = npt.NDArray[np.float32]

MAX_JSON_NUMBERS: Final = 2**21
MAX_NUMBERS: Final = 2**25  # in an array
MAX_PIXELS: Final = 2**26  # of a picture
SHARED_TOP: Final = 0.99
"""The quantile of all weights that gets the last colour of a figure with one range for all maps. The few higher weights
would leave little contrast for the others."""

_ROWS: Final = 256


class AttentionOptions(VisionOptions):
    """The options of `POST /v1/attention`."""

    format: Literal["json", "figure", "overlay", "png", "npy"] = Field(
        "json",
        description="maps and numbers about them as JSON; a figure of all maps with a colour bar as PNG; one map over "
        "the image as PNG; one map as grey PNG; or all maps as an array in numpy's format",
    )
    blocks: Indices = Field(
        None, description="numbers of the blocks, or all; default: the last block, and all blocks for format=figure"
    )
    heads: Indices = Field(ALL, description="numbers of the heads, or all")
    fuse_heads: Literal["none", "mean", "max", "min"] | None = Field(
        None,
        description="how the maps of the heads become one; default: none, and mean for format=png, format=overlay and "
        "fuse_blocks=rollout",
    )
    fuse_blocks: Literal["none", "rollout"] = Field(
        "none", description="how the maps of the blocks become one: rollout follows the attention through all blocks"
    )
    values: Literal["raw", "sum", "range"] = Field(
        "raw",
        description="what the maps contain: the weights (raw), which sum to less than 1, because the class token and "
        "the registers have the rest; the weights scaled to sum 1 (sum); or the weights scaled from 0 to 1 (range)",
    )
    mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="mark the smallest set of patches that holds this share of the weight, instead of showing weights",
    )
    resolution: Literal["grid", "image"] = Field(
        "grid", description="size of the maps for format=npy: one number per patch (grid) or per pixel (image)"
    )
    scale: Literal["each", "shared"] = Field(
        "each", description="range of the colours for format=figure: one for each map, or one shared by all maps"
    )
    colormap: ColourMap | None = Field(
        None, description="colours; default: viridis for format=figure, turbo for format=overlay"
    )
    opacity: float = Field(0.85, ge=0, le=1, description="opacity of the highest weight for format=overlay")


Numbers = Annotated[Any, DocumentedAs(list[list[float]])]


class AttentionAnswer(VisionAnswer):
    """The answer to `POST /v1/attention` as JSON. The nested lists have one element per block, or one element if the
    blocks are fused. Each of these has one element per head, or one element if the heads are fused."""

    blocks: Annotated[list[int], Field(description="numbers of the blocks, in the order of the maps")]
    heads: Annotated[list[int], Field(description="numbers of the heads, in the order of the maps")]
    fuse_heads: Literal["none", "mean", "max", "min"]
    grid: Annotated[list[int], Field(description="number of patches down and across")]
    crop_box: Box
    maps: Annotated[
        Any, DocumentedAs(list[list[list[list[float]]]]), Field(description="per block and head, the rows of the grid")
    ]
    entropy: Annotated[Numbers, Field(description="entropy of each map in nats, after scaling it to sum 1")]
    class_share: Annotated[Numbers, Field(description="share of the weight that the class token gives to itself")]
    register_share: Annotated[Numbers, Field(description="share of the weight of all registers")]


class _Selection(NamedTuple):
    """The blocks and heads that a request selects. `fusion` is None if the heads are not fused."""

    blocks: list[int]
    heads: list[int]
    fusion: HeadFusion | None
    rollout: bool

    @property
    def maps(self) -> tuple[int, int]:
        """The number of maps, as (blocks, heads)."""
        return 1 if self.rollout else len(self.blocks), 1 if self.fusion else len(self.heads)


@dataclass(frozen=True)
class _Attention:
    """The result for one image. `content` is an encoded picture, or an array of maps, [blocks, heads, h, w] or [blocks,
    heads, H, W]."""

    content: File | npt.NDArray[Any]
    about: dict[str, Any]


def _selection(options: AttentionOptions, config: ViTConfig) -> _Selection:
    """Return the blocks and heads that the options select, and how they are fused.

    Raises:
        InvalidRequest: the model has no such block or head, or the options contradict each other.
    """
    rolled = options.fuse_blocks == "rollout"
    if rolled and options.blocks not in (None, ALL):
        raise InvalidRequest(
            f"blocks={options.blocks}: fuse_blocks=rollout uses all blocks, so leave out blocks", param="blocks"
        )
    one_map = options.format in ("png", "overlay")
    fuse = options.fuse_heads or ("mean" if rolled or one_map else "none")
    if rolled and fuse == "none":
        raise InvalidRequest(
            "fuse_heads=none: fuse_blocks=rollout needs fuse_heads mean, max or min", param="fuse_heads"
        )
    every_block = rolled or (options.blocks is None and options.format == "figure")
    selection = _Selection(
        chosen(ALL if every_block else [-1] if options.blocks is None else options.blocks, config.depth, "blocks"),
        chosen(options.heads, config.num_heads, "heads"),
        None if fuse == "none" else fuse,
        rolled,
    )
    blocks, heads = selection.maps
    if one_map and blocks * heads != 1:
        raise InvalidRequest(
            f"format={options.format} shows one map, but blocks and heads select {blocks} x {heads}; choose one block "
            "and one head, or fuse them; format=figure shows all maps",
            param="format",
        )
    return selection


def _outputs(options: AttentionOptions, model: ServedModel) -> list[str]:
    if options.resolution == "image" and options.format != "npy":
        raise InvalidRequest(f"resolution=image needs format=npy, not format={options.format}", param="resolution")
    return [f"{name}.{block}" for block in _selection(options, model.config).blocks for name in ("queries", "keys")]


def _compute(analysed: Analysed, options: AttentionOptions, model: ServedModel) -> _Attention:
    """Compute the maps of an image, and draw the picture that the options ask for.

    Raises:
        InvalidRequest: the answer would be too large.
    """
    selection = _selection(options, model.config)
    _check_amount(selection, analysed, options)
    attention = patch_attention(_weights(analysed, selection, model.config), model.config.num_register_tokens)
    about = {
        "blocks": selection.blocks,
        "heads": selection.heads,
        "fuse_heads": selection.fusion or "none",
        "grid": list(analysed.grid),
        "crop_box": analysed.crop_box,
        "entropy": entropy(attention.patches),
        "class_share": attention.class_share,
        "register_share": attention.register_share,
    }
    content: File | npt.NDArray[Any]
    if options.format == "figure":
        content = png(_figure(attention, selection, analysed, options, model))
    elif options.format in ("png", "overlay"):
        content = _picture(attention.patches[0, 0], analysed, options)
    else:
        content = _scaled(attention.patches, options)
        content = content.reshape(*content.shape[:2], *analysed.grid)
        if options.resolution == "image":
            content = np.stack([[_enlarged(each, analysed, options) for each in row] for row in content])
    return _Attention(content, about)


def _check_amount(selection: _Selection, analysed: Analysed, options: AttentionOptions) -> None:
    """Raise InvalidRequest if the answer would have too many numbers or pixels."""
    blocks, heads = selection.maps
    at_image_size = options.format in ("png", "overlay") or options.resolution == "image"
    size = analysed.size if at_image_size else analysed.grid
    amount = blocks * heads * size[0] * size[1]
    what = f"{blocks} x {heads} maps of {size[0]} x {size[1]}"
    if options.format == "figure":
        height, width = figure_size(_layout(selection, analysed))
        amount, what = height * width, f"a figure of {height} x {width} pixels"
    most = {"json": MAX_JSON_NUMBERS, "npy": MAX_NUMBERS}.get(options.format, MAX_PIXELS)
    if amount > most:
        raise InvalidRequest(
            f"format={options.format}: the answer would be {what}, {amount:,} numbers, but at most {most:,} are "
            "allowed; choose fewer blocks or heads, or fuse them",
            param="format",
        )


def _weights(analysed: Analysed, selection: _Selection, config: ViTConfig) -> Floats:
    """Return the class token's weights, float32 [blocks, heads, T]. The size of the axis of fused blocks or heads is
    1."""
    outputs, heads = analysed.outputs, selection.heads
    if selection.rollout:
        assert selection.fusion is not None
        return rollout(outputs, config.depth, config.num_heads, heads, selection.fusion)[None, None]
    weights = np.stack(
        [
            class_weights(outputs[f"queries.{i}"], outputs[f"keys.{i}"], config.num_heads, heads)
            for i in selection.blocks
        ]
    )
    return weights if selection.fusion is None else fuse_heads(weights, selection.fusion)


def _scaled(maps: Floats, options: AttentionOptions) -> npt.NDArray[Any]:
    """Scale maps [..., N] as the option `values` says. If the option `mass` is set, return 1 for marked patches and 0
    for others, as uint8, instead."""
    if options.mass is not None:
        return top_mass(maps, options.mass).astype(np.uint8)
    if options.values == "raw":
        return np.ascontiguousarray(maps)
    return renormalised(maps) if options.values == "sum" else stretched(maps)


def _enlarged(values: npt.NDArray[Any], analysed: Analysed, options: AttentionOptions) -> npt.NDArray[Any]:
    """Enlarge a map [h, w] to the size of the image, [H, W]. Pixels that the network does not see are 0."""
    if options.mass is not None:
        return (to_image(values, analysed.size, analysed.crop_box) >= 0.5).astype(np.uint8)
    if options.values != "range":
        return to_image(values, analysed.size, analysed.crop_box)
    enlarged = to_image(values, analysed.size, analysed.crop_box, outside=np.nan)
    low, high = np.nanmin(enlarged), np.nanmax(enlarged)  # between the centres of the patches, 0 and 1 may not occur
    enlarged -= low
    enlarged /= high - low if high > low else 1
    return np.nan_to_num(enlarged, copy=False)


def _picture(weights: Floats, analysed: Analysed, options: AttentionOptions) -> File:
    """Draw one map [N] at the size of the image: as a grey image, or over the image."""
    ranged = options.model_copy(update={"values": "range"})
    enlarged = _enlarged(_scaled(weights, ranged).reshape(analysed.grid), analysed, ranged)
    if options.format == "overlay" and options.mass is not None:
        return File(overlay_png(analysed.image, enlarged.astype(bool)), PNG)
    drawn = np.empty(analysed.size if options.format == "png" else analysed.image.shape, np.uint8)
    for start in range(0, len(drawn), _ROWS):  # the floats of all pixels would use too much memory
        rows = slice(start, start + _ROWS)
        if options.format == "png":
            drawn[rows] = np.rint(enlarged[rows] * 255)
        else:
            opacity = options.opacity * np.sqrt(enlarged[rows])[:, :, None]  # a low weight leaves the image visible
            drawn[rows] = blend(analysed.image[rows], coloured(enlarged[rows], options.colormap or "turbo"), opacity)
    return png(drawn)


def _layout(selection: _Selection, analysed: Analysed) -> Any:
    blocks, heads = selection.maps
    _, _, width, height = analysed.crop_box
    return layout(blocks * heads, heads if heads > 1 else None, width / height)


def _figure(
    attention: PatchAttention,
    selection: _Selection,
    analysed: Analysed,
    options: AttentionOptions,
    model: ServedModel,
) -> npt.NDArray[np.uint8]:
    """Draw all maps in one figure."""
    h, w = analysed.grid
    parts = [f"{model.artifact.name}: attention of the class token to {h} x {w} patches"]
    if selection.rollout:
        parts.append("rollout over all blocks")
    if selection.fusion:
        parts.append(f"{selection.fusion} of head{'s' if len(selection.heads) > 1 else ''} {_listed(selection.heads)}")
    weights = renormalised(attention.patches) if options.values == "sum" else attention.patches
    if options.mass is not None:
        parts.append(f"the smallest set of patches with {options.mass:.3g} of the weight")
        maps, ticks = top_mass(weights, options.mass).astype(np.float32), ["other", "in the set"]
    elif options.scale == "shared":
        parts.append("one range for all maps")
        top = float(np.quantile(weights, SHARED_TOP)) or 1.0
        maps, ticks = weights / np.float32(top), [f"{25 * i * top:.3g} %" for i in range(5)]
        ticks[-1] = f">= {ticks[-1]}"
    else:
        parts.append("each map has its own range")
        maps, ticks = stretched(weights), ["lowest", "highest"]
    blocks = ["rollout"] if selection.rollout else [f"block {block}" for block in selection.blocks]
    heads = [""] if selection.fusion else [f", head {head}" for head in selection.heads]
    labels = [block + head for block in blocks for head in heads]
    cells = [Cell(label, each) for label, each in zip(labels, maps.reshape(-1, h, w), strict=True)]
    plan = _layout(selection, analysed)
    image = seen_image(analysed.image, analysed.crop_box, plan)
    colours, binary = options.colormap or "viridis", options.mass is not None
    return draw_figure(cells, image, plan, title=", ".join(parts), ticks=ticks, colours=colours, binary=binary)


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as a short text, for example `0 to 5` or `1, 3`."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _encode(results: Sequence[_Attention], options: AttentionOptions) -> Answer:
    [attention] = results
    if isinstance(attention.content, File):
        return attention.content._replace(fields=attention.about)
    if options.format == "npy":
        return npy(attention.content)._replace(fields=attention.about)
    return {"maps": attention.content, **attention.about}


TASK: Final = Task(
    name="attention",
    summary="Show where the class token attends",
    description="""Compute how much weight the class token of one image gives to each patch, in any block and head. Send
the image in the JSON field `image`, as a file in a form, or as the raw body.

`format=json` returns the maps and numbers about them. `format=npy` returns the maps as an array [blocks, heads, h, w]
in numpy's format. `format=png` returns one map as a grey image, and `format=overlay` returns one map over the image,
both at the size of the image. `format=figure` returns a figure of all maps with a colour bar.""",
    options=AttentionOptions,
    answer=AttentionAnswer,
    formats={"json": JSON, "figure": PNG, "overlay": PNG, "png": PNG, "npy": NPY},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
)
