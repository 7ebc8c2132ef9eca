"""Tests with generated scenes and the bundled model: objects are found where they are, and nothing is found in images
without an object."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.vision_scenes import Scene, empty_image, planted_features, scene
from service.features.patches import unit_rows
from service.features.pipeline import View
from service.vision.cut import spread
from service.vision.local import Vision
from service.vision.lost import several_lost
from service.vision.multi import several_cuts
from service.vision.object_score import MIN_SCORE, measure, object_score
from service.vision.task import File

SIZE = (224, 224)
SCENES = 16


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(70 + seed, SIZE) for seed in range(SCENES)]


def overlap(vision: Vision, drawn: Scene, **options: Any) -> float:
    answer = vision.run("segment", [encoded(drawn.image)], size=224, **options)
    assert isinstance(answer, File)
    mask = np.asarray(Image.open(io.BytesIO(answer.data))) > 0
    return float((mask & drawn.mask).sum() / (mask | drawn.mask).sum())


def prompts_for(drawn: Scene) -> dict[str, list[dict[str, Any]]]:
    """Return a prompt of each kind for the only object of a scene."""
    rows, columns = np.nonzero(drawn.mask)
    middle = {"x": int(columns.mean()), "y": int(rows.mean())}
    box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    return {"points": [{"points": [middle]}], "box": [{"box": box}]}


@pytest.mark.parametrize("refine", [False, True])
def test_masks_of_scenes(vision: Vision, scenes: list[Scene], refine: bool) -> None:
    """The mean intersection over union with the known masks, for the features of the bundled model."""
    found = {
        method: np.mean([overlap(vision, drawn, method=method, refine=refine) for drawn in scenes])
        for method in ("foreground", "cut")
    }
    for kind in ("points", "box"):
        found[f"prompt, {kind}"] = np.mean(
            [
                overlap(vision, drawn, method="prompt", prompts=prompts_for(drawn)[kind], refine=refine)
                for drawn in scenes
            ]
        )
    print({method: round(float(value), 3) for method, value in found.items()})
    assert min(found.values()) > 0.8, found


def test_nothing_is_found_where_nothing_is(vision: Vision, scenes: list[Scene]) -> None:
    """At most 5 % of 200 blank, gradient and texture images have an object, and nearly all scenes have one."""
    name = f"keys.{vision.model.config.depth - 1}"
    view = View((name,), vision.model.spec(224))
    prefix = 1 + vision.model.config.num_register_tokens
    counts = {"blank": 66, "gradient": 67, "texture": 67}
    images = [
        empty_image(kind, 50_000 + seed, SIZE)  # type: ignore[arg-type]
        for kind, count in counts.items()
        for seed in range(count)
    ]
    found: dict[str, list[bool]] = {"cut": [], "lost": []}
    for image in images + [drawn.image for drawn in scenes]:
        analysed = vision.analyse(encoded(image), view)
        features = unit_rows(analysed.outputs[name][prefix:])
        for method, find in (("cut", several_cuts), ("lost", several_lost)):
            objects = find(features, analysed.grid, max_objects=10, min_score=MIN_SCORE)
            found[method].append(bool(objects))
    rates = {method: (np.mean(each[:200]), np.mean(each[200:])) for method, each in found.items()}
    print({method: (round(float(false), 3), round(float(true), 3)) for method, (false, true) in rates.items()})
    for false, true in rates.values():
        assert false <= 0.05
        assert true >= 0.9


def test_the_score_orders_true_and_false_parts() -> None:
    """Planted features, so the score is not tied to the bundled model."""
    for seed in range(10):
        masks = scene(seed, (128, 128)).masks
        features, shares = planted_features(masks, (16, 16), seed)
        features = unit_rows(features)
        truth = shares[0] >= 0.5
        shifted = np.roll(truth, 8, axis=(0, 1))
        noise = unit_rows(np.random.default_rng(seed).normal(size=(256, 16)) * 0.1 + 1)
        assert object_score(features, truth) > MIN_SCORE
        assert object_score(features, shifted) < object_score(features, truth)
        assert object_score(noise, truth) < 0.2


def test_measurements_are_their_definitions() -> None:
    rng = np.random.default_rng(1)
    features = unit_rows(rng.normal(size=(20, 6)) + 1)
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    among = np.ones((4, 5), bool)
    among[0, :2] = False
    kept, inside = among.ravel(), mask.ravel()
    across, elsewhere = [], []
    for one in range(20):
        for other in range(one + 1, 20):
            (row, column), (next_row, next_column) = divmod(one, 5), divmod(other, 5)
            if abs(row - next_row) + abs(column - next_column) == 1 and kept[one] and kept[other]:
                distance = 1 - float(features[one] @ features[other])
                (across if inside[one] != inside[other] else elsewhere).append(distance)
    found = measure(features, mask, among)
    assert found is not None
    assert found.edge == pytest.approx(np.log((np.mean(across) + 1e-3) / (np.mean(elsewhere) + 1e-3)), rel=1e-4)
    assert found.step == pytest.approx(np.log(np.mean(across) + 0.01), rel=1e-4)
    rows, members = features[kept], inside[kept]
    total = rows.var(axis=0).sum()
    within = sum(rows[side].var(axis=0).sum() * side.sum() for side in (members, ~members)) / len(rows)
    assert found.explained == pytest.approx(1 - within / total, rel=1e-3)
    gap = np.square(rows[members].mean(0) - rows[~members].mean(0)).sum()
    error = (within + 0.01) * (1 / members.sum() + 1 / (~members).sum())
    assert found.separation == pytest.approx(np.log(gap / error + 1e-3), rel=1e-3)
    assert spread(rows) == pytest.approx(total, rel=1e-4)


def test_parts_without_surroundings_have_no_score() -> None:
    features = unit_rows(np.random.default_rng(0).normal(size=(16, 4)))
    everything = np.ones((4, 4), bool)
    assert object_score(features, everything) == 0
    assert object_score(features, ~everything) == 0
    alone = np.zeros((4, 4), bool)
    alone[0, 0] = True
    assert object_score(features, alone, alone) == 0
