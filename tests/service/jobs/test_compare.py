"""Tests of the comparison of two artifacts: stored features, crops, and the command with real models."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from model.artifact import bundled_artifact, load_artifact
from model.export.artifact import export_artifact
from model.export.options import Backbone, ExportOptions
from service.jobs import compare as compare_module
from service.jobs.compare import CompareOptions, Progress, compare, list_file
from service.jobs.gate import Evidence, judge
from service.jobs.gate_scores import Pair
from service.jobs.live_sample import drawn_live
from service.jobs.own_views import own_views
from service.jobs.verdict import GateRules, LiveFigures
from service.originals import Originals, source_of
from service.search.embedded import open_embedded
from service.search.store import CollectionSpec, Item
from service.settings import Settings
from service.tags import make_tag
from tests.fakes import FakeEngine, fake_artifact, no_file_left_open, photo

RULES = GateRules(min_queries=10)


class Engines:
    """Fake engines for the artifacts `a`, `b`, and so on. The names of the engines that were loaded are recorded."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, FakeEngine]] = []
        self.precision = "fp32"
        self.seeds: dict[str, int] = {}

    def choose(self, artifact, name, *, threads=None):
        engine = FakeEngine(precision=self.precision, seed=self.seeds.get(artifact.fingerprint[0], 0))
        self.loaded.append((artifact.fingerprint[0], engine))
        return SimpleNamespace(engine=engine)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    engines = Engines()
    monkeypatch.setattr(compare_module, "load_artifact", lambda path, derived_dir: fake_artifact(digit=str(path)))
    monkeypatch.setattr(compare_module, "choose_engine", engines.choose)
    return engines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for at in range(24):
        path = tmp_path / "images" / "ab"[at % 2] / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(at))
    return tmp_path / "images"


def test_stored_features_are_not_computed_again(engines: Engines, folder: Path, tmp_path: Path) -> None:
    arguments = (folder, tmp_path, CompareOptions(rules=RULES))
    first = compare(Path("a"), Path("b"), *arguments)
    assert [name for name, _ in engines.loaded] == ["a", "b"]
    assert [engine.images for _, engine in engines.loaded] == [24, 24]
    assert all(engine.closed for _, engine in engines.loaded)
    second = compare(Path("a"), Path("c"), *arguments)
    assert [name for name, _ in engines.loaded] == ["a", "b", "c"]
    assert compare(Path("a"), Path("b"), *arguments) == first
    assert len(engines.loaded) == 3
    assert first.figures == second.figures  # all fake models are alike
    assert first.passed
    assert first.about["champion"]["fingerprint"] == "a" * 64
    assert first.about["set"]["images"] == 24


def test_other_settings_have_other_features(engines: Engines, folder: Path, tmp_path: Path) -> None:
    compare(Path("a"), Path("b"), folder, tmp_path, CompareOptions(rules=RULES))
    for options in (CompareOptions(pooling="mean"), CompareOptions(set_file=tmp_path / "new.json", most=20)):
        before = len(engines.loaded)
        compare(Path("a"), Path("b"), folder, tmp_path, options)
        assert len(engines.loaded) == before + 2
    engines.precision = "bf16"
    verdict = compare(Path("a"), Path("b"), folder, tmp_path, CompareOptions(engine="fastest"))
    assert [engine.images for _, engine in engines.loaded[-2:]] == [24, 24]
    assert verdict.about["challenger"]["precision"] == "bf16"


def test_an_unknown_precision_is_known_after_loading(engines: Engines, folder: Path, tmp_path: Path) -> None:
    compare(Path("a"), Path("b"), folder, tmp_path)
    compare(Path("a"), Path("b"), folder, tmp_path, CompareOptions(engine="fastest"))
    assert [engine.images for _, engine in engines.loaded] == [24, 24, 0, 0]


