"""Builds the parts of the answer to a request that classifies images, for the route and the command."""

from service.retrieval.class_request import ClassifyResults
from service.retrieval.class_schemas import BasisFields, CalibrationFields, ClassifyOptions, VerdictFields
from service.retrieval.classify import Classified, Verdict
from service.vision.conformal import can_promise, least_error_rate


def verdict_fields(index: int, verdict: Verdict, top: int) -> VerdictFields:
    """Return the answer for one image. `index` is its position in the request, and `top` is the highest number of
    classes in the answer."""
    fields: VerdictFields = {
        "index": index,
        "label": verdict.label,
        "unknown": verdict.unknown,
        "p_value": verdict.p_value,
        "scores": [{"label": label, "score": score} for label, score in verdict.scores[:top]],
    }
    if verdict.neighbours is not None:
        fields["neighbours"] = [{"id": n.id, "label": n.label, "score": n.score} for n in verdict.neighbours]
    return fields


def basis_fields(results: ClassifyResults, options: ClassifyOptions) -> BasisFields:
    """Return the part of an answer that says what the verdicts are based on."""
    fields: BasisFields = {}
    if results.classified is not None:
        fields["calibration"] = calibration_fields(results.classified, options.error_rate)
    if options.collection is not None:
        fields["collection"] = options.collection
    if results.head is not None:
        fields["head"] = results.head
    return fields


def calibration_fields(classified: Classified, error_rate: float) -> CalibrationFields:
    """Return the description of the known images that the images of the request were compared with."""
    calibration = classified.calibration
    count = len(calibration.scores)
    fields: CalibrationFields = {
        "method": calibration.method,
        "items": count,
        "drawn_from": calibration.drawn_from,
        "error_rate": error_rate,
        "least_error_rate": least_error_rate(count),
        "promised": classified.promised,
    }
    if calibration.method != "examples":
        fields["k"] = calibration.k
    if not can_promise(count, error_rate):
        fields["note"] = (
            f"{count} known images are too few for the error rate {error_rate:g}, so no image is called unknown: "
            f"at least {least_count(error_rate)} are needed"
        )
    elif not calibration.is_random:
        fields["note"] = (
            "this vector store cannot draw items at random from a collection of this size, so the known images are "
            "drawn from its first items"
        )
    return fields


def least_count(error_rate: float) -> int:
    """Return the lowest number of calibration images with which an image can be called unknown at this error rate."""
    count = max(0, int(1 / error_rate) - 2)
    while not can_promise(count, error_rate):
        count += 1
    return count
