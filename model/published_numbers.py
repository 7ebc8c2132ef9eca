"""Compares a model's features of one well-known image with numbers that other projects have published.

The parity check of an export shows that a graph computes what the reference forward pass computes. It cannot show that
the weights, the preprocessing and the forward pass are those of the published model. This module can: the numbers in
`published_numbers.json` come from the tests of Hugging Face's transformers, which has its own forward pass. The image
is not part of this project, because its licence does not allow redistribution.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.config import PosEmbedRule
from model.engines.numpy_reference import NumpyReference
from model.engines.protocol import Engine, Features, FloatArray
from model.preprocess import PreprocessSpec, changed_spec, preprocess

NUMBERS: Final = Path(__file__).parent / "published_numbers.json"


class Number(NamedTuple):
    """A published number, and the number that the model computes in its place."""

    token: str  # such as "class token" or "patch 0"
    feature: int
    published: float
    computed: float
    decimals: int  # the number of published decimal places to which both numbers agree


class Verification(NamedTuple):
    """The result of comparing a model with published numbers.

    Attributes:
        source: where the numbers were published.
        numbers: the numbers, in the order in which they were published.
        needed: the number of decimal places to which every number must agree.
    """

    source: str
    numbers: list[Number]
    needed: int

    @property
    def agrees(self) -> bool:
        """Whether every number agrees to the needed number of decimal places."""
        return all(number.decimals >= self.needed for number in self.numbers)


def verify(artifact: Artifact, engine: Engine, image: npt.NDArray[np.uint8]) -> Verification:
    """Compare the features that `engine` computes from the reference image with the numbers published for the model.

    Args:
        artifact: the model. Its name must be in `published_numbers.json`, and its preprocessing must be the one with
            which the numbers were computed.
        engine: the artifact's engine.
        image: the reference image, RGB [H, W, 3].

    Raises:
        ValueError: there are no numbers for this model or this preprocessing, or the image does not have the size of
            the reference image.
    """
    content = _content()
    model = _model(content, artifact)
    return _compare(content, model, engine.run(_pixels(content, artifact, image)))


def agreeing_rules(artifact: Artifact, image: npt.NDArray[np.uint8]) -> list[str]:
    """Return the rules for resizing position embeddings with which the model's weights give the published numbers.

    If there is such a rule, the weights are right, and the model disagrees only because it uses another rule. The
    features are computed in float64.

    Raises:
        ValueError: see `verify`.
    """
    content = _content()
    model, pixels = _model(content, artifact), _pixels(content, artifact, image)
    return [
        rule for rule in get_args(PosEmbedRule) if _compare(content, model, _features(artifact, rule, pixels)).agrees
    ]


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(NUMBERS.read_text())
    return content


def _features(artifact: Artifact, rule: PosEmbedRule, pixels: FloatArray) -> Features:
    return NumpyReference(artifact.weights, replace(artifact.manifest.config, pos_embed_rule=rule)).run(pixels)


def _model(content: dict[str, Any], artifact: Artifact) -> dict[str, Any]:
    name = artifact.manifest.name
    if name not in content["models"]:
        raise ValueError(f"no numbers are published for {name!r}, only for {', '.join(content['models'])}")
    model: dict[str, Any] = content["models"][name]
    return model


def _pixels(content: dict[str, Any], artifact: Artifact, image: npt.NDArray[np.uint8]) -> FloatArray:
    """Return the reference image as the network's input, [1, 3, h, w].

    Raises:
        ValueError: the image does not have the size of the reference image, or the artifact's preprocessing is not the
            one with which the numbers were computed.
    """
    expected, shape = content["image"], image.shape[:2]
    if shape != (expected["height"], expected["width"]):
        raise ValueError(
            f"the reference image, {expected['name']}, is {expected['width']} x {expected['height']}, but this image "
            f"is {shape[1]} x {shape[0]}; it can be downloaded from {expected['url']}"
        )
    spec = artifact.manifest.preprocess
    wanted = changed_spec(PreprocessSpec(patch_size=spec.patch_size), **content["preprocess"])
    if spec != wanted:
        raise ValueError(
            f"the numbers were computed with resize={wanted.resize} and crop={wanted.crop}, but this artifact has "
            f"resize={spec.resize}, crop={spec.crop} and fit={spec.fit}: export the model with --resize "
            f"{wanted.resize} --crop {wanted.crop}"
        )
    return preprocess(image, spec)[None]


def _compare(content: dict[str, Any], model: dict[str, Any], features: Features) -> Verification:
    tokens = np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)[0]  # [T, D]
    numbers = [
        Number(
            token, column, value, float(row[column]), agreed_decimals(float(row[column]), value, content["decimals"])
        )
        for token, row, values in zip(model["tokens"], tokens, model["values"], strict=False)
        for column, value in enumerate(values)
    ]
    return Verification(model["source"], numbers, content["needed_decimals"])


def agreed_decimals(computed: float, published: float, most: int) -> int:
    """Return the number of decimal places, from 0 to `most`, to which two numbers agree. They agree to n places if they
    differ by at most half a unit in the n-th place."""
    difference = abs(computed - published)
    if not math.isfinite(difference):
        return 0
    slack = 1e-9  # for the rounding of numbers such as 0.0005
    return max((n for n in range(most + 1) if difference <= 0.5 * 10**-n + slack), default=0)
