"""The stages `copies` and `leaks`: drop images that show the same as another one, or as an evaluation image.

Both decide with the same comparison of pairs of images and a threshold, which may be calibrated on the images.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model.artifact import bundled_artifact
from model.files import write_text
from training.curate.copies import find
from training.curate.copies.calibrate import calibrate
from training.curate.copies.find import CopySettings, find_copies
from training.curate.leaks import STAGE as LEAKS_NAME
from training.curate.leaks import find_leaks
from training.curate.listing import digest_of
from training.curate.neighbours import Pairs, neighbours_above
from training.curate.pair_cache import VERSION as COMPARISON
from training.curate.pair_cache import NumberStore, PairStore, StoredComparison, StoredGrades
from training.curate.stages import POOL, Result, Stage, Task
from training.curate.views import stored_views

EVALUATION: Final = "evaluation"
COUNTS: Final = "leak-counts.json"
"""The file with what the comparison found for each evaluation image, from which the certificate is made."""
CALIBRATION: Final = "1"
"""Changes whenever the same images give another threshold."""
DETAIL: Final = "1"
"""Changes whenever the same image gets another grade of detail."""


def _copies(task: Task) -> Result:
    section = task.settings.copies
    threshold, calibrated = _threshold(task)
    cache, pool = task.folder.parent / "cache", task.scanned[POOL]
    compare = StoredComparison(
        PairStore(cache), task.workers, task.track, "comparing pairs for copies", (pool, task.indices)
    )
    grade = StoredGrades(NumberStore(cache, f"detail-{DETAIL}"), task.workers.number, pool, task.indices)
    settings = CopySettings(threshold, section.hash_radius, section.neighbours)
    drops = find_copies(
        task.images,
        task.pixels,
        settings,
        compare=compare,
        recall=compare.stored,
        grade=grade,
        neighbours=neighbours_above,
    )
    return Result(drops, {"threshold": threshold, **calibrated})


def _threshold(task: Task) -> tuple[float, dict[str, Any]]:
    """Return the similarity from which two images are copies, and what a calibration has reached.

    A calibration uses all scanned images, so it is the same for both stages. Its result is stored.

    Raises:
        ValueError: the images cannot show the wished precision.
    """
    section, seed = task.settings.copies, task.settings.seed
    if section.precision is None:
        return section.threshold, {}
    pool = task.scanned[POOL]
    inputs = digest_of(CALIBRATION, COMPARISON, pool.digest, repr(section.precision), str(seed))
    file = task.folder.parent / "cache" / f"threshold-{inputs[:32]}.json"
    if not file.exists():
        task.tell("copies: calibrating the threshold on edited copies of the images")
        found = calibrate(pool.images, pool.pixels, section.precision, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"threshold": found.value, "calibration": found.describe()}))
    stored = json.loads(file.read_text())
    for line in stored["calibration"]:
        task.tell(f"copies: {line}")
    return stored["threshold"], {"calibration": stored["calibration"]}


def _leaks(task: Task) -> Result:
    section, evaluation = task.settings.leaks, task.scanned[EVALUATION]
    # A leak that stays makes an evaluation wrong, and an image that is dropped in vain is only one image less.
    threshold = min(_threshold(task)[0], section.threshold)
    compare = StoredComparison(
        PairStore(task.folder.parent / "cache"),
        task.workers,
        task.track,
        "comparing pairs for leaks",
        (task.scanned[POOL], task.indices),
        (evaluation, np.arange(len(evaluation.images))),
    )

    def verify(pairs: Pairs) -> npt.NDArray[np.bool_]:
        return compare(pairs.query, pairs.vector) >= threshold

    scan = task.settings.scan
    artifact = bundled_artifact() if scan.model is None else Path(scan.model)
    cache = task.folder.parent / "cache"
    found = find_leaks(
        task.images,
        evaluation.images,
        stored_views(evaluation, artifact, scan.pooling, cache, task.workers, task.track),
        verify,
        threshold=section.similarity,
        k=section.candidates,
        hash_bits=section.hash_bits,
    )
    counts = {"n_leaks": found.n_leaks.tolist(), "n_rejected": found.n_rejected.tolist(), "threshold": threshold}
    report = {"evaluation_images": len(evaluation.images), "threshold": threshold}
    return Result(found.drops, report, {COUNTS: json.dumps(counts).encode()})


COPIES: Final = Stage(find.STAGE, "1", _copies)
LEAKS: Final = Stage(LEAKS_NAME, "3", _leaks, roles={EVALUATION: "leaks.evaluation"}, sections=(find.STAGE, LEAKS_NAME))
