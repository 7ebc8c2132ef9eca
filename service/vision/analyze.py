"""The task "analyze": several results from one forward pass.

Each part of the answer comes from another task and has the options of that task. The forward pass returns the inner
outputs of all these tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NotRequired, get_args

from pydantic import Field
from typing_extensions import TypedDict

from model.pooling import DEFAULT_POOLING, Pooling
from service.answer_schemas import FloatVector, Timings
from service.errors import InvalidRequest
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.options import check_fields, parse_options
from service.schema_base import JSON_TEXT, LISTED, DocumentedAs
from service.schemas import VisionOptions
from service.vision import tasks
from service.vision.task import JSON, Answer, Task

Part = Literal["attention", "mask", "boxes", "depth"]
PARTS: Final[dict[Part, tuple[str, str]]] = {
    "attention": ("attention", "json"),
    "mask": ("segment", "rle"),
    "boxes": ("detect", "json"),
    "depth": ("depth", "json"),
}
"""The task and the format of each part. The option and the field of the answer have the name of the part."""

Output = Literal["embedding", "attention", "mask", "boxes", "depth", "class"]
_SHARED: Final = ("format", "model", "size", "include", "pooling", "normalize")  # options of the whole request

PartOptions = Annotated[dict[str, Any] | None, JSON_TEXT]


class AnalyzeOptions(VisionOptions):
    """The options of `POST /v1/analyze`."""

    outputs: Annotated[list[Output], Field(min_length=1, max_length=len(get_args(Output))), LISTED] = Field(
        ["embedding", "mask"], description="the parts of the answer"
    )
    format: Literal["json"] = Field("json", description="format of the answer")
    attention: PartOptions = Field(None, description="options of /v1/attention, for the part attention")
    mask: PartOptions = Field(None, description="options of /v1/segment, for the part mask")
    boxes: PartOptions = Field(None, description="options of /v1/detect, for the part boxes")
    depth: PartOptions = Field(None, description="options of /v1/depth, for the part depth")
    classify: PartOptions = Field(
        None, description="options of /v1/classify, for the part class: collection and label, classes, or head"
    )
    pooling: Pooling = Field(DEFAULT_POOLING, description="pooling of the embedding")
    normalize: bool = Field(True, description="scale the embedding to length 1")


PartAnswer = Annotated[Any, DocumentedAs(dict[str, Any])]


# Written as a call, because "class" cannot be the name of an attribute.
AnalyzeAnswer = TypedDict(
    "AnalyzeAnswer",
    {
        "embedding": NotRequired[FloatVector],
        "attention": NotRequired[Annotated[PartAnswer, Field(description="the answer of /v1/attention")]],
        "mask": NotRequired[Annotated[PartAnswer, Field(description="the answer of /v1/segment with format=rle")]],
        "boxes": NotRequired[Annotated[PartAnswer, Field(description="the answer of /v1/detect")]],
        "depth": NotRequired[Annotated[PartAnswer, Field(description="the answer of /v1/depth")]],
        "class": NotRequired[Annotated[PartAnswer, Field(description="the answer of /v1/classify")]],
        "model": str | None,
        "fingerprint": str,
        "timings": Timings,
    },
)
AnalyzeAnswer.__doc__ = "The answer to `POST /v1/analyze`. It contains the parts that `outputs` names."


@dataclass(frozen=True)
class _Chosen:
    """A part of the answer, with its task and the options of this task."""

    part: Part
    task: Task[Any, Any]
    options: VisionOptions


def _chosen(options: AnalyzeOptions) -> list[_Chosen]:
    """Return the parts that the options choose, in the order of `PARTS`.

    Raises:
        InvalidRequest: an output is named twice, a part has options but is not among the outputs, or an option of a
            part is not allowed.
    """
    if len(set(options.outputs)) < len(options.outputs):
        raise InvalidRequest(
            f"outputs: each part may be named only once, not {','.join(options.outputs)}", param="outputs"
        )
    parts = []
    for part, (name, format_) in PARTS.items():
        given = getattr(options, part)
        if part not in options.outputs:
            if given is not None:
                raise InvalidRequest(f"{part}: has options, but outputs does not contain {part}", param=part)
            continue
        parts.append(_Chosen(part, tasks.task(name), _options_of(part, name, format_, given or {}, options)))
    return parts


def _options_of(part: Part, name: str, format_: str, given: dict[str, Any], options: AnalyzeOptions) -> VisionOptions:
    """Return the options of the task of a part."""
    check_fields(given, part)
    for field in _SHARED:
        if field in given:
            raise InvalidRequest(f"{part}.{field}: this option applies to the whole request", param=part)
    try:
        parsed: VisionOptions = parse_options(
            tasks.task(name).options, given | {"format": format_, "size": options.size}
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"{part}: {error.detail}", param=part) from error
    return parsed


def _outputs(options: AnalyzeOptions, model: ServedModel) -> list[str]:
    return [name for chosen in _chosen(options) for name in chosen.task.view(chosen.options, model).outputs]


def _compute(analysed: Analysed, options: AnalyzeOptions, model: ServedModel) -> dict[str, Any]:
    """Compute the parts of the answer for one image, except the part "class". It may need a collection, so the endpoint
    (`service/routes/analyze.py`) adds it.

    Raises:
        InvalidRequest: the part "class" is requested.
    """
    if "class" in options.outputs:
        raise InvalidRequest(
            "outputs: class is only possible with POST /v1/analyze; use `dinov2 classify`", param="outputs"
        )
    parts: dict[str, Any] = {}
    for chosen in _chosen(options):
        result = chosen.task.compute(analysed, chosen.options, model)
        answer = chosen.task.encode([result], chosen.options)
        assert isinstance(answer, dict), chosen.part
        parts[chosen.part] = answer
    if "embedding" in options.outputs:
        parts["embedding"] = analysed.embedded.vector(options.pooling, options.normalize)
    return parts


def _encode(results: Sequence[dict[str, Any]], options: AnalyzeOptions) -> Answer:
    [parts] = results
    return parts


TASK: Final = Task(
    name="analyze",
    summary="Compute several results from one forward pass",
    description="""Compute several results for one image from one decoding and one forward pass. `outputs` names the
parts of the answer: embedding, attention, mask, boxes, depth and class. The options of a part are an object in the
field of the same name; those of class are in `classify`.""",
    options=AnalyzeOptions,
    answer=AnalyzeAnswer,
    formats={"json": JSON},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
)
