"""Tests of `POST /v1/analyze`: one pass, the same parts as the separate endpoints, and bad requests."""

import base64
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest
from service.vision.analyze import PARTS
from service.vision.local import Vision
from tests.fakes import photo
from tests.service.vision.conftest import Serve

IMAGE = photo(3, size=(120, 90))
TEXT = base64.b64encode(IMAGE).decode()


def without_time(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("timings", "model", "fingerprint")}


async def test_the_parts_are_the_answers_of_the_endpoints_and_one_pass_computes_them(serve: Serve) -> None:
    asked = {"outputs": ["embedding", "attention", "mask", "boxes", "class"], "attention": {"blocks": [0, -1]}}
    async with serve() as run:
        labels = [
            {"id": str(i), "image": base64.b64encode(photo(i)).decode(), "metadata": {"n": i % 2}} for i in range(6)
        ]
        assert (await run.client.post("/v1/collections/c/items", json={"items": labels})).status_code == 200
        of_class = {"collection": "c", "label": "n", "k": 3}
        before = run.service.metrics.registry.get_sample_value("dinov2_images_total")
        answer = await run.client.post("/v1/analyze", json={"image": TEXT, **asked, "classify": of_class})
        assert answer.status_code == 200, answer.text
        assert run.service.metrics.registry.get_sample_value("dinov2_images_total") == before + 1
        body = answer.json()
        assert set(without_time(body)) == set(asked["outputs"])
        for part, options in (("attention", {"blocks": [0, -1]}), ("mask", {}), ("boxes", {})):
            name, format_ = PARTS[part]
            alone = await run.client.post(f"/v1/{name}", json={"image": TEXT, "format": format_, **options})
            assert body[part] == without_time(alone.json()), part
        embedded = await run.client.post("/v1/embeddings", json={"input": TEXT})
        np.testing.assert_allclose(body["embedding"], embedded.json()["data"][0]["embedding"], atol=1e-6)
        classified = (await run.client.post("/v1/classify", json={"images": TEXT, **of_class})).json()
        [verdict] = classified["data"]
        assert body["class"]["label"] == verdict["label"]
        assert body["class"]["neighbours"] == verdict["neighbours"]
        assert body["class"]["calibration"] == classified["calibration"]


async def test_classes_from_examples(serve: Serve) -> None:
    examples = {"a": TEXT, "b": base64.b64encode(photo(9)).decode()}
    async with serve() as run:
        answer = await run.client.post(
            "/v1/analyze", json={"image": TEXT, "outputs": ["class"], "classify": {"classes": examples}}
        )
    assert answer.json()["class"]["label"] == "a"
    assert answer.json()["class"]["scores"][0]["score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"outputs": []}, "outputs"),
        ({"outputs": ["mask", "colour"]}, "outputs.1: Input should be 'embedding'"),
        ({"outputs": ["mask", "mask"]}, "outputs: each part may be named only once, not mask,mask"),
        ({"outputs": ["mask"], "boxes": {}}, "boxes: has options, but outputs does not contain boxes"),
        ({"outputs": ["mask"], "classify": {}}, "classify: has options, but outputs does not contain class"),
        ({"outputs": ["mask"], "mask": {"format": "png"}}, "mask.format: this option applies to the whole request"),
        ({"outputs": ["mask"], "mask": {"methode": "cut"}}, "mask: methode: unknown field"),
        ({"outputs": ["mask"], "mask": "cut"}, "mask: Input should be"),
        ({"outputs": ["class"]}, "classify: exactly one of collection, classes, head is needed, not none"),
        ({"outputs": ["class"], "size": 56, "classify": {"collection": "c", "label": "n"}}, "so leave out size"),
        ({"outputs": ["depth"], "depth": {"head": "none"}}, "there is no head named 'none'"),
        ({"outputs": ["attention"], "attention": {"blocks": [99]}}, "blocks: 99 is out of range"),
    ],
)
async def test_bad_requests(body: dict[str, Any], message: str, serve: Serve) -> None:
    async with serve() as run:
        answer = await run.client.post("/v1/analyze", json={"image": TEXT, **body})
        assert answer.status_code in (404, 422), answer.text
        assert message in answer.json()["detail"]


async def test_a_collection_that_is_not_there(serve: Serve) -> None:
    asked = {"outputs": ["class"], "classify": {"collection": "none", "label": "n"}}
    async with serve() as run:
        assert (await run.client.post("/v1/analyze", json={"image": TEXT, **asked})).status_code == 404


def test_the_function_computes_all_but_the_class(vision: Vision) -> None:
    answer = vision.run("analyze", [IMAGE], outputs="embedding,mask", mask='{"method": "foreground"}')
    assert isinstance(answer, dict)
    assert set(answer) == {"embedding", "mask"}
    with pytest.raises(InvalidRequest, match="use `dinov2 classify`"):
        vision.run("analyze", [IMAGE], outputs="class")
