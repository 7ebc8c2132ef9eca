"""The task "match": find the patches of two images that correspond.

Two patches correspond if each is the other's nearest neighbour among all patches of the other image, by the cosine of
their features (`service/vision/maxsim.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydantic import FailFast, Field
from typing_extensions import TypedDict

from service.answer_schemas import Box, VisionAnswer
from service.features.patches import unit_rows
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import JSON_TEXT, DocumentedAs, Whole
from service.schemas import Body, MaskIn, Side, VisionOptions
from service.vision.maxsim import Match, maxsim_matches
from service.vision.pictures import coloured
from service.vision.positional_bias import basis_of, without_bias
from service.vision.region import image_weights, patch_box, region_weights
from service.vision.task import JSON, PNG, Answer, Task, png

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

MAX_MATCHES: Final = 1000
_DRAWN_SIDE: Final = 640
_GAP: Final = 8
Point = Annotated[Any, DocumentedAs(Annotated[list[float], Field(min_length=2, max_length=2)])]
"""[x, y] in pixels of the upright image."""


class MatchRegionIn(Body):
    """A region of the first image. It has exactly one of `box`, `mask` and `point`."""

    box: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=4, max_length=4, description="[x, y, width, height] in pixels of the upright image"
    )
    mask: MaskIn | None = None
    point: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=2, max_length=2, description="[x, y] in pixels of the upright image: the patch there"
    )


class MatchOptions(VisionOptions):
    """The options of `POST /v1/match`."""

    format: Literal["json", "png"] = Field(
        "json", description="list of matches, or both images side by side with a line for each match"
    )
    region: Annotated[MatchRegionIn | None, JSON_TEXT] = Field(
        None, description="region of the first image: match only the patches in it"
    )
    limit: Whole = Field(100, ge=1, le=MAX_MATCHES, description="highest number of matches; the best come first")
    min_score: float = Field(0.0, ge=-1, le=1, allow_inf_nan=False, description="lowest cosine similarity of a match")
    debias: bool = Field(False, description="remove the part of the features that depends on the position of a patch")


class PatchPair(TypedDict):
    """Two patches that correspond. Each list has two elements: one for the first image and one for the second."""

    points: Annotated[list[Point], Field(description="centres of the two patches, [x, y] in pixels")]
    boxes: Annotated[list[Box], Field(description="the two patches, [x, y, width, height] in pixels")]
    score: Annotated[float, Field(description="cosine similarity of the two patches")]


class MatchAnswer(VisionAnswer):
    """The answer to `POST /v1/match` as JSON."""

    matches: list[PatchPair]
    total: Annotated[int, Field(description="number of matches that reach min_score, including those beyond limit")]
    score: Annotated[
        float, Field(description="mean, over the patches of the first image or region, of the best cosine similarity")
    ]
    crop_boxes: Annotated[list[Box], Field(description="the part of each image that the network sees")]


@dataclass(frozen=True)
class _Side:
    """The data of one of the two images that matching needs.

    rows: the patch features, float32 [N, D] with rows of length 1. The rows of patches that show only padding are zero.
    shares: the fraction of each patch that shows the image, float32 [h, w].
    picture: the image reduced in size, uint8 [height, width, 3], or None if no picture is drawn.
    """

    rows: Floats
    shares: Floats
    grid: tuple[int, int]
    size: tuple[int, int]
    crop_box: tuple[float, float, float, float]
    picture: Pixels | None

    def centre(self, patch: int) -> list[float]:
        x, y, width, height = patch_box(patch, self.grid, self.crop_box)
        return [round(x + width / 2, 2), round(y + height / 2, 2)]


def _compute(analysed: Analysed, options: MatchOptions, model: ServedModel) -> _Side:
    rows = unit_rows(analysed.patches)
    if options.debias:
        rows = unit_rows(without_bias(rows, basis_of(model, analysed.grid)))
    shares = image_weights(analysed.size, analysed.crop_box, analysed.grid)
    if shares.min() <= 0:
        rows = rows * (shares.ravel() > 0)[:, None]
    picture = _reduced(analysed.image) if options.format == "png" else None
    return _Side(rows, shares, analysed.grid, analysed.size, analysed.crop_box, picture)


def _encode(sides: Sequence[_Side], options: MatchOptions) -> Answer:
    """Match the two images and encode the matches.

    Raises:
        InvalidRequest: the region does not fit the first image.
    """
    first, second = sides
    weights = first.shares
    if options.region is not None:
        region = options.region.model_dump(exclude_none=True)
        weights = region_weights(region, first.size, first.crop_box, first.grid)
    score, found = maxsim_matches(first.rows, second.rows, weights.ravel(), limit=len(first.rows))
    kept = [match for match in found if match.score >= options.min_score and second.shares.flat[match.candidate] > 0]
    shown = kept[: options.limit]
    if options.format == "png":
        return png(_drawn(first, second, shown))
    return {
        "matches": [_pair(first, second, match) for match in shown],
        "total": len(kept),
        "score": score,
        "crop_boxes": [first.crop_box, second.crop_box],
    }


def _pair(first: _Side, second: _Side, match: Match) -> PatchPair:
    patches = ((first, match.query), (second, match.candidate))
    return {
        "points": [side.centre(patch) for side, patch in patches],
        "boxes": [patch_box(patch, side.grid, side.crop_box) for side, patch in patches],
        "score": match.score,
    }


def _reduced(image: Pixels) -> Pixels:
    """Return an image whose long side has at most `_DRAWN_SIDE` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((_DRAWN_SIDE, _DRAWN_SIDE))
    return np.asarray(picture)


