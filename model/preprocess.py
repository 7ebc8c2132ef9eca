"""Converts images to the network's input. Evaluation, export and the service share this preprocessing.

DINOv2's evaluation transform (facebookresearch/dinov2, `dinov2/data/transforms.py`) uses torchvision. It resizes the
short side to 256 pixels (bicubic, with Pillow), crops the central 224 x 224 pixels, scales to [0, 1], subtracts
ImageNet's mean and divides by its standard deviation. Features depend on each of these steps, so this module reproduces
them pixel by pixel. It uses neither torch nor torchvision, because the service does not load them.
`tests/model/test_preprocess.py` compares the result with that of Hugging Face's image processor, which differs in one
detail: if a crop margin is not a whole number of pixels, the processor rounds it down, whereas torchvision and this
module round it to the nearest even number.

`preprocess` is fast because it crops before it converts to float, and because the conversion is a table lookup. A
channel has only 256 values, so `(value / 255 - mean) / std` is computed once per value, without loss. Pillow's own
shortcuts (`box=`, `reducing_gap=`, JPEG draft mode) are not used, because they change pixels.

There are three ways to fit an image that is not square into a square input (`Fit`). DINOv2 itself only crops.

Legend: H, W height and width of the image; h, w height and width of the network's input; p the patch size; all in
pixels. Sizes are (height, width).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from model.messages import in_words

if TYPE_CHECKING:  # `dinov2 models` imports this module, because each manifest contains a `PreprocessSpec`
    import numpy as np
    import numpy.typing as npt

MAX_ASPECT_RATIO = 100.0
"""The maximum ratio of an image's long side to its short side.

Beyond this ratio, the resized image would waste memory and show nothing.
"""

Triple = tuple[float, float, float]
Fit = Literal["crop", "pad", "squash"]
"""How an image that is not square becomes a square.

crop    The short side is resized, and the centre is cut out. The rest of the image is lost.
pad     The long side is resized to the side of the square. The rest of the square is filled with the mean colour.
squash  Both sides are resized to the side of the square, so the aspect ratio changes.
"""


class PreprocessSpec(BaseModel):
    """The settings of the transform from an image to the network's input. They are part of an artifact's fingerprint.

    If `crop` is set, the input is a square with sides of `crop` pixels, and `fit` says how an image becomes a square.
    If `fit` is "crop", the short side is first resized to `resize` pixels. Otherwise `resize` must be None.

    If `crop` is None, the whole image is resized so that the short side becomes `resize` pixels long, or keeps its
    length if `resize` is None. Both sides are then rounded to the nearest multiple of `patch_size`, but not to zero, so
    the aspect ratio can change slightly.

    A serialised spec contains `fit` only if it is not "crop". An artifact's fingerprint, a hash that includes the
    serialised spec, is therefore the same as before this setting existed.

    Raises:
        pydantic.ValidationError (a ValueError): a field is unknown, a value is out of range, or two values contradict
            each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int | None = Field(default=256, ge=1, le=4096, description="short side after resizing, in pixels")
    crop: int | None = Field(default=224, ge=1, le=4096, description="side of the square input in pixels, or null")
    fit: Fit = Field(default="crop", description="how an image that is not square becomes a square")
    patch_size: int = Field(default=14, ge=1, le=256, description="side of a patch in pixels")
    interpolation: Literal["bicubic"] = "bicubic"
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.fit != "crop" and self.crop is None:
            raise ValueError(f"fit={self.fit} needs crop, the side of the square input")
        if self.fit != "crop" and self.resize is not None:
            raise ValueError(f"resize={self.resize} has no effect with fit={self.fit}: crop sets the size of the input")
        if self.crop is not None:
            if self.resize is None and self.fit == "crop":
                raise ValueError(f"crop={self.crop} needs resize, the short side to crop from")
            if self.resize is not None and self.crop > self.resize:
                raise ValueError(f"crop={self.crop} does not fit into resize={self.resize}")
            if self.crop % self.patch_size:
                raise ValueError(f"crop={self.crop} must be a multiple of patch_size={self.patch_size}")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be above 0")
        return self

    @model_serializer(mode="wrap")
    def _without_the_default_fit(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialise(self)
        if self.fit == "crop":
            del values["fit"]
        return values


def read_spec(values: Mapping[str, Any]) -> PreprocessSpec:
    """Return the transform with these settings.

    Raises:
        ValueError: a setting is unknown, or its value is not allowed. The message names the setting and the value.
    """
    try:
        return PreprocessSpec.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def changed_spec(
    spec: PreprocessSpec, *, fit: Fit | None = None, resize: int | None = None, crop: int | None = None
) -> PreprocessSpec:
    """Return the transform with some settings changed. None means that a setting stays as it is.

    If the new transform's `fit` is "pad" or "squash", the old value of `resize` is dropped, because it has no effect.

    Raises:
        ValueError: the settings contradict each other. The message names them.
    """
    changes = {"fit": fit, "resize": resize, "crop": crop}
    values = spec.model_dump() | {name: value for name, value in changes.items() if value is not None}
    if values.get("fit", "crop") != "crop" and resize is None:
        values["resize"] = None
    return read_spec(values)


REFERENCE_224 = PreprocessSpec()
"""DINOv2's evaluation transform, which produces inputs of 224 x 224 pixels."""

REFERENCE_518 = PreprocessSpec(resize=518, crop=518)
"""The transform for inputs of 518 x 518 pixels, as in timm. The published weights were trained at this resolution."""


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"image of {height}x{width} pixels (height x width): both sides must be at least 1")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"image of {height}x{width} pixels (height x width): one side may be at most "
            f"{MAX_ASPECT_RATIO:g} times the other"
        )


