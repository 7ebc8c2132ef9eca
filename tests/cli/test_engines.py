"""Tests of `dinov2 build-engine`: the options that it passes on, its output, and its errors. tests/model tests the
build.
"""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cli import engines as cli_engines
from model.artifact import ParityRecord, bundled_artifact
from model.engines.parity import ParityError
from model.engines.tensorrt_plans import PlanRecord, graph_spec, make_key
from tests.model.engines.fake_tensorrt import FakeCuda, fake_toolchain

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)
    app.command("build-engine")(cli_engines.build_engine)
    app.command("other")(lambda: None)  # with one command alone, typer drops its name
    return app


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Replace the build by one that always passes on a host with a GPU, and list its calls."""
    toolchain = fake_toolchain(FakeCuda())
    asked: list[SimpleNamespace] = []

    def build_plan(artifact, toolchain, reference, folder, options, *, progress):
        for event in ({"parent": None, "steps": 2}, {"step": 0}, {"done": True}, {"done": True}):
            progress({"phase": "Building engine"} | event)
        asked.append(SimpleNamespace(artifact=artifact, reference=reference, folder=folder, options=options))
        parity = ParityRecord(
            engine="tensorrt",
            precision=options.precision,
            images=len(options.photos),
            max_abs_error=0.01,
            min_cosine_cls=0.99991,
            min_cosine_patches=0.9992,
            neighbour_agreement=1.0,
            batch=64,
        )
        record = PlanRecord(
            key=make_key("0" * 64, options.precision, toolchain, refit=options.refit),
            artifact=artifact.name,
            size=artifact.manifest.input_size,
            sha256="0" * 64,
            bytes=3 << 20,
            passed=True,
            parity=[parity],
            reference="torch fp32",
            fused_attention=0,
            build={},
            created="2026-01-01T00:00:00+00:00",
        )
        return folder / "x.plan", record

    monkeypatch.setattr("model.engines.tensorrt_plans.find_toolchain", lambda library: toolchain)
    monkeypatch.setattr("model.engines.tensorrt_export.build_plan", build_plan)
    return asked


def test_a_plan_is_built_with_what_was_asked(app: typer.Typer, built: list, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (90, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    options = ["--precision", "fp16", "--refit", "--images", str(photos), "--timing-cache", str(tmp_path / "t")]
    command = ["build-engine", "auto", "--data-dir", str(tmp_path), "--time-limit", "60", *options]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    (asked,) = built
    assert asked.artifact.path == bundled_artifact()
    assert asked.folder == tmp_path / "derived" / bundled_artifact().name / "plans"
    assert (asked.options.precision, asked.options.refit, asked.options.refit_from) == ("fp16", True, None)
    assert (asked.options.timing_cache, asked.options.time_limit_s) == (tmp_path / "t", 60)
    assert len(asked.options.photos) == 3
    assert (asked.reference.precision, asked.reference.device) == ("fp32", "cpu")
    assert asked.reference.name == ("torch" if find_spec("torch") else "onnxruntime")
    for line in ("class cosine 0.999910, patch cosine 0.999200", "--engine tensorrt:fp16", "tensorrt 11.4.0 on"):
        assert line in result.output
    assert "Building engine ..." in result.output


def test_fp8_gets_its_ranges_from_the_photos(
    app: typer.Typer, built: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def measure(weights, config, pixels):
        seen.append(pixels.shape)
        return {"blocks.0.attn.qkv": 3.0}

    monkeypatch.setattr("model.engines.activations.measure_activations", measure)
    result = runner.invoke(app, ["build-engine", "auto", "--data-dir", str(tmp_path), "--precision", "fp8"])
    assert result.exit_code == 0, result.output
    assert built[0].options.activations == {"blocks.0.attn.qkv": 3.0}
    assert seen[0][0] == len(built[0].options.photos) > 1
    assert graph_spec(built[0].artifact, "fp8", fake_toolchain(FakeCuda()).library).precision == "fp8"


def test_errors_are_told_in_one_line(app: typer.Typer, built: list, tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments, **named):
        raise ParityError("the bf16 plan differs too much from torch fp32 and was not stored: class cosine 0.9")

    monkeypatch.setattr("model.engines.tensorrt_export.build_plan", fail)
    result = runner.invoke(app, ["build-engine", "auto", "--data-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "was not stored: class cosine 0.9" in result.output
    missing = runner.invoke(app, ["build-engine", str(tmp_path / "none"), "--data-dir", str(tmp_path)])
    assert missing.exit_code == 2
    assert "none" in missing.output


def test_a_host_without_tensorrt_or_gpu_says_so(app: typer.Typer, tmp_path: Path) -> None:
    """The test passes whichever libraries this host has."""
    result = runner.invoke(app, ["build-engine", "auto", "--data-dir", str(tmp_path)])
    output = " ".join(result.output.split())
    if result.exit_code == 0:
        pytest.skip("this host has TensorRT and a GPU")
    assert result.exit_code == 2
    assert any(said in output for said in ("TensorRT is not installed", "no CUDA bindings", "no GPU")), output
