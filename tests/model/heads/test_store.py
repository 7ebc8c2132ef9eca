"""Tests of the store of heads: what is added is found again, and what is wrong is refused with the reason."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from model.artifact import BUNDLED_DIR, Artifact, bundled_artifact, read_manifest
from model.heads import store
from model.heads.record import HeadDescription, HeadError, HeadNotFound, ImageTokens
from model.heads.store import add_head, choose_head, list_heads, open_head, remove_head
from tests.model.heads import meta_heads
from tests.model.heads.artifacts import CONFIG, small_artifact

RNG = np.random.default_rng(0)
DIM = CONFIG.embed_dim


def classifier(name: str = "colours", classes: tuple[str, ...] = ("red", "green", "blue")) -> HeadDescription:
    return HeadDescription(
        name=name, kind="classification", layers=(11,), normed=True, classes=classes, source="a test"
    )


def tensors(rows: int = 3, width: int = 2 * DIM) -> dict[str, np.ndarray]:
    return {
        "weight": RNG.standard_normal((rows, width), dtype=np.float32),
        "bias": RNG.standard_normal(rows, dtype=np.float32),
    }


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return small_artifact(tmp_path / "artifacts" / "small-aaaaaaaa", derived_dir=tmp_path / "derived")


def test_a_head_is_listed_and_opened(artifact: Artifact) -> None:
    assert list_heads(artifact) == []
    values = tensors()
    folder = add_head(artifact, classifier(), values)
    assert folder == artifact.path / "heads" / "colours"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["colours"]
    [record] = list_heads(artifact)
    assert (record.name, record.classes, record.model) == ("colours", ("red", "green", "blue"), artifact.fingerprint)
    head = open_head(artifact, choose_head(artifact, "classification", None))
    tokens = ImageTokens(np.ones(DIM, np.float32), np.full((4, DIM), 2, np.float32), (2, 2), {})
    wanted = values["weight"] @ np.concatenate([np.ones(DIM), np.full(DIM, 2)]) + values["bias"]
    np.testing.assert_allclose(head.classify(tokens), wanted, rtol=1e-5)
    assert open_head(artifact, record) is head


def test_a_second_head_of_the_same_name_replaces_the_first_only_if_asked(artifact: Artifact) -> None:
    add_head(artifact, classifier(), tensors())
    first = open_head(artifact, choose_head(artifact, "classification", "colours"))
    with pytest.raises(HeadError, match="already has a head named colours"):
        add_head(artifact, classifier(), tensors())
    add_head(artifact, classifier(), tensors(), replace=True)
    second = open_head(artifact, choose_head(artifact, "classification", "colours"))
    assert not np.array_equal(first.tensors["weight"], second.tensors["weight"])
    remove_head(artifact, "colours")
    assert list_heads(artifact) == []
    with pytest.raises(HeadNotFound, match="colours"):
        remove_head(artifact, "colours")


def test_a_read_only_artifact_keeps_its_heads_in_the_derived_folder(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert add_head(artifact, classifier(), tensors()) == artifact.derived / "heads" / "colours"
    assert [record.name for record in list_heads(artifact)] == ["colours"]


def test_the_bundled_artifact_receives_no_heads(tmp_path: Path) -> None:
    path = bundled_artifact()
    assert BUNDLED_DIR in path.parents
    manifest = read_manifest(path)
    bundled = Artifact(path=path, manifest=manifest, locations={}, derived_dir=tmp_path)
    head = classifier().model_copy(update={"layers": (manifest.config.depth - 1,)})
    assert add_head(bundled, head, tensors(3, 2 * manifest.config.embed_dim)).is_relative_to(tmp_path)
    assert not (path / "heads").exists()


@pytest.mark.parametrize(
    ("changes", "values", "reason"),
    [
        ({}, tensors(3, 2 * DIM + 1), r"weight is \[3, 33\], but this model \(16 wide\) needs \[3, 32\]"),
        ({}, {"weight": tensors()["weight"]}, "0 outputs"),
        ({}, tensors() | {"extra": np.zeros(1, np.float32)}, "tensor extra is .1., but .* needs absent"),
        ({"classes": ("a", "b")}, tensors(), "3 outputs and 2 class names"),
        ({"layers": (12,)}, tensors(), r"reads the blocks \[12\], but the model has the blocks 0 to 11"),
        ({}, tensors() | {"bias": np.array([0, np.nan, 0], np.float32)}, "bias has values that are not finite"),
        (
            {"kind": "segmentation", "classes": tuple(map(str, range(256)))},
            tensors(256, DIM),
            "256 classes; a segmentation head has at most 255",
        ),
        ({"kind": "depth", "classes": ()}, tensors(256), "no depth range"),
        ({"kind": "depth", "classes": (), "depth_range": (2.0, 1.0)}, tensors(256), "min_depth=2 and max_depth=1"),
        ({"kind": "depth", "classes": (), "architecture": "dpt"}, tensors(), "from 4 blocks, not depth from 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    artifact: Artifact, changes: dict[str, object], values: dict[str, np.ndarray], reason: str
) -> None:
    with pytest.raises(HeadError, match=reason):
        add_head(artifact, classifier().model_copy(update=changes), values)
    assert list_heads(artifact) == []
    assert not list(artifact.path.glob("heads/*"))


def test_a_changed_file_is_refused(artifact: Artifact) -> None:
    folder = add_head(artifact, classifier(), tensors())
    content = bytearray((folder / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "head.safetensors").write_bytes(content)
    with pytest.raises(HeadError, match="the file was changed"):
        open_head(artifact, choose_head(artifact, "classification", "colours"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: b"{", "not JSON"),
        (lambda record: json.dumps(record | {"kind": "captions"}).encode(), "must be"),
        (lambda record: json.dumps(record | {"run": "rm"}).encode(), "run"),
        (lambda record: json.dumps(record | {"model": "b" * 64}).encode(), "fingerprint bbbbbbbb, not to aaaaaaaa"),
        (
            lambda record: json.dumps(record | {"name": "other"}).encode(),
            "named other, but its folder is named colours",
        ),
        (lambda record: b" " * (4 << 20) + json.dumps(record).encode(), "larger than"),
    ],
)
def test_a_bad_record_is_left_out_of_the_list_and_refused(
    artifact: Artifact, change: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = add_head(artifact, classifier(), tensors())
    record = json.loads((folder / "head.json").read_text())
    assert callable(change)
    (folder / "head.json").write_bytes(change(record))
    with caplog.at_level(logging.WARNING):
        assert list_heads(artifact) == []
    assert "colours" in caplog.text
    with pytest.raises(HeadError, match=reason):
        choose_head(artifact, "classification", "colours")


def test_a_head_whose_description_could_not_be_read_again_is_not_stored(artifact: Artifact) -> None:
    names = tuple("x" * (store.MAX_RECORD_BYTES // 3) + str(i) for i in range(3))
    with pytest.raises(HeadError, match=r"the names of 3 classes, has more than \d+ bytes"):
        add_head(artifact, classifier(classes=names), tensors())
    assert list_heads(artifact) == []


def test_a_head_disappears_as_a_whole(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_head(artifact, classifier(), tensors())
    files = folder.parent
    monkeypatch.setattr("os.unlink", lambda *_, **__: pytest.fail("a file of the head was deleted in its place"))
    real = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        return real(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    remove_head(artifact, "colours")
    assert list(files.iterdir()) == []


def test_the_choice_of_a_head_says_what_there_is(artifact: Artifact) -> None:
    with pytest.raises(HeadNotFound, match=r"has no head for depth; .*heads add.*train-head depth"):
        choose_head(artifact, "depth", None)
    add_head(artifact, classifier("a"), tensors())
    with pytest.raises(HeadNotFound, match="no head named 'x'; heads for classification: a;"):
        choose_head(artifact, "classification", "x")
    with pytest.raises(HeadNotFound, match="'a' is for classification, not for segmentation"):
        choose_head(artifact, "segmentation", "a")
    for name in ("../a", "", ".", "a/../a"):
        with pytest.raises(HeadNotFound, match="no head named"):
            choose_head(artifact, "classification", name)
    add_head(artifact, classifier("b"), tensors())
    with pytest.raises(HeadNotFound, match="choose a head: heads for classification: a, b"):
        choose_head(artifact, "classification", None)


def test_a_name_cannot_leave_the_folder() -> None:
    for name in ("../x", ".hidden", "a/b", "", "x" * 65):
        with pytest.raises(ValueError, match="name"):
            classifier(name)


def test_the_registers_are_no_patches(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_register_tokens=3)
    artifact = small_artifact(tmp_path / "registers", config=config)
    head = HeadDescription(
        name="parts", kind="segmentation", layers=(10, 11), normed=True, classes=("a", "b"), source="a test"
    )
    values = tensors(2, 2 * DIM)
    add_head(artifact, head, values)
    opened = open_head(artifact, choose_head(artifact, "segmentation", "parts"))
    assert opened.outputs == ("tokens.10",)
    inner = RNG.standard_normal((1 + 3 + 6, DIM), dtype=np.float32)
    last = RNG.standard_normal((6, DIM), dtype=np.float32)
    tokens = ImageTokens(np.zeros(DIM, np.float32), last, (2, 3), {"tokens.10": inner})
    norm = [artifact.weights[f"norm.{part}"] for part in ("weight", "bias")]
    both = np.concatenate([meta_heads.normed(inner, norm)[4:], last], axis=1)
    wanted = (both @ values["weight"].T + values["bias"]).T.reshape(2, 2, 3)
    np.testing.assert_allclose(opened.segment(tokens), wanted, atol=1e-4)
