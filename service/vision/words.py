"""The task "words": which of the given words describe an image, and where.

The task needs the two networks of dino.txt (`model/dinotxt/`), which were trained for Meta's ViT-L/14 with registers.

Legend: C words, D width, N patches, R registers, H x W size of the image, h x w size of the patch grid.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, NotRequired

import numpy as np
from pydantic import FailFast, Field
from typing_extensions import TypedDict

from model.dinotxt.store import DinoTxt, DinoTxtError, DinoTxtNotFound, open_dinotxt
from service.answer_schemas import Box as BoxOut
from service.answer_schemas import RunLengths, VisionAnswer
from service.errors import EngineFailed, InvalidRequest
from service.features.patches import unit_rows
from service.features.pipeline import Analysed
from service.features.served_model import ServedModel
from service.schema_base import LISTED
from service.schemas import VisionOptions
from service.vision.mask import coco_rle_encode
from service.vision.pictures import Box, Floats, blend
from service.vision.task import JSON, PNG, Answer, File, Task, png
from service.vision.word_map import Labels, label_map, palette
from service.vision.word_vectors import CACHE, MAX_CHARACTERS, MAX_TEMPLATES, MAX_WORDS, WordVectors, sentences
from service.vision.word_windows import WINDOW, windowed_similarities

log = logging.getLogger(__name__)

LOGIT_SCALE: Final = 100.0  # of Meta's notebook; the published files do not contain it
_OPACITY: Final = 0.55

Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]


class WordsOptions(VisionOptions):
    """The options of `POST /v1/words`."""

    words: Annotated[list[Text], FailFast(), LISTED] = Field(
        min_length=1,
        max_length=MAX_WORDS,
        description=f"1 to {MAX_WORDS} words or short descriptions, as a list or as a text with commas between them",
    )
    format: Literal["json", "png", "rle", "overlay"] = Field(
        "json",
        description="scores as JSON; the number of the word at each pixel as grey PNG, 0 for no word; the pixels of "
        "each word as COCO RLE in JSON; or the image with a colour for each word as PNG",
    )
    templates: Annotated[list[Text], FailFast(), LISTED] = Field(
        ["one"],
        min_length=1,
        max_length=MAX_TEMPLATES,
        description="sentences in which {} is replaced with the word; none: the word alone; one: `a photo of a {}.`; "
        "several: the mean of seven sentences, which is slower for new words",
    )
    head: str | None = Field(
        None, max_length=64, description="name of the dino.txt head; default: the only one that the model has"
    )
    windows: bool = Field(
        False,
        description="find the pixels of each word in overlapping windows of the enlarged image, which shows smaller "
        "things and takes one forward pass per window; at most 16 windows; the scores do not change",
    )
    min_similarity: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="a pixel that is less similar to every word gets no word"
    )


class WordScore(TypedDict):
    """The result for one word. With `format=rle`, `segmentation` and `area` are present if any pixel has the word."""

    word: str
    label: Annotated[int, Field(description="value of the word's pixels for format=png: its position, from 1")]
    score: Annotated[float, Field(description="softmax over all words of the request; 1 if there is only one word")]
    similarity: Annotated[float, Field(description="cosine similarity of the image and the word")]
    share: Annotated[float, Field(description="share of the patches that are most similar to this word")]
    colour: Annotated[list[int], Field(description="red, green and blue of the word for format=overlay")]
    segmentation: NotRequired[RunLengths]
    area: NotRequired[Annotated[int, Field(description="number of pixels with this word")]]


class WordsAnswer(VisionAnswer):
    """The answer to `POST /v1/words` as JSON."""

    words: Annotated[list[WordScore], Field(description="all words, the highest score first")]
    templates: Annotated[list[str], Field(description="the sentences that each word was put into")]
    head: Annotated[str, Field(description="name of the dino.txt head")]
    grid: Annotated[list[int], Field(description="number of patches down and across")]
    crop_box: BoxOut


@dataclass(frozen=True)
class ImageWords:
    """The similarity of one image to C words.

    similarities: the cosine of the image and each word, [C].
    scores: the softmax of 100 times the similarities, [C].
    patches: the cosine of each patch and each word, [C, h, w].
    """

    similarities: Floats
    scores: Floats
    patches: Floats


@dataclass(frozen=True)
class _Result:
    """The result for one image. `labels` is None for `format=json`. `picture` is set if the answer is a PNG."""

    found: ImageWords
    labels: Labels | None
    picture: File | None
    about: dict[str, Any]


def words_scores(analysed: Analysed, dinotxt: DinoTxt, vectors: WordVectors) -> ImageWords:
    """Compare an image with words.

    The vector of the image is the class token and the mean patch token after the vision head, concatenated and scaled
    to length 1.

    Raises:
        EngineFailed: a feature after the vision head is not finite.
    """
    refined = _refined(dinotxt, analysed.embedded.parts[0], analysed.registers, analysed.patches)
    [image] = unit_rows(np.concatenate([refined[0], refined[1:].mean(axis=0)])[None])
    similarities = vectors.whole @ image
    logits = LOGIT_SCALE * (similarities - similarities.max())
    weights = np.exp(logits)
    by_patch = vectors.patch @ unit_rows(refined[1:]).T
    return ImageWords(similarities, weights / weights.sum(), by_patch.reshape(-1, *analysed.grid))


def _refined(dinotxt: DinoTxt, cls: Floats, registers: Floats, patches: Floats) -> Floats:
    """Return the class token and the patch tokens after the vision head, [1 + N, D].

    Raises:
        EngineFailed: a feature is not finite.
    """
    tokens = np.concatenate([cls[None], registers, patches])  # [1 + R + N, D]
    refined = dinotxt.vision_head.refine(tokens[None])[0]
    if not np.isfinite(refined).all():
        raise EngineFailed("the vision head's features are not finite")
    return np.concatenate([refined[:1], refined[1 + len(registers) :]])


def _with_windows(
    found: ImageWords, analysed: Analysed, dinotxt: DinoTxt, vectors: WordVectors, model: ServedModel
) -> tuple[ImageWords, Box]:
    """Return the result with its patch similarities replaced by those from windows, and the part of the image that the
    patches cover."""

    def compare(pixels: Floats) -> Floats:
        row = model.features_of(pixels)
        refined = _refined(dinotxt, row.parts[0], row.registers, row.patches)
        return (vectors.patch @ unit_rows(refined[1:]).T).reshape(-1, WINDOW, WINDOW)

    windowed = windowed_similarities(analysed, model, compare)
    return replace(found, patches=windowed.similarities), windowed.crop_box


def _opened(options: WordsOptions, model: ServedModel) -> DinoTxt:
    """Open the dino.txt head that the options name.

    Raises:
        InvalidRequest: the model has no such head, or the options name no head and the model has several.
        EngineFailed: its files are damaged.
    """
    try:
        return open_dinotxt(model.artifact, options.head)
    except DinoTxtNotFound as error:
        raise InvalidRequest(str(error), param="head") from error
    except DinoTxtError as error:
        log.error("the dino.txt head cannot be used: %s", error)
        raise EngineFailed("the dino.txt head cannot be used; the service's log has the reason") from error


def _checked_words(words: Sequence[str]) -> list[str]:
    """Return the words without leading and trailing spaces.

    Raises:
        InvalidRequest: a word is empty or occurs twice.
    """
    stripped = [" ".join(word.split()) for word in words]
    for position, word in enumerate(stripped):
        if not word:
            raise InvalidRequest(f"words: element {position} is empty", param="words")
        if word in stripped[:position]:
            raise InvalidRequest(f"words: {word[:60]!r} occurs twice; send each word once", param="words")
    return stripped


def _outputs(options: WordsOptions, _: Any) -> tuple[str, ...]:
    """Check the options before an image is decoded. No inner output is needed."""
    _checked_words(options.words)
    sentences(options.templates)
    return ()


def _compute(analysed: Analysed, options: WordsOptions, model: ServedModel) -> _Result:
    """Compare an image with the words, and draw the picture that the options ask for.

    Raises:
        InvalidRequest: the model has no such dino.txt head, a word has too many tokens, or the new words together have
            too many tokens.
        EngineFailed: a feature is not finite.
    """
    dinotxt = _opened(options, model)
    words, templates = _checked_words(options.words), sentences(options.templates)
    vectors, box = CACHE.vectors(dinotxt, words, templates), analysed.crop_box
    found = words_scores(analysed, dinotxt, vectors)
    if options.windows:
        found, box = _with_windows(found, analysed, dinotxt, vectors, model)
    labels, picture = None, None
    if options.format != "json":
        labels = label_map(found.patches, analysed.size, box, options.min_similarity)
    if labels is not None and options.format == "png":
        picture = png(labels)
    elif labels is not None and options.format == "overlay":
        opacity = (np.float32(_OPACITY) * (labels > 0))[..., None]
        picture = png(blend(analysed.image, palette(len(words))[labels], opacity))
    about = {
        "templates": list(templates),
        "head": dinotxt.record.name,
        "grid": list(found.patches.shape[1:]),
        "crop_box": box,
    }
    return _Result(found, labels if options.format == "rle" else None, picture, about)


def _encode(results: Sequence[_Result], options: WordsOptions) -> Answer:
    [result] = results
    if result.picture is not None:
        return result.picture
    words, found = _checked_words(options.words), result.found
    nearest = found.patches.argmax(axis=0)
    if options.min_similarity is not None:
        nearest[found.patches.max(axis=0) < options.min_similarity] = -1
    shares = np.bincount(nearest.ravel() + 1, minlength=len(words) + 1)[1:] / nearest.size
    areas = np.zeros(len(words) + 1) if result.labels is None else np.bincount(result.labels.ravel(), minlength=256)
    colours = palette(len(words))
    answers: list[dict[str, Any]] = []
    for position in np.argsort(-found.scores, kind="stable"):
        answer: dict[str, Any] = {
            "word": words[position],
            "label": int(position) + 1,
            "score": float(found.scores[position]),
            "similarity": float(found.similarities[position]),
            "share": float(shares[position]),
            "colour": colours[position + 1].tolist(),
        }
        if result.labels is not None and areas[position + 1]:
            mask = result.labels == position + 1
            answer |= {"segmentation": coco_rle_encode(mask), "area": int(areas[position + 1])}
        answers.append(answer)
    return {"words": answers, **result.about}


TASK: Final = Task(
    name="words",
    summary="Say which words describe an image, and where",
    description="""Say which of the given words describe an image, and which pixels each word describes. No training is
needed, and a word can be a short description. The model needs a dino.txt head. Send the image in the JSON field
`image`, as a file in a form, or as the raw body.

The text encoder needs seconds for new words. The service keeps the vectors of the last few thousand words.""",
    options=WordsOptions,
    answer=WordsAnswer,
    formats={"json": JSON, "png": PNG, "rle": JSON, "overlay": PNG},
    compute=_compute,
    encode=_encode,
    outputs=_outputs,
)