def _resized_size(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """Return the (height, width) to which `preprocess` resizes an image of this size before it crops or pads it."""
    if spec.fit == "squash":
        assert spec.crop is not None
        return spec.crop, spec.crop
    if spec.fit == "pad":
        assert spec.crop is not None
        long, side = max(height, width), spec.crop
        # The long side becomes `crop`. The other is rounded, halves up, but not to zero, in exact integers.
        return max(1, (2 * height * side + long) // (2 * long)), max(1, (2 * width * side + long) // (2 * long))
    short = min(height, width)
    target = short if spec.resize is None else spec.resize
    if spec.crop is not None:  # as in torchvision's Resize, the long side is rounded down
        return (target, int(target * width / height)) if height <= width else (int(target * height / width), target)
    p = spec.patch_size

    def nearest_multiple(side: int) -> int:  # of side * target / short; halves round up, in exact integers
        return max(1, (2 * side * target + short * p) // (2 * short * p)) * p

    return nearest_multiple(height), nearest_multiple(width)


def output_size(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels of the input that `preprocess` makes from an image of this size.

    Raises:
        ValueError: a side is below 1, or the aspect ratio is above `MAX_ASPECT_RATIO`.
    """
    _check_size(height, width)
    return _resized_size(height, width, spec) if spec.crop is None else (spec.crop, spec.crop)


def crop_box(height: int, width: int, spec: PreprocessSpec) -> tuple[float, float, float, float]:
    """Return the part of an image of this size that the network sees, as (x, y, width, height) in the image's pixels.

    If `spec.fit` is "pad", this part extends beyond an image that is not square, so x or y is negative.

    The four numbers may be fractions, because the image is resized before it is cropped, and the crop is mapped back to
    the original size. If `output_size` returns (h, w), pixel (X, Y) of the network's input has its centre at this point
    of the image:

        (x + (X + 0.5) * width / w, y + (Y + 0.5) * height / h)

    Raises:
        ValueError: a side is below 1, or the aspect ratio is above `MAX_ASPECT_RATIO`.
    """
    out_h, out_w = output_size(height, width, spec)
    new_h, new_w = _resized_size(height, width, spec)
    top, left = _margins(new_h, new_w, out_h, out_w)
    return left * width / new_w, top * height / new_h, out_w * width / new_w, out_h * height / new_h


def _margins(new_h: int, new_w: int, out_h: int, out_w: int) -> tuple[int, int]:
    """Return the (top, left) corner of the centre crop of out_h x out_w pixels in an image of new_h x new_w pixels.

    Both numbers are 0 if nothing is cropped or padded. If the image is padded, one of them is negative.

    Halves are rounded to even, as in torchvision's CenterCrop.
    """
    return round((new_h - out_h) / 2), round((new_w - out_w) / 2)


@lru_cache(maxsize=16)
def _normalised_values(mean: Triple, std: Triple) -> "npt.NDArray[np.float32]":
    """Return a table [3, 256] with the normalised value of each byte value in each channel.

    The values are computed in the same float32 arithmetic as in torchvision.
    """
    import numpy as np

    values = np.arange(256, dtype=np.float32) / np.float32(255)
    table = (values - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    table.setflags(write=False)  # the table is cached and shared
    return table


def preprocess(image: "npt.NDArray[np.uint8]", spec: PreprocessSpec) -> "npt.NDArray[np.float32]":
    """Convert one image to the network's input.

    An image whose short side is shorter than `spec.resize` is enlarged, as in DINOv2's evaluation transform.

    Args:
        image: RGB [H, W, 3] uint8, already upright.
        spec: the settings of the transform.

    Returns:
        A contiguous float32 array [3, h, w], where (h, w) is `output_size(H, W, spec)`.

    Raises:
        ValueError: `image` has another shape or type, a side is below 1, or the aspect ratio is above
            `MAX_ASPECT_RATIO`.
    """
    import numpy as np
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 of shape [H, W, 3], not {image.dtype} of shape {list(image.shape)}")
    height, width = image.shape[:2]
    out_h, out_w = output_size(height, width, spec)
    new_h, new_w = _resized_size(height, width, spec)
    if (new_h, new_w) != (height, width):
        resized = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    top, left = _margins(new_h, new_w, out_h, out_w)
    if spec.fit == "pad":
        pixels = np.zeros((3, out_h, out_w), np.float32)  # 0 is the normalised mean colour
        filled = pixels[:, -top : new_h - top, -left : new_w - left]
    else:
        image = image[top : top + out_h, left : left + out_w]  # [h, w, 3]
        filled = pixels = np.empty((3, out_h, out_w), np.float32)
    for channel, values in enumerate(_normalised_values(spec.mean, spec.std)):
        np.take(values, image[:, :, channel], out=filled[channel], mode="clip")
    return pixels
