"""Compute the vectors of words with the text encoder of dino.txt, and cache them.

A word is put into one or more sentences, and the vector of the word is the mean of the sentences' unit vectors, scaled
to length 1 (Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, 2021). The first
half of a text's vector is aligned with the class token of the image, and the second half with its patches (Jose et al.:
DINOv2 Meets Text, 2024).

Legend: C words, D width of the backbone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Final, NamedTuple

import numpy as np

from model.dinotxt.prompts import count_nodes
from model.dinotxt.store import TEXT_ENCODER, VOCABULARY, DinoTxt
from service.errors import EngineFailed, InvalidRequest
from service.features.patches import unit_rows
from service.search.store import Floats

MAX_WORDS: Final = 200
MAX_CHARACTERS: Final = 300  # of a word or a template
MAX_TEMPLATES: Final = 100
MAX_NEW_TOKENS: Final = 4000
"""The number of tokens that one request may encode, about 60 s of CPU time with the published encoder. Words whose
vectors are kept do not count, and neither do repeated beginnings of sentences."""
KEPT_WORDS: Final = 4096  # 12 kB each with the published encoder

TEMPLATE_LISTS: Final[dict[str, tuple[str, ...]]] = {
    "none": ("{}",),
    "one": ("a photo of a {}.",),
    "several": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of several {}.",
        "a close-up photo of a {}.",
        "a photo of a {} in the distance.",
        "a dark photo of a {}.",
        "a drawing of a {}.",
    ),
}


class WordVectors(NamedTuple):
    """The vectors of C words, each of length 1."""

    whole: Floats  # [C, 2 * D], to compare with an image
    patch: Floats  # [C, D], to compare with patches


class WordCache:
    """A cache of the vectors of the most recently used words. Any thread may use it.

    Only one thread encodes at a time, because the encoder uses all cores.
    """

    def __init__(self) -> None:
        self._vectors: OrderedDict[tuple[str, str, tuple[str, ...], str], WordVectors] = OrderedDict()
        self._lock = Lock()

    def vectors(self, dinotxt: DinoTxt, words: Sequence[str], templates: Sequence[str]) -> WordVectors:
        """Return the vectors of words, in their order.

        Args:
            dinotxt: the text encoder and its tokenizer.
            words: the words, without duplicates.
            templates: sentences in which `{}` is replaced with the word.

        Raises:
            InvalidRequest: a sentence has too many tokens for the encoder, or the new sentences together have too many
                for a request.
            EngineFailed: a vector is not finite.
        """
        files = dinotxt.record.files
        encoder = (files[TEXT_ENCODER].sha256, files[VOCABULARY].sha256)
        keys = {word: (*encoder, tuple(templates), word) for word in words}
        with self._lock:
            new = [word for word, key in keys.items() if key not in self._vectors]
            if new:
                encoded = _encode(dinotxt, new, templates)
                for word, whole, patch in zip(new, *encoded, strict=True):
                    self._vectors[keys[word]] = WordVectors(whole, patch)
            for key in keys.values():
                self._vectors.move_to_end(key)
            vectors = [self._vectors[key] for key in keys.values()]
            while len(self._vectors) > KEPT_WORDS:
                self._vectors.popitem(last=False)
        return WordVectors(*(np.stack(rows) for rows in zip(*vectors, strict=True)))


CACHE: Final = WordCache()


def sentences(templates: Sequence[str]) -> tuple[str, ...]:
    """Return the sentences that `templates` lists. Each element is a sentence that contains `{}` once, or the name of
    one of the `TEMPLATE_LISTS`, which stands for all sentences of this list.

    Raises:
        InvalidRequest: an element is neither of these.
    """
    result: list[str] = []
    for template in templates:
        if template in TEMPLATE_LISTS:
            result.extend(TEMPLATE_LISTS[template])
        elif template.count("{}") == 1:
            result.append(template)
        else:
            raise InvalidRequest(
                f"templates: {template!r} is not one of {', '.join(TEMPLATE_LISTS)}, and not a sentence that contains "
                "{} once, for example 'a photo of a {}.'",
                param="templates",
            )
    return tuple(dict.fromkeys(result))


def _encode(dinotxt: DinoTxt, words: Sequence[str], templates: Sequence[str]) -> WordVectors:
    """Encode the sentences of words, and return the vectors of the words."""
    prompts = []
    context_length = dinotxt.text_encoder.shape.context_length
    for word in words:
        for template in templates:
            prompt = dinotxt.tokenizer.prompt(template.replace("{}", word))
            if len(prompt) > context_length:
                raise InvalidRequest(
                    f"words: {word[:60]!r} in {template[:60]!r} has {len(prompt)} tokens; the text encoder accepts "
                    f"{context_length}, including the start and the end token",
                    param="words",
                )
            prompts.append(prompt)
    if (tokens := count_nodes(prompts)) > MAX_NEW_TOKENS:
        raise InvalidRequest(
            f"words: {len(words)} new words in {len(templates)} sentences have {tokens:,} tokens, but a "
            f"request may have at most {MAX_NEW_TOKENS:,}: send fewer words at a time, because encoded words are kept",
            param="words",
        )
    features = dinotxt.text_encoder.encode(prompts).reshape(len(words), len(templates), -1)  # [C, sentences, 2 * D]
    if not np.isfinite(features).all():
        raise EngineFailed("the text encoder's features are not finite")
    half = features.shape[-1] // 2
    return WordVectors(_mean_direction(features), _mean_direction(features[..., half:]))


def _mean_direction(features: Floats) -> Floats:
    """Scale vectors [C, sentences, D] to length 1, and return their mean over the sentences, scaled to length 1, [C,
    D]."""
    unit = unit_rows(features.reshape(-1, features.shape[-1])).reshape(features.shape)
    return unit_rows(unit.mean(axis=1))
