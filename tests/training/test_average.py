"""Averages of checkpoints: the arithmetic, what is refused, and a fair test of each beside the mean."""

import hashlib
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import cli
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.average import average_checkpoints, average_weights, in_common, knn_of, open_test, split_for
from training.data.dataset import photos_of, split_source
from training.data.sources import open_source
from training.evaluate.knn import evaluate_knn

CONFIG = ViTConfig(embed_dim=16, depth=1, num_heads=2, img_size=28, layerscale_init=1.0)
SPEC = PreprocessSpec(resize=28, crop=28)
SETTINGS = {"held_out_share": 0.25, "seed": 3, "whiten": None, "lr": 1e-3}
FACTS = {"name": "tiny", "recipe": "smoke", "preprocess": SPEC.model_dump(mode="json"), "settings": SETTINGS}


def checkpoint(path, seed, config=CONFIG, settings=None, **facts):
    torch.manual_seed(seed)
    settings = SETTINGS | (settings or {})
    save_checkpoint(path, DinoVisionTransformer(config).state_dict(), config, FACTS | {"settings": settings} | facts)
    return path


@pytest.fixture
def three(tmp_path):
    return [checkpoint(tmp_path / f"{i}.safetensors", i, steps=10 * i, knn={"cls": {"10": 0.5}}) for i in range(3)]


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("apples", (200, 40, 40)), ("pears", (60, 180, 60)), ("plums", (90, 40, 160))):
        for i in range(8):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(-40, 40, (30, 40, 3))
            Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)
    return tmp_path / "photos"


