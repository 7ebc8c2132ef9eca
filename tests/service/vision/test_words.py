"""Tests of the task "words": it equals a plain computation, planted words are found, and bad input is refused."""

import base64
import io
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.artifact import ONNX, Artifact, load_artifact
from model.dinotxt.store import VISION_HEAD, add_dinotxt
from model.engines.onnxruntime_engine import OnnxEngine
from model.preprocess import PreprocessSpec, preprocess
from service.errors import EngineFailed, InvalidRequest
from service.features.pipeline import Analysed, Embedded
from service.features.served_model import ServedModel
from service.vision import word_vectors, words
from service.vision.local import Vision
from service.vision.mask import coco_rle_decode
from service.vision.task import File
from service.vision.word_map import label_map, palette
from service.vision.word_vectors import TEMPLATE_LISTS, WordCache, WordVectors, sentences
from service.vision.word_windows import windowed_similarities
from service.vision.words import TASK, WordsOptions, words_scores
from tests.contract import Contract
from tests.fakes import DIMS, FakeDinoTxt, Running, fake_artifact, photo, running
from tests.model.dinotxt_files import (
    random_tensors,
    text_encoder_shapes,
    vision_head_shapes,
    write_artifact,
    write_sources,
)
from tests.model.plain_dinotxt import plain_text_encoder, plain_vision_head

WORDS = ["cat", "red apple", "milk"]


@pytest.fixture(scope="module")
def plain_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small backbone with registers and random weights, without dino.txt."""
    folder = tmp_path_factory.mktemp("artifact")
    return load_artifact(write_artifact(folder / "small"), derived_dir=folder / "derived")


@pytest.fixture(scope="module")
def artifact(plain_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same backbone with dino.txt."""
    other = replace(plain_artifact, path=tmp_path_factory.mktemp("with_dinotxt"))
    add_dinotxt(other, write_sources(tmp_path_factory.mktemp("downloads")))
    return other


@pytest.fixture(scope="module")
def engine(plain_artifact: Artifact) -> OnnxEngine:
    return OnnxEngine(plain_artifact.file(ONNX), threads=1, inner="always")


@pytest.fixture(scope="module")
def vision(artifact: Artifact, engine: OnnxEngine) -> Vision:
    return Vision(artifact, engine, threads=1)


