"""The task "features": return the features of all patches of one or more images, or show them as colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field
from typing_extensions import TypedDict

from model.config import ViTConfig
from service.answer_schemas import Box, VisionAnswer
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import DocumentedAs
from service.schemas import VisionOptions
from service.vision.foreground import segment_foreground
from service.vision.indices import Indices, chosen
from service.vision.patch_colours import Shown, draw_colours, joint_colours, thumbnail_size
from service.vision.region import image_weights
from service.vision.task import JSON, NPY, PNG, Answer, Task, npy, png

Floats = npt.NDArray[np.float32]

MAX_IMAGES: Final = 16
MAX_JSON_NUMBERS: Final = 2**22
MAX_NUMBERS: Final = 2**25  # in an array


class FeaturesOptions(VisionOptions):
    """The options of `POST /v1/features`."""

    format: Literal["json", "pca", "npy", "pca_npy"] = Field(
        "json",
        description="features as JSON; a picture as PNG, in which similar patches have similar colours; features as an "
        "array in numpy's format; or the colours of the patches as an array in numpy's format",
    )
    layers: Indices = Field(
        None, description="numbers of the blocks whose output is returned, or all; default: the last block"
    )
    norm: bool = Field(True, description="apply the network's final norm to the features")
    foreground: bool = Field(
        False, description="show only the foreground for format=pca and format=pca_npy; the background becomes black"
    )
    show_images: bool = Field(False, description="show each image above its colours for format=pca")


class ImageFeatures(TypedDict):
    """The features of one image."""

    index: int
    grid: Annotated[list[int], Field(description="number of patches down and across")]
    crop_box: Box
    features: Annotated[
        Any,
        DocumentedAs(list[list[list[float]]] | list[list[list[list[float]]]]),
        Field(description="[h, w, D], or [layers, h, w, D] if the request has layers"),
    ]


class FeaturesAnswer(VisionAnswer):
    """The answer to `POST /v1/features` as JSON."""

    data: list[ImageFeatures]
    layers: Annotated[list[int], Field(description="numbers of the blocks, in the order of the features")]


@dataclass(frozen=True)
class _Features:
    """The features [L, h, w, D] of one image from L layers. `shown` is set if the request asks for colours."""

    features: Floats
    crop_box: tuple[float, float, float, float]
    layers: list[int]
    shown: Shown | None

    @property
    def grid(self) -> tuple[int, int]:
        return self.features.shape[1], self.features.shape[2]


def _layers(options: FeaturesOptions, config: ViTConfig) -> list[int]:
    """Return the numbers of the chosen blocks.

    Raises:
        InvalidRequest: the model has no such block, or the options contradict each other.
    """
    layers = chosen([-1] if options.layers is None else options.layers, config.depth, "layers")
    coloured = options.format in ("pca", "pca_npy")
    if coloured and len(layers) > 1:
        raise InvalidRequest(f"format={options.format} shows one layer, not {len(layers)}", param="layers")
    if options.foreground and not coloured:
        raise InvalidRequest(
            f"foreground=true needs format=pca or format=pca_npy, not format={options.format}", param="foreground"
        )
    if options.show_images and options.format != "pca":
        raise InvalidRequest(f"show_images=true needs format=pca, not format={options.format}", param="show_images")
    return layers


def _outputs(options: FeaturesOptions, model: ServedModel) -> list[str]:
    """Return the inner outputs that a request needs. The normed features of the last block are not an inner output:
    every forward pass returns them."""
    return [f"tokens.{i}" for i in _layers(options, model.config) if not (options.norm and i == model.config.depth - 1)]


def _compute(analysed: Analysed, options: FeaturesOptions, model: ServedModel) -> _Features:
    """Collect the features of an image, and the data for its picture.

    Raises:
        InvalidRequest: the answer would be too large.
        EngineFailed: a feature is not finite.
    """
    layers = _layers(options, model.config)
    _check_amount(len(layers) * analysed.patches.size, options)
    first = 1 + model.config.num_register_tokens
    rows = []
    for layer in layers:
        tokens = analysed.outputs.get(f"tokens.{layer}")
        if tokens is None:
            rows.append(analysed.patches)
        else:
            rows.append(model.norm(tokens[first:]) if options.norm else tokens[first:])
    features = np.stack(rows).reshape(len(layers), *analysed.grid, -1)
    shown = _shown(analysed, options) if options.format in ("pca", "pca_npy") else None
    return _Features(features, analysed.crop_box, layers, shown)


def _check_amount(amount: int, options: FeaturesOptions) -> None:
    """Raise InvalidRequest if the features of a request have too many numbers."""
    most = MAX_JSON_NUMBERS if options.format == "json" else MAX_NUMBERS
    if amount > most:
        raise InvalidRequest(
            f"format={options.format}: the features have {amount:,} numbers, but at most {most:,} are allowed; choose "
            "fewer layers or images, or a smaller size",
            param="format",
        )


def _shown(analysed: Analysed, options: FeaturesOptions) -> Shown:
    """Return the data for an image's picture. Patches that show mostly padding are not used."""
    shares = image_weights(analysed.size, analysed.crop_box, analysed.grid)
    used = shares >= shares.max() / 2
    scores = image = None
    if options.foreground:
        try:
            found = segment_foreground(analysed.patches, *analysed.size, analysed.spec)
        except ValueError as error:  # the features are wrong: a fault of the engine, not of the image
            raise EngineFailed(f"the engine's features cannot be used: {error}") from error
        scores, used = found.scores, found.patch_mask
    if options.show_images:
        height, width = thumbnail_size(analysed.size)
        image = np.asarray(Image.fromarray(analysed.image).resize((width, height), Image.Resampling.BICUBIC))
    return Shown(analysed.size, analysed.crop_box, used, scores, image)