def test_the_mean_of_weights_in_double():
    states = [{"w": torch.tensor([x, 1.0]), "h": torch.tensor([x], dtype=torch.float16)} for x in (1.0, 2.0, 6.0)]
    found = average_weights(iter(states))
    assert torch.equal(found["w"], torch.tensor([3.0, 1.0]))
    assert found["h"].dtype == torch.float16
    small = [{"w": torch.tensor([x])} for x in (1e8, 1.0, 1.0, -1e8)]  # in float32 the ones are lost
    assert average_weights(small)["w"].item() == 0.5
    assert states[0]["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="nothing to average"):
        average_weights([])


def test_a_checkpoint_of_checkpoints_loads_and_says_what_it_is(three, tmp_path):
    average_checkpoints(three, tmp_path / "mean.safetensors")
    weights, config, facts = load_checkpoint(tmp_path / "mean.safetensors")
    assert config == CONFIG
    DinoVisionTransformer(config).load_state_dict(weights, strict=True)
    each = [load_checkpoint(path)[0] for path in three]
    for key in weights:
        torch.testing.assert_close(weights[key], torch.stack([state[key] for state in each]).mean(dim=0))
    assert facts == FACTS | {
        "average_of": [
            {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "steps": 10 * i}
            for i, path in enumerate(three)
        ]
    }


def test_what_all_say_alike_is_kept():
    a = {"recipe": "x", "settings": {"seed": 0, "lr": 1}, "steps": 5, "knn": None, "photos": 3, "name": "n"}
    b = {"recipe": "x", "settings": {"seed": 1, "lr": 1}, "steps": 5, "knn": None, "photos": 4}
    assert in_common([a, b]) == {"recipe": "x", "settings": {"lr": 1}}


def test_what_cannot_be_averaged_is_refused(three, tmp_path):
    out = tmp_path / "mean.safetensors"
    with pytest.raises(ValueError, match="at least two checkpoints, not 1"):
        average_checkpoints(three[:1], out)
    wide = checkpoint(tmp_path / "wide.safetensors", 0, ViTConfig(embed_dim=32, depth=1, num_heads=2, img_size=28))
    with pytest.raises(ValueError, match=r"wide\.safetensors has a different network from .*0\.safetensors"):
        average_checkpoints([three[0], wide], out)
    with pytest.raises(ValueError, match="is one of the checkpoints"):
        average_checkpoints(three, tmp_path / "photos" / ".." / "1.safetensors")
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        average_checkpoints(three, tmp_path / "nowhere" / "mean.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        average_checkpoints([three[0], tmp_path / "other.safetensors"], out)
    assert not out.exists()


def test_whitened_weights_are_refused_and_those_before_the_whitening_are_not(tmp_path):
    kept = [checkpoint(tmp_path / f"step_{i}.safetensors", i, settings={"whiten": 0.1}, steps=i) for i in range(2)]
    last = checkpoint(tmp_path / "last.safetensors", 2, settings={"whiten": 0.1}, steps=9, knn={}, whitened=True)
    with pytest.raises(ValueError, match=r"last\.safetensors is whitened"):
        average_checkpoints([*kept, last], tmp_path / "mean.safetensors")
    average_checkpoints(kept, tmp_path / "mean.safetensors")
    average_checkpoints([*kept, tmp_path / "mean.safetensors"], tmp_path / "again.safetensors")


def test_each_is_tested_as_its_run_would(three, photos, tmp_path):
    mean = tmp_path / "mean.safetensors"
    average_checkpoints(three, mean)
    fair = open_test(three, str(photos))
    accuracies, notes = knn_of(three, mean, fair, ks=(1, 5))
    assert notes == []
    source = open_source(photos, tmp_path)
    known, held_out = (photos_of(part) for part in split_source(source, SETTINGS["held_out_share"], SETTINGS["seed"]))
    assert len(fair.test) == len(held_out) == 6
    for path, found in zip([*three, mean], accuracies, strict=True):
        weights, config, _ = load_checkpoint(path)
        model = DinoVisionTransformer(config)
        model.load_state_dict(weights)
        assert found == evaluate_knn(model, known, held_out, SPEC, (1, 5))["cls"]


def test_only_photos_that_all_held_out_are_fair(photos, tmp_path):
    facts = [{"settings": {"held_out_share": 0.5, "seed": seed}} for seed in (0, 1)]
    source = open_source(photos, tmp_path)
    fair = split_for(source, facts)
    known, test = fair.searched, fair.test
    held_out = [{photo.name for photo in photos_of(split_source(source, 0.5, seed)[1])} for seed in (0, 1)]
    assert {photo.name for photo in test} == held_out[0] & held_out[1]
    assert len(known) + len(test) == 24
    assert {photo.name for photo in known}.isdisjoint({photo.name for photo in test})
    with pytest.raises(ValueError, match=r"held out by every checkpoint \(held_out_share=0.0 seed=0"):
        split_for(source, [{"settings": {"held_out_share": 0.0}}, *facts])
    one_class = open_source(photos / "pears", tmp_path)
    with pytest.raises(ValueError, match="images of the part that k-NN searches have 1 class"):
        split_for(one_class, facts)


def test_train_and_val_are_the_split_if_they_are_there(photos, tmp_path):
    for part, name in (("train", "apples"), ("train", "pears"), ("val", "plums")):
        (tmp_path / "split" / part).mkdir(parents=True, exist_ok=True)
        (photos / name).rename(tmp_path / "split" / part / name)
    (tmp_path / "split" / "val" / "pears").mkdir()  # without a class of train in val, every accuracy would be 0 %
    (tmp_path / "split" / "train" / "pears" / "0.png").rename(tmp_path / "split" / "val" / "pears" / "0.png")
    fair = split_for(open_source(tmp_path / "split", tmp_path), [{}, {"settings": {"seed": 5}}])
    assert {photo.label for photo in fair.test} == {"plums", "pears"}
    assert len(fair.searched) == 15


def test_the_command_prints_a_table_and_reads_tars_too(three, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        file.add(photos, "photos")
    mean = tmp_path / "mean.safetensors"
    command = ["average", *map(str, three), "--out", str(mean)]
    quiet = CliRunner().invoke(cli.app, command)
    assert quiet.exit_code == 0, quiet.output
    assert "k-NN" not in quiet.output
    for data in (photos, tmp_path / "photos.tar"):
        result = CliRunner().invoke(cli.app, [*command, "--data", str(data)])
        assert result.exit_code == 0, result.output
        assert "their mean" in result.output
        assert "class token, 6 images that no checkpoint was trained on" in result.output
    refused = CliRunner().invoke(cli.app, ["average", str(three[0]), "--out", str(mean)])
    assert refused.exit_code == 2
    assert "at least two" in refused.output


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_with_the_checkpoint_and_the_tensor(three, tmp_path, bad):
    state, config, facts = load_checkpoint(three[1])
    state["blocks.0.mlp.fc1.weight"][0, :2] = bad
    save_checkpoint(three[1], state, config, facts)
    out = tmp_path / "mean.safetensors"
    result = CliRunner().invoke(cli.app, ["average", *map(str, three), "--out", str(out)])
    assert result.exit_code == 2
    size = state["blocks.0.mlp.fc1.weight"].numel()
    words = f"1.safetensors: the tensor blocks.0.mlp.fc1.weight contains 2 of {size} values that are NaN or infinite"
    assert words in result.stderr
    assert not out.exists()


def test_a_mean_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the mean cannot be used: the tensor w contains 1 of 2 values"):
        average_weights([{"w": torch.tensor([1.0, torch.inf])}, {"w": torch.tensor([1.0, -torch.inf])}])


def test_images_without_a_label_and_values_of_k_above_the_number_of_images_are_left_out(three, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        for image in sorted(photos.rglob("*.png")):
            file.add(image, str(image.relative_to(photos)))
        for i in range(4):
            file.add(sorted(photos.rglob("*.png"))[i], f"lost{i}.png")
    mean = tmp_path / "mean.safetensors"
    command = ["average", *map(str, three), "--out", str(mean), "--data", str(tmp_path / "photos.tar")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    fair = open_test(three, str(tmp_path / "photos.tar"))
    assert len(fair.searched) + len(fair.test) == 24
    assert sum(int(note.split()[0]) for note in fair.notes) == 4
    assert f"class token, {len(fair.test)} images" in result.stdout
    assert all(f"note: {note}" in result.stdout for note in fair.notes)
    found, notes = knn_of(three, mean, fair, ks=(1, 10, 50))
    assert [list(accuracy) for accuracy in found] == [[1, 10]] * 4
    assert notes == [*fair.notes, f"k-NN for k=50 is left out: an image has only {len(fair.searched)} neighbours"]
    with pytest.raises(ValueError, match=r"0\.safetensors: no k-NN: k-NN for k=50 is left out"):
        knn_of(three, mean, fair, ks=(50,))


def test_a_table_lacks_the_values_of_k_that_were_left_out(three, photos, tmp_path):
    for name in ("apples", "pears", "plums"):
        for i in range(3, 8):
            (photos / name / f"{i}.png").unlink()
    for path in three:
        state, config, facts = load_checkpoint(path)
        save_checkpoint(path, state, config, facts | {"settings": {"held_out_share": 0.4, "seed": 3}})
    command = ["average", *map(str, three), "--out", str(tmp_path / "mean.safetensors"), "--data", str(photos)]
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == 2
    assert "k-NN for k=10 and 20 is left out: an image has only 6 neighbours" in refused.stderr
    save = photos / "apples" / "0.png"
    for i in range(20, 30):
        (photos / "apples" / f"{i}.png").write_bytes(save.read_bytes())
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "k=10" in result.stdout
    assert "k=20 " not in result.stdout.partition("note:")[0]
    assert "note: k-NN for k=20 is left out" in result.stdout


def test_bad_paths_and_bad_data_are_found_before_the_mean_is_computed(three, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("training.average.average_weights", lambda *_: pytest.fail("averaged"))
    mean = tmp_path / "mean.safetensors"
    for out, data, words in (
        ("s3://bucket/mean.safetensors", photos, "is an address, but results are written to local files only"),
        (tmp_path, photos, "is a folder: give a file"),
        (three[0] / "mean.safetensors", photos, "0.safetensors is not a folder"),
        (mean, tmp_path / "nowhere", "nowhere"),
        (mean, photos / "plums", "have 1 class"),
    ):
        result = CliRunner().invoke(cli.app, ["average", *map(str, three), "--out", str(out), "--data", str(data)])
        assert result.exit_code == 2, result.output
        assert words in result.stderr