class Served(Running):
    """A running service, and a shorter way to send it a request."""

    async def ask(self, status: int, **body: Any) -> dict[str, Any]:
        image = body.pop("image", photo(size=(90, 60)))
        parameters = {name: value for name, value in body.items() if not isinstance(value, list)}
        lists = {name: ",".join(map(str, value)) for name, value in body.items() if isinstance(value, list)}
        headers = {"Content-Type": "image/png"}
        answer = await self.client.post("/v1/words", params=parameters | lists, content=image, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()


@pytest.fixture
async def served(artifact: Artifact, engine: OnnxEngine, tmp_path: Path) -> AsyncIterator[Served]:
    kept = _Kept(engine)
    async with running(tmp_path, engine=kept, artifact=artifact) as run:  # type: ignore[arg-type]
        yield Served(run.app, run.client, run.service, run.engine)


class _Kept:
    """An engine that stays open when a service ends, with the records that `running` resets."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine
        self.batches: list[Any] = []
        self.entered = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Leave the engine open for the next test."""


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def analysed(tokens: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> Analysed:
    """Return an analysed image with these tokens [1 + N, D], of a model without registers."""
    embedded = Embedded(np.stack([tokens[0], tokens[1:].mean(axis=0)]), len(tokens))
    spec = PreprocessSpec(resize=size[0], crop=None)
    return Analysed(embedded, tokens[1:], tokens[:0], grid, np.zeros((*size, 3), np.uint8), spec)


# The whole computation


@pytest.mark.parametrize("templates", [("one",), ("none", "the {} here.")])
def test_the_answer_equals_a_plain_computation(vision: Vision, templates: tuple[str, ...]) -> None:
    image = photo(size=(90, 60))
    one = vision.analyse(image, TASK.view(WordsOptions(words=WORDS), vision.model))
    answer = vision.run("words", [image], words=WORDS, templates=list(templates))
    assert isinstance(answer, dict)

    tensors, text = random_tensors(vision_head_shapes(), seed=1), random_tensors(text_encoder_shapes(), seed=2)
    tokens = np.concatenate([one.embedded.parts[:1], one.registers, one.patches])
    assert tokens.shape == (1 + 4 + 25, 64)
    refined = plain_vision_head(tensors, tokens[None])[0]
    whole = unit(np.concatenate([refined[0], refined[5:].mean(axis=0)]))
    tokenizer = words._opened(WordsOptions(words=WORDS), vision.model).tokenizer
    logits, by_patch = [], []
    for word in WORDS:
        texts = [template.replace("{}", word) for template in sentences(templates)]
        vectors = np.stack([plain_text_encoder(text, tokenizer.prompt(each)) for each in texts])
        logits.append(whole @ unit(unit(vectors).mean(axis=0)))
        by_patch.append(unit(refined[5:]) @ unit(unit(vectors[:, 64:]).mean(axis=0)))
    weights = np.exp(100 * np.array(logits))
    scores = {each["word"]: each for each in answer["words"]}
    assert len(set(np.argmax(by_patch, axis=0))) > 1
    for position, word in enumerate(WORDS):
        assert scores[word]["label"] == position + 1
        assert scores[word]["similarity"] == pytest.approx(logits[position], abs=2e-4)
        assert scores[word]["score"] == pytest.approx(weights[position] / weights.sum(), abs=2e-3)
        assert scores[word]["share"] == pytest.approx((np.argmax(by_patch, axis=0) == position).mean())
    assert [each["score"] for each in answer["words"]] == sorted((s["score"] for s in answer["words"]), reverse=True)
    assert answer["grid"] == [5, 5]
    assert answer["templates"] == list(sentences(templates))
    assert answer["head"] == "dinotxt"


def test_a_planted_word_is_found_and_placed() -> None:
    rng = np.random.default_rng(0)
    scene, thing = rng.normal(size=(2, DIMS)).astype(np.float32)
    tokens = np.tile(scene, (1 + 24, 1)) + rng.normal(size=(25, DIMS)).astype(np.float32) * 0.05
    place = np.zeros((4, 6), bool)
    place[1:3, 2:5] = True
    tokens[1:][place.ravel()] += 3 * thing - scene
    mean = tokens[1:].mean(axis=0)
    vectors = WordVectors(
        unit(np.stack([np.concatenate([tokens[0], mean]), np.concatenate([-tokens[0], mean])])),
        unit(np.stack([scene, thing])),
    )
    found = words_scores(analysed(tokens, (4, 6), (56, 84)), FakeDinoTxt(), vectors)  # type: ignore[arg-type]
    assert found.similarities[0] == pytest.approx(1, abs=1e-6)
    assert found.scores.sum() == pytest.approx(1)
    assert found.scores[0] > 0.99
    np.testing.assert_array_equal(found.patches.argmax(axis=0) == 1, place)
    labels = label_map(found.patches, (56, 84), (0, 0, 84, 56))
    truth = np.kron(place, np.ones((14, 14), bool))
    assert ((labels == 2) & truth).sum() / ((labels == 2) | truth).sum() > 0.8


# Label maps


def plain_labels(maps: np.ndarray, size: tuple[int, int], box: tuple[float, ...], lowest: float | None) -> np.ndarray:
    """Interpolate between the centres of the patches, pixel by pixel."""
    labels = np.zeros(size, np.uint8)
    h, w = maps.shape[1:]
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = (row + 0.5 - box[1]) / box[3], (column + 0.5 - box[0]) / box[2]
            if not (0 <= y < 1 and 0 <= x < 1):
                continue
            y, x = np.clip(y * h - 0.5, 0, h - 1), np.clip(x * w - 0.5, 0, w - 1)
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            corner = maps[:, top : top + 2, left : left + 2]
            values = np.einsum("cij,i,j->c", corner, [1 - (y - top), y - top], [1 - (x - left), x - left])
            labels[row, column] = values.argmax() + 1 if lowest is None or values.max() >= lowest else 0
    return labels


@pytest.mark.parametrize("lowest", [None, 0.4])
@pytest.mark.parametrize("box", [(0.0, 0.0, 40.0, 30.0), (5.0, -2.0, 30.0, 30.0), (-4.0, 6.0, 40.0, 20.0)])
def test_a_label_map_equals_its_definition(
    box: tuple[float, float, float, float], lowest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = np.random.default_rng(1).uniform(0, 1, (3, 4, 5)).astype(np.float32)
    expected = plain_labels(maps, (30, 40), box, lowest)
    assert {0, 1, 2, 3} - set(np.unique(expected)) <= {0}
    np.testing.assert_array_equal(label_map(maps, (30, 40), box, lowest), expected)
    monkeypatch.setattr("service.vision.word_map._BLOCK_FLOATS", 3 * 40 * 7)  # 7 rows at a time
    np.testing.assert_array_equal(label_map(maps, (30, 40), box, lowest), expected)


def test_pixels_of_a_large_image_share_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = np.random.default_rng(2).uniform(0, 1, (3, 4, 5)).astype(np.float32)
    whole = label_map(maps, (61, 91), (0, 0, 91, 61))
    monkeypatch.setattr("service.vision.word_map.MAX_LABELLED", 61 * 91 // 8)
    shared = label_map(maps, (61, 91), (0, 0, 91, 61))
    assert shared.shape == (61, 91)
    assert (shared[0:3, 0:3] == shared[1, 1]).all()
    assert (shared == whole).mean() > 0.9


def test_the_colours_of_many_words_differ() -> None:
    colours = palette(200)
    assert len(np.unique(colours, axis=0)) == 201
    assert np.abs(np.diff(colours.astype(int), axis=0)).max(axis=1).min() > 60


# Formats


async def test_all_formats_show_the_same_labels(vision: Vision, served: Served) -> None:
    from pycocotools import mask as coco

    image = photo(size=(90, 60))
    options = {"words": WORDS, "templates": ["none"]}
    answers = {name: vision.run("words", [image], format=name, **options) for name in TASK.formats}
    png, overlay, rle = answers["png"], answers["overlay"], answers["rle"]
    assert isinstance(png, File)
    assert isinstance(overlay, File)
    assert isinstance(rle, dict)
    labels = np.asarray(Image.open(io.BytesIO(png.data)))
    assert labels.shape == (60, 90)
    assert (labels == 0).any()  # outside the crop
    drawn = np.asarray(Image.open(io.BytesIO(overlay.data)))
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    np.testing.assert_array_equal(drawn[labels == 0], pixels[labels == 0])
    present = [each for each in rle["words"] if "segmentation" in each]
    assert len(present) > 1
    for each in present:
        mask = coco_rle_decode(each["segmentation"])
        np.testing.assert_array_equal(mask, labels == each["label"])
        counts = each["segmentation"] | {"counts": each["segmentation"]["counts"].encode()}
        np.testing.assert_array_equal(coco.decode(counts), mask)
        assert each["area"] == mask.sum()
        expected = pixels[mask] + 0.55 * (np.array(each["colour"]) - pixels[mask].astype(float))
        assert np.abs(drawn[mask] - expected).max() <= 1
    assert sum(each["area"] for each in present) == (labels > 0).sum()
    through_rest = await served.ask(200, image=image, format="rle", **options)
    assert [each["word"] for each in through_rest["words"]] == [each["word"] for each in rle["words"]]
    assert through_rest["words"][0]["segmentation"] == rle["words"][0]["segmentation"]


async def test_the_map_has_the_size_of_the_upright_image(vision: Vision) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.open(io.BytesIO(photo(size=(90, 60)))).save(buffer, "JPEG", exif=exif)
    answer = vision.run("words", [buffer.getvalue()], words=WORDS, format="png", size=70)
    assert isinstance(answer, File)
    labels = np.asarray(Image.open(io.BytesIO(answer.data)))
    assert labels.shape == (90, 60)
    assert labels.min() > 0  # the whole image is seen


def test_patches_that_resemble_no_word_get_none(vision: Vision) -> None:
    plain = vision.run("words", [photo()], words=WORDS)
    limited = vision.run("words", [photo()], words=WORDS, min_similarity=1.0)
    assert isinstance(plain, dict)
    assert isinstance(limited, dict)
    assert sum(each["share"] for each in plain["words"]) == pytest.approx(1)
    assert sum(each["share"] for each in limited["words"]) == 0
    png = vision.run("words", [photo()], words=WORDS, min_similarity=1.0, format="png")
    assert isinstance(png, File)
    assert not np.asarray(Image.open(io.BytesIO(png.data))).any()


# Windows


def test_windows_overlap_and_are_averaged() -> None:
    """A window's similarities are the mean of its first colour channel, so the result has a known value everywhere."""
    image = np.random.default_rng(3).integers(0, 256, (60, 90, 3), np.uint8)
    one = replace(analysed(np.ones((2, DIMS), np.float32), (1, 1), (60, 90)), image=image)
    model = ServedModel(fake_artifact())
    inputs: list[np.ndarray] = []

    def compare(pixels: np.ndarray) -> np.ndarray:
        inputs.append(pixels)
        return np.full((2, 28, 28), pixels[0].mean()) * np.array([1, -2])[:, None, None]

    found = windowed_similarities(one, model, compare)
    spec = model.spec(37 * 14)
    assert spec is not None
    pixels = preprocess(image, spec)
    assert pixels.shape == (3, 37 * 14, 56 * 14)
    assert len(inputs) == 2 * 3
    expected = np.zeros((37, 56, 2))  # sum and count
    for top in (0, 9):
        for left in (0, 14, 28):
            window = pixels[0, top * 14 : (top + 28) * 14, left * 14 : (left + 28) * 14]
            expected[top : top + 28, left : left + 28] += [window.mean(), 1]
    mean = expected[..., 0] / expected[..., 1]
    np.testing.assert_allclose(found.similarities, np.stack([mean, -2 * mean]), rtol=1e-4, atol=1e-5)
    assert found.crop_box == (0, 0, 90, 60)


async def test_windows_cover_the_whole_image_and_keep_the_scores(vision: Vision, served: Served) -> None:
    image = photo(size=(90, 60))
    plain = await served.ask(200, image=image, words=WORDS)
    windowed = await served.ask(200, image=image, words=WORDS, windows=True, format="rle")
    for key in ("word", "score", "similarity"):
        assert [each[key] for each in windowed["words"]] == [each[key] for each in plain["words"]]
    assert (plain["grid"], windowed["grid"]) == ([5, 5], [37, 56])
    assert sum(each.get("area", 0) for each in windowed["words"]) == 60 * 90
    local = vision.run("words", [image], words=WORDS, windows=True)
    assert isinstance(local, dict)
    assert [each["share"] for each in local["words"]] == [each["share"] for each in windowed["words"]]


async def test_the_number_of_windows_is_bounded(served: Served) -> None:
    problem = await served.ask(422, image=photo(size=(400, 90)), words=WORDS, windows=True)
    assert problem["param"] == "windows"
    assert "an image of 400 x 90 pixels needs 2 x 11 windows, but at most 16" in problem["detail"]


# Vectors of words


def test_vectors_of_words_are_kept() -> None:
    cache, head = WordCache(), FakeDinoTxt()
    first = cache.vectors(head, ["cat", "dog"], ["a {}."])  # type: ignore[arg-type]
    assert len(head.encoded) == 2
    second = cache.vectors(head, ["dog", "bird", "cat"], ["a {}."])  # type: ignore[arg-type]
    assert len(head.encoded) == 3
    for part, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(again[[2, 0]], part)
    cache.vectors(head, ["cat"], ["the {}."])  # type: ignore[arg-type]
    assert len(head.encoded) == 4
    other = FakeDinoTxt()
    other.record.files = {name: type(file)(sha256="other") for name, file in head.record.files.items()}
    cache.vectors(other, ["cat"], ["a {}."])  # type: ignore[arg-type]
    assert len(other.encoded) == 1  # another text encoder


def test_the_words_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_vectors, "KEPT_WORDS", 3)
    cache, head = WordCache(), FakeDinoTxt()
    for names in (["a", "b", "c"], ["a"], ["d"], ["a", "c", "d"]):
        cache.vectors(head, names, ["{}"])  # type: ignore[arg-type]
    assert len(head.encoded) == 4  # b was dropped
    result = cache.vectors(head, ["a", "b", "c", "d", "e"], ["{}"])  # type: ignore[arg-type]
    assert result.whole.shape == (5, 2 * DIMS)
    assert len(head.encoded) == 6


def test_words_and_sentences_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_vectors, "MAX_NEW_TOKENS", 20)
    cache, head = WordCache(), FakeDinoTxt()
    cache.vectors(head, ["cat"], ["a {}.", "a {}!"])  # type: ignore[arg-type]
    with pytest.raises(
        InvalidRequest, match="words: 3 new words in 2 sentences have 24 tokens, but a request may have at most 20"
    ):
        cache.vectors(head, ["dog", "cow", "hen", "cat"], ["a {}.", "a {}!"])  # type: ignore[arg-type]
    assert len(head.encoded) == 2
    cache.vectors(head, ["dog", "cat"], ["a {}.", "a {}!"])  # type: ignore[arg-type]


def test_templates_are_sentences_or_names_of_lists() -> None:
    assert sentences(["one", "none", "a {}", "none"]) == ("a photo of a {}.", "{}", "a {}")
    assert len(sentences(["several"])) == 7
    for templates in TEMPLATE_LISTS.values():
        assert all(template.count("{}") == 1 for template in templates)


# Bad input


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "words", "words: Field required"),
        ({"words": []}, "words", "words: List should have at least 1 item"),
        ({"words": [f"w{i}" for i in range(201)]}, "words", "words: List should have at most 200 items"),
        ({"words": ["cat", 5]}, "words", "words.1: Input should be a valid string, not 5"),
        ({"words": {"a": 1}}, "words", "words: Input should be a valid list"),
        ({"words": ["cat", ""]}, "words", "words.1: String should have at least 1 character"),
        ({"words": ["x" * 301]}, "words", "words.0: String should have at most 300 characters"),
        ({"words": ["cat", "  "]}, "words", "words: element 1 is empty"),
        ({"words": ["a cat", " a  cat "]}, "words", "words: 'a cat' occurs twice; send each word once"),
        ({"words": ["cat " * 30]}, "words", "tokens; the text encoder accepts 20, including the start and the end"),
        ({"words": ["cat"], "templates": ["most"]}, "templates", "'most' is not one of none, one, several, and not a"),
        ({"words": ["cat"], "templates": ["a {} and a {}"]}, "templates", "contains {} once"),
        ({"words": ["cat"], "templates": []}, "templates", "templates: List should have at least 1 item"),
        ({"words": ["cat"], "templates": ["{}"] * 101}, "templates", "at most 100 items"),
        ({"words": ["cat"], "min_similarity": 2}, "min_similarity", "Input should be less than or equal to 1, not 2"),
        ({"words": ["cat"], "format": "svg"}, "format", "format: Input should be 'json', 'png', 'rle' or 'overlay'"),
    ],
)
async def test_bad_options_are_refused(served: Served, body: dict[str, Any], param: str, message: str) -> None:
    image = base64.b64encode(photo(size=(90, 60))).decode()
    answer = await served.client.post("/v1/words", json={"image": image, **body})
    assert answer.status_code == 422, answer.text
    assert answer.json()["param"] == param
    assert message in answer.json()["detail"]