def _encode(results: Sequence[_Features], options: FeaturesOptions) -> Answer:
    """Make the answer from the features of all images.

    Raises:
        InvalidRequest: the answer would be too large, or the images have different grids and cannot become one array.
        EngineFailed: a feature is not finite.
    """
    _check_amount(sum(each.features.size for each in results), options)
    if options.format in ("pca", "pca_npy"):
        return _coloured(results, options)
    features = [each.features if options.layers is not None else each.features[0] for each in results]
    if options.format == "npy":
        return npy(_one_array(features, results, options))
    data = [
        {"index": index, "grid": list(each.grid), "crop_box": each.crop_box, "features": array}
        for index, (each, array) in enumerate(zip(results, features, strict=True))
    ]
    return {"data": data, "layers": results[0].layers}


def _coloured(results: Sequence[_Features], options: FeaturesOptions) -> Answer:
    """Return the colours of all images as a picture or an array."""
    shown = [each.shown for each in results if each.shown is not None]
    try:
        colours = joint_colours([each.features[0] for each in results], [each.used for each in shown])
    except ValueError as error:  # the features are wrong: a fault of the engine, not of the image
        raise EngineFailed(f"the engine's features cannot be used: {error}") from error
    if options.format == "pca":
        return png(draw_colours(colours, shown))
    if options.foreground:
        for array, each in zip(colours, shown, strict=True):
            array[~each.used] = 0
    return npy(_one_array(colours, results, options))


def _one_array(arrays: Sequence[Floats], results: Sequence[_Features], options: FeaturesOptions) -> Floats:
    """Return the array of a single image, or the arrays of several images stacked along a new first axis.

    Raises:
        InvalidRequest: the images have different grids.
    """
    if len(arrays) == 1:
        return arrays[0]
    grids = sorted({each.grid for each in results})
    if len(grids) > 1:
        shown = " and ".join(f"{h} x {w}" for h, w in grids[:2])
        raise InvalidRequest(
            f"format={options.format}: the images have different grids ({shown} patches), which do not fit into one "
            "array; send images of one aspect ratio, send them one by one, or leave out size",
            param="format",
        )
    return np.stack(arrays)


TASK: Final = Task(
    name="features",
    summary="Return patch features or show them as colours",
    description="""Return the features of all patches of 1 to 16 images, after the last block or after chosen blocks.
Send the images in the JSON field `images`, as files in a form, or one image as the raw body.

`format=json` returns an array [h, w, D] for each image, and `format=npy` returns this array in numpy's format, or
[images, h, w, D] for several images. If the request has `layers`, an axis for the layers comes before h.

`format=pca` returns a picture: the first three principal components of all patches as red, green and blue. Similar
patches have similar colours, even in different images of one request. `format=pca_npy` returns these colours, from 0 to
1, as an array [h, w, 3] or [images, h, w, 3].""",
    options=FeaturesOptions,
    answer=FeaturesAnswer,
    formats={"json": JSON, "pca": PNG, "npy": NPY, "pca_npy": NPY},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
    images=(1, MAX_IMAGES),
)
