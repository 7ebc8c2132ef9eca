"""Tests of the command line: the commands that it lists, the input that it refuses, and the export of a checkpoint."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from model.artifact import bundled_artifact, load_artifact, read_manifest
from model.zoo import ENTRIES

torch = pytest.importorskip("torch", reason="training and export need torch: pip install '.[train]'")
runner = CliRunner()


def test_every_option_and_command_has_help() -> None:
    for command in ("serve", "embed", "train", "compare", "average", "report", "export", "build-engine"):
        result = runner.invoke(cli.app, [command, "--help"])
        assert result.exit_code == 0
        info = next(c for c in cli.app.registered_commands if (c.name or c.callback.__name__) == command)
        assert info.callback.__doc__
    for parameter in (p for c in cli.app.registered_commands for p in _options(c)):
        assert parameter.help, parameter.name


def _options(command) -> list:
    import typer

    return typer.main.get_command_from_info(command, pretty_exceptions_short=False, rich_markup_mode=None).params


def test_models_lists_artifacts_and_published_backbones(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["models", "--json", "--data-dir", str(tmp_path)])
    listed = json.loads(result.stdout)
    assert [row["name"] for row in listed["published"]] == list(ENTRIES)
    assert [row["path"] for row in listed["artifacts"]] == [str(bundled_artifact())]
    table = runner.invoke(cli.app, ["models", "--data-dir", str(tmp_path)]).stdout
    assert read_manifest(bundled_artifact()).name in table


def checkpoint(path: Path) -> Path:
    from model.checkpoint import save_checkpoint
    from model.config import ViTConfig
    from model.vit import DinoVisionTransformer

    torch.manual_seed(0)
    config = ViTConfig(embed_dim=48, depth=2, num_heads=3, img_size=70, layerscale_init=0.5)
    save_checkpoint(path, DinoVisionTransformer(config).state_dict(), config, {"recipe": "none", "seed": 0})
    return path


def test_a_checkpoint_becomes_an_artifact(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c.safetensors")
    card = tmp_path / "card.md"
    card.write_text("# mine\n")
    options = ["--resize", "80", "--crop", "70", "--weights-dtype", "float16", "--name", "mine", "--card", str(card)]
    result = runner.invoke(cli.app, ["export", str(source), "--out", str(tmp_path / "artifacts"), *options])
    assert result.exit_code == 0, result.output
    assert "parity on 16 images" in result.stdout
    (folder,) = (tmp_path / "artifacts").iterdir()
    manifest = load_artifact(folder).manifest
    assert manifest.name == "mine"
    assert (manifest.preprocess.resize, manifest.preprocess.crop) == (80, 70)
    assert manifest.provenance == {"recipe": "none", "seed": 0}
    assert manifest.files["README.md"]


def test_further_graphs_and_the_gate_are_told(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    photos = tmp_path / "photos"
    for index, name in enumerate(["train/a/1", "train/b/2", "train/b/3", "val/a/4", "val/b/5"]):
        pixels = np.random.default_rng(index).integers(0, 255, (90, 80, 3), dtype=np.uint8)
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    command = ["export", str(checkpoint(tmp_path / "c.safetensors")), "--out", str(tmp_path / "out"), "--crop", "70"]
    asked = ["--sizes", "70, dynamic", "--precision", "bf16,int8", "--outputs", "cls,patches,registers,layer.0"]
    result = runner.invoke(cli.app, [*command, *asked, "--images", str(photos)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("model-70-bf16.onnx: not compared: ")]
    assert [
        line
        for line in lines
        if line.startswith("model-dynamic-int8.onnx at 84x112: parity on 5 images with torch float32: ")
    ]
    assert "model-70-int8.onnx" in result.stdout
    assert "serve: gate " in result.stdout
    assert "of 2 images" in result.stdout
    (folder,) = (tmp_path / "out").iterdir()
    assert len(load_artifact(folder).manifest.graphs) == 4


def test_parity_photos_come_from_a_folder(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (90, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index}.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
    command = ["export", str(checkpoint(tmp_path / "c.safetensors")), "--out", str(tmp_path), "--crop", "70"]
    result = runner.invoke(cli.app, [*command, "--images", str(photos)])
    assert result.exit_code == 0, result.output
    assert "parity on 3 images" in result.output
    assert "skipped" in result.output
    nothing = runner.invoke(cli.app, [*command, "--images", str(tmp_path / "none")])
    assert nothing.exit_code == 2
    assert "at least two readable images" in nothing.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "unknown model 'no_such_model'"),
        (["nowhere/checkpoint.safetensors"], "nowhere/checkpoint.safetensors: no such file"),
        (["tests"], "tests is a folder without a model"),
        (["FOREIGN"], "add --arch"),
        (["OWN", "--crop", "300"], "does not fit into resize"),
        (["OWN", "--crop", "71"], "must be a multiple of patch_size=14"),
        (["OWN", "--sizes", "70,100"], "size '100': must be a multiple of the patch size 14"),
        (["OWN", "--precision", "fp4"], "precision 'fp4': one of fp32, fp16, bf16, int8"),
        (["OWN", "--outputs", "cls,patches,registers,layer.99"], "output 'layer.99'"),
    ],
)
def test_export_says_what_is_wrong_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    files = {"OWN": str(checkpoint(tmp_path / "own.safetensors")), "FOREIGN": str(tmp_path / "foreign.pth")}
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, files["FOREIGN"])
    source, *options = [files.get(argument, argument) for argument in arguments]
    result = runner.invoke(cli.app, ["export", source, "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", ".hidden", "", "a b", "a\n", "x" * 65])
@pytest.mark.parametrize("file_format", ["artifact", "timm"])
def test_a_bad_name_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file_format: str
) -> None:
    """`--name ../../evil` once left files outside of `--out`, and other bad names were found after the export."""
    monkeypatch.setattr("model.downloads.download", lambda *args: pytest.fail("downloads the model"))
    options = ["--images", "none"] if file_format == "artifact" else ["--format", file_format]
    command = ["export", "dinov2_vits14", "--out", str(tmp_path / "a" / "b"), "--name", name, *options]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: name {name!r}: use up to 64 letters")
    assert not list(tmp_path.iterdir())


def test_a_name_made_of_a_file_name_is_checked_too(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "my model (1).safetensors")
    result = runner.invoke(cli.app, ["export", str(source), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "name 'my model (1)'" in result.output
    assert "--name sets another name" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("file_format", "files"), [("meta", 1), ("timm", 2), ("transformers", 3)])
def test_a_run_is_exported_to_other_formats(tmp_path: Path, file_format: str, files: int) -> None:
    checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    command = ["export", str(tmp_path / "run"), "--format", file_format, "--data-dir", str(tmp_path / "data")]
    result = runner.invoke(cli.app, [*command, "--crop", "70"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "data" / "exported" / f"run-{file_format}"
    assert result.stdout.startswith(f"{folder}: ")
    assert len(list(folder.iterdir())) == files
    differs = file_format != "meta"  # the model uses Meta's rule for models without registers
    assert ("note: features are equal only at 70x70 pixels" in result.stdout) == differs
    assert "next: " in result.stdout
    refused = runner.invoke(cli.app, [*command, "--sizes", "70"])
    assert refused.output == f"error: --sizes applies to artifacts, not to --format {file_format}\n"


def test_a_run_and_an_artifact_become_artifacts(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    options = ["--out", str(tmp_path / "first"), "--crop", "70", "--licence", "MIT"]
    result = runner.invoke(cli.app, ["export", str(tmp_path / "run"), *options])
    assert result.exit_code == 0, result.output
    [first] = (tmp_path / "first").iterdir()
    result = runner.invoke(cli.app, ["export", str(first), "--out", str(tmp_path / "again"), "--no-keep-onnx"])
    assert result.exit_code == 0, result.output
    [again] = (tmp_path / "again").iterdir()
    one, other = load_artifact(first).manifest, load_artifact(again, derived_dir=tmp_path / "derived").manifest
    assert (one.name, one.fingerprint, one.licence) == ("run", other.fingerprint, "MIT")
    assert (other.name, other.licence, other.provenance) == (one.name, one.licence, one.provenance)


def test_train_names_the_recipes_it_knows(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["train", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--recipe", "x"])
    assert result.exit_code == 2
    assert "smoke" in result.output


def test_commands_that_need_torch_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (
        ["train", "--data", str(tmp_path), "--out", "o"],
        ["compare", "--data", str(tmp_path), "--out", "o"],
        ["average", "a.safetensors", "b.safetensors", "--out", "o"],
        ["report", "o"],
    ):
        result = runner.invoke(cli.app, command)
        assert result.exit_code == 2
        assert ".[train]" in result.output


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_the_fit_is_chosen_at_export(tmp_path: Path, fit: str) -> None:
    source = str(checkpoint(tmp_path / "c.safetensors"))
    folders = {}
    for name, options in (("as-is", ["--resize", "80"]), (fit, ["--fit", fit])):
        command = ["export", source, "--out", str(tmp_path / name), "--crop", "70", "--sizes", "98", *options]
        result = runner.invoke(cli.app, command)
        assert result.exit_code == 0, result.output
        [folders[name]] = (tmp_path / name).iterdir()
    cropped, fitted = (load_artifact(folder).manifest for folder in folders.values())
    assert (fitted.preprocess.fit, fitted.preprocess.crop, fitted.preprocess.resize) == (fit, 70, None)
    assert fitted.input_size == (70, 70)
    assert fitted.fingerprint != cropped.fingerprint
    assert {record.file for record in fitted.parity} == {record.file for record in cropped.parity}
    refused = runner.invoke(cli.app, ["export", source, "--out", str(tmp_path), "--fit", fit, "--resize", "256"])
    assert refused.output == f"error: resize=256 has no effect with fit={fit}: crop sets the size of the input\n"