async def test_a_head_that_does_not_exist_is_refused(served: Served) -> None:
    problem = await served.ask(422, words=["cat"], head="other")
    assert problem["param"] == "head"
    assert "does not have a dino.txt head named 'other': it has dinotxt" in problem["detail"]


async def test_the_model_lists_its_dinotxt_head(served: Served) -> None:
    contract = Contract((await served.client.get("/openapi.json")).json())
    answer = await served.client.get("/v1/models/auto")
    contract.check(answer)
    [head] = answer.json()["heads"]
    assert (head["name"], head["kind"], head["architecture"]) == ("dinotxt", "words", "dinotxt")
    assert head["source"] == "x_vision_head.pth, x_text_encoder.pth, bpe.txt.gz"


async def test_a_model_without_dinotxt_says_how_to_get_it(
    plain_artifact: Artifact, engine: OnnxEngine, tmp_path: Path
) -> None:
    async with running(tmp_path, engine=_Kept(engine), artifact=plain_artifact) as run:  # type: ignore[arg-type]
        problem = await Served(run.app, run.client, run.service, run.engine).ask(422, words=["cat"])
    assert problem["param"] == "head"
    assert "it has none. Add Meta's files for dinov2_vitl14_reg with `dinov2 heads add-dinotxt" in problem["detail"]