def _drawn(first: _Side, second: _Side, matches: Sequence[Match]) -> Pixels:
    """Draw both images side by side, with a line for each match, the best on top. The colour of a line shows its score,
    from yellow (the highest score of these matches) to dark blue (the lowest)."""
    assert first.picture is not None
    assert second.picture is not None
    left = first.picture.shape[1] + _GAP
    height = max(first.picture.shape[0], second.picture.shape[0])
    canvas = Image.new("RGB", (left + second.picture.shape[1], height), (255, 255, 255))
    canvas.paste(Image.fromarray(first.picture), (0, 0))
    canvas.paste(Image.fromarray(second.picture), (left, 0))
    draw = ImageDraw.Draw(canvas)
    colours = coloured(_heights([match.score for match in matches]))
    for match, colour in reversed(list(zip(matches, colours.tolist(), strict=True))):
        start = _on_picture(first, match.query, 0)
        end = _on_picture(second, match.candidate, left)
        draw.line([*start, *end], fill=tuple(colour), width=2)
        for x, y in (start, end):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=tuple(colour))
    return np.asarray(canvas)


def _heights(scores: list[float]) -> Floats:
    """Scale scores linearly, so that the highest becomes 1 and the lowest becomes 0. `scores` is sorted from high to
    low."""
    values = np.asarray(scores, np.float32)
    spread = float(values[0] - values[-1]) if len(values) else 0.0
    return np.ones_like(values) if spread <= 0 else (values - values[-1]) / np.float32(spread)


def _on_picture(side: _Side, patch: int, left: int) -> tuple[float, float]:
    """Return the centre of a patch (x, y) on the drawing, on which the reduced image begins at x = `left`."""
    assert side.picture is not None
    x, y = side.centre(patch)
    return left + x * side.picture.shape[1] / side.size[1], y * side.picture.shape[0] / side.size[0]


TASK: Final = Task(
    name="match",
    summary="Find the parts of two images that correspond",
    description="""Find the patches of two images that correspond: each is the other's nearest neighbour by cosine
similarity. Send two images in the JSON field `images`, or as two files in a form.

`region` restricts the matches to a box, a mask or the patch at a point of the first image. `format=json` returns the
centres and the boxes of the patches in pixels, best match first. `format=png` draws both images side by side, with a
line for each match. With `debias`, the part of the features that depends only on the position of a patch is removed
first.""",
    options=MatchOptions,
    answer=MatchAnswer,
    formats={"json": JSON, "png": PNG},
    compute=_compute,
    encode=_encode,
    images=(2, 2),
)