def test_a_damaged_file_of_features_is_computed_again(engines: Engines, folder: Path, tmp_path: Path) -> None:
    first = compare(Path("a"), Path("b"), folder, tmp_path)
    (path,) = (tmp_path / "gate" / "features").glob("a*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with no_file_left_open():
        assert compare(Path("a"), Path("b"), folder, tmp_path) == first
    assert [name for name, _ in engines.loaded] == ["a", "b", "a"]


def test_images_of_val_are_classified_by_those_of_train(engines: Engines, folder: Path, tmp_path: Path) -> None:
    (folder / "train").mkdir()
    for name in "ab":
        (folder / "val" / name).mkdir(parents=True)
        (folder / "val" / name / "1.png").write_bytes(photo(100 + ord(name)))
        (folder / name).rename(folder / "train" / name)
    verdict = compare(Path("a"), Path("b"), folder, tmp_path, CompareOptions(rules=RULES))
    assert verdict.figures.accuracy is not None
    assert verdict.figures.accuracy.n_queries == 2
    assert "leave-one-out" not in verdict.figures.accuracy.measure
    assert verdict.figures.champion.n_images == 26


def test_images_without_classes_are_embedded_with_their_crops(engines: Engines, folder: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    progress = Progress(advance=lambda count, total: counts.append((count, total)))
    options = CompareOptions(rules=RULES, labels=False)
    verdict = compare(Path("a"), Path("b"), folder, tmp_path, options, progress)
    assert [engine.images for _, engine in engines.loaded] == [72, 72]
    assert verdict.passed
    assert verdict.figures.accuracy is not None
    assert "crops of themselves" in verdict.figures.accuracy.measure
    assert sum(count for count, _ in counts) == 48
    assert {total for _, total in counts} == {24}


def test_a_changed_image_is_an_error_before_any_model_is_loaded(engines: Engines, folder: Path, tmp_path: Path) -> None:
    compare(Path("a"), Path("b"), folder, tmp_path)
    (folder / "a" / "0.png").write_bytes(photo(77))
    with pytest.raises(ValueError, match=r"a/0\.png: an image of the frozen set has changed"):
        compare(Path("a"), Path("c"), folder, tmp_path)
    assert len(engines.loaded) == 2


def test_the_default_list_is_in_the_data_folder(tmp_path: Path) -> None:
    assert list_file(tmp_path, tmp_path / "shop").parent == tmp_path / "gate"
    assert list_file(tmp_path, tmp_path / "shop").name.startswith("shop-")
    assert list_file(tmp_path, tmp_path / "a" / "shop") != list_file(tmp_path, tmp_path / "b" / "shop")


async def fill(data_dir: Path, images: dict[str, list[bytes]]) -> None:
    """Make collections that store their images."""
    store, originals = await open_embedded(data_dir), Originals(data_dir / "originals")
    tag = make_tag("a" * 64, "cls", (28, 28), "fp32")
    for name, content in images.items():
        await store.create(name, CollectionSpec(tag, 8, originals=name != "without"))
        for n, image in enumerate(content):
            digest = await originals.put(image)
            item = Item(f"i{n}", np.eye(8, dtype=np.float32)[n % 8], source=source_of(digest), digest=digest)
            await store.upsert(name, [item], tag=tag)
    await store.close()
    await originals.close()


def test_neighbours_in_collections_are_compared(engines: Engines, folder: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    images = [photo(200 + n) for n in range(20)]
    broken = b"no image"
    asyncio.run(fill(tmp_path, {"shop": [*images, broken], "two": images[:2], "without": images[:5]}))
    arguments = (folder, tmp_path, CompareOptions(rules=RULES))
    before = compare(Path("a"), Path("b"), *arguments)
    assert before.figures.live_neighbours_kept == ()
    said: list[str] = []
    with no_file_left_open(), drawn_live(settings, said.append) as live:
        assert {name: len(digests) for name, (_, digests) in live.collections.items()} == {"shop": 21, "two": 2}
        same = compare(Path("a"), Path("b"), *arguments, Progress(), live)
        engines.seeds["b"] = 5
        other = compare(Path("a"), Path("b"), *arguments, Progress(), live)
    assert same.figures.live_neighbours_kept == (LiveFigures("shop", 20, 1.0),)
    [shown] = other.figures.live_neighbours_kept
    assert 0.2 < shown.kept < 0.95
    assert (other.passed, other.reasons) == (before.passed, before.reasons)
    assert said == []


def test_collections_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    with drawn_live(Settings(data_dir=tmp_path), said.append) as live:
        assert live.collections == {}
    assert said == []
    (tmp_path / "search.sqlite3").write_bytes(b"no database" * 1000)
    with drawn_live(Settings(data_dir=tmp_path), said.append) as live:
        assert live.collections == {}
    assert "cannot be read" in said[0]


def test_crops_depend_on_the_file_and_show_a_part_of_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    views = own_views(image, "ab" * 32, 20)
    for view in views:
        assert view.dtype == np.uint8
        assert view.shape[0] == view.shape[1]
        assert 0.3 * 90 * 160 - 200 <= view.size / 3 <= 90 * 90
    assert all(np.array_equal(one, two) for one, two in zip(views, own_views(image, "ab" * 32, 20), strict=True))
    assert len({view.tobytes() for view in views}) == 20
    assert own_views(image, "cd" * 32, 1)[0].tobytes() != views[0].tobytes()
    grey = [view for view in views if (view[..., 0] == view[..., 1]).all()]
    assert 0 < len(grey) < 10
    assert own_views(np.zeros((1, 3, 3), np.uint8), "ab" * 32, 1)[0].shape == (1, 1, 3)


def test_the_crops_of_version_1_stay_as_they_are() -> None:
    image = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    sides = [len(view) for view in own_views(image, "0" * 64, 6)]
    assert sides == [21, 27, 24, 19, 20, 23]


def shapes(at: int) -> Image.Image:
    """Return an image of its own kind: stripes of a period and a direction that depend on `at`, with noise."""
    rng = np.random.default_rng(at)
    y, x = np.mgrid[0:120, 0:120]
    turn = at * 0.7
    wave = np.sin((x * np.cos(turn) + y * np.sin(turn)) / (2 + at % 9)) + np.sin((x + at * y) / (3 + at % 5))
    colours = rng.uniform(-60, 60, 3)
    pixels = 128 + wave[..., None] * colours + rng.normal(0, 12, (120, 120, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for at in range(24):
        shapes(at).save(folder / f"{at}.png")
    return folder


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with random weights of the same size."""
    artifact = load_artifact(bundled_artifact())
    rng = np.random.default_rng(0)
    weights = {
        key: value if value.ndim < 2 else value.std() * rng.standard_normal(value.shape, np.float32)
        for key, value in artifact.weights.items()
    }
    manifest = artifact.manifest
    backbone = Backbone("random", weights, manifest.config, manifest.preprocess, {}, manifest.licence)
    return export_artifact(backbone, tmp_path_factory.mktemp("random"), ExportOptions()).path


def invoke(data_dir: Path, folder: Path, challenger: Path, *words: str):
    command = ["models", "compare", str(bundled_artifact()), str(challenger), "--data", str(folder)]
    options = [
        "--data-dir",
        str(data_dir),
        "--threads",
        "1",
        "--engine",
        "onnxruntime:fp32",
        "--rule",
        "min_queries=24",
    ]
    return CliRunner().invoke(cli.app, [*command, *options, *words])


def test_the_command_passes_a_model_against_itself_and_refuses_random_weights(
    real_folder: Path, random_model: Path, tmp_path: Path
) -> None:
    same = invoke(tmp_path, real_folder, bundled_artifact(), "--json")
    assert same.exit_code == 0, same.output
    read = json.loads(same.stdout)
    assert read["passed"] is True
    assert read["about"]["champion"] == read["about"]["challenger"]
    assert read["figures"]["accuracy"]["champion"] > 0.3
    assert read["rules"]["min_queries"] == 24

    refused = invoke(tmp_path, real_folder, random_model)
    assert refused.exit_code == 3, refused.output
    lines = refused.stdout.splitlines()
    assert "refused" in lines
    assert any(line.startswith("challenger  random-") for line in lines)
    assert any("collapse" in line or "the challenger is worse" in line for line in lines)
    assert "loading dinov2_vitt14" not in refused.stderr  # the champion's features were stored


def test_the_engine_is_that_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[CompareOptions] = []

    def fake(champion, challenger, folder, data_dir, options, progress, live):
        used.append(options)
        images = np.eye(4, dtype=np.float32)
        return judge(Evidence(Pair(images, images), ["a", "a", "b", "b"]), options.rules)

    monkeypatch.setattr(compare_module, "compare", fake)
    monkeypatch.setenv("DINOV2_ENGINE", "onnxruntime:int8")
    command = ["models", "compare", str(bundled_artifact()), str(bundled_artifact()), "--data", str(tmp_path)]
    out = tmp_path / "verdict.json"
    result = CliRunner().invoke(cli.app, [*command, "--data-dir", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 3, result.output
    assert "the set is too small to decide: 4 queries" in result.stdout
    assert json.loads(out.read_text())["too_small"] is True
    CliRunner().invoke(cli.app, [*command, "--data-dir", str(tmp_path), "--engine", "fastest"])
    assert [options.engine for options in used] == ["onnxruntime:int8", "fastest"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "margin"], "--rule margin: must be KEY=VALUE"),
        (["--rule", "margin=x"], "--rule margin=x: 'x' is not a number"),
        (["--rule", "margins=1"], "unknown gate rule 'margins'"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_errors(tmp_path: Path, words: list[str], message: str) -> None:
    result = invoke(tmp_path, tmp_path, bundled_artifact(), *words)
    assert result.exit_code == 2
    assert message in result.stderr