def test_a_damaged_head_is_a_fault_of_the_service(
    plain_artifact: Artifact, engine: OnnxEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = replace(plain_artifact, path=tmp_path / "damaged")
    damaged.path.mkdir()
    path = add_dinotxt(damaged, write_sources(tmp_path)) / VISION_HEAD
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EngineFailed, match="the service's log has the reason") as caught:
        Vision(damaged, engine, threads=1).run("words", [photo()], words=["cat"])
    assert str(tmp_path) not in caught.value.detail
    assert f"{path}: its size or hash differs" in caplog.text


def test_features_that_are_not_finite_are_a_fault_of_the_service() -> None:
    head = FakeDinoTxt()
    head.vision_head.refine = lambda tokens: tokens * np.nan
    image = analysed(np.ones((5, DIMS), np.float32), (2, 2), (28, 28))
    with pytest.raises(EngineFailed, match="vision head's features are not finite"):
        words_scores(image, head, WordVectors(np.ones((1, 2 * DIMS)), np.ones((1, DIMS))))  # type: ignore[arg-type]
    head.text_encoder.encode = lambda prompts: np.full((len(prompts), 2 * DIMS), np.inf)
    with pytest.raises(EngineFailed, match="text encoder's features are not finite"):
        WordCache().vectors(head, ["cat"], ["{}"])  # type: ignore[arg-type]
