"""The settings of training: each has a range and a description, and impossible values are refused by name."""

import math
import re

import pytest

from training.__main__ import main
from training.config import LastPhase, TrainConfig
from training.recipe import load_config


def load(tmp_path, *overrides, recipe="smoke"):
    return load_config(recipe, "images", tmp_path, list(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("momentum=[2, 3]", "momentum.0=2: must be at most 1; momentum.1=3: must be at most 1"),
        ("weight_decay=[-1, 5]", "weight_decay.0=-1: must be at least 0"),
        ("clip_grad=-1", "clip_grad=-1: must be more than 0"),
        ("layer_decay=0", "layer_decay=0: must be more than 0"),
        ("dino_weight=-1", "dino_weight=-1: must be at least 0"),
        ("blur=[2, 2, 2]", "blur.0=2: must be at most 1; blur.1=2: must be at most 1; blur.2=2: must be at most 1"),
        ("mask_ratio=[0.5, 3]", "mask_ratio.1=3: must be at most 1"),
        ("mask_ratio=[0.5, 0.1]", "mask_ratio=[0.5, 0.1]: the first value must not be more than the second"),
        ("student_temp=0", "student_temp=0: must be more than 0"),
        ("teacher_temp=[0.04, 0]", "teacher_temp.1=0: must be more than 0"),
        ("min_lr=0.1", "min_lr=0.1 must not be more than lr=0.004"),
        ("betas=[0.9, 1.0]", "betas.1=1.0: must be less than 1"),
        ("ibot_bottleneck_dim=8", "ibot_bottleneck_dim=8 needs shared_head=false"),
        ("log_every=0", "log_every=0: must be at least 1"),
    ],
)
def test_a_value_without_sense_is_refused_by_its_name(tmp_path, override, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(tmp_path, override)


def test_a_run_needs_a_loss(tmp_path):
    with pytest.raises(ValueError, match="dino_weight and ibot_weight are both 0"):
        load(tmp_path, "dino_weight=0", "ibot_weight=0.0")


@pytest.mark.parametrize("model", [TrainConfig, LastPhase])
def test_every_number_has_a_range(model):
    """A value far outside any range is refused for every setting that is a number or a list of numbers."""
    required = {"data": "images", "out": "run"} if model is TrainConfig else {}
    numbers = 0
    for name, field in model.model_fields.items():
        text = str(field.annotation)
        if "int" not in text and "float" not in text:
            continue
        numbers += 1
        n = text.count("Annotated") if text.startswith("tuple") else 0
        for bad in (-1e9, math.inf, math.nan):
            value = [bad] * n if n else bad
            with pytest.raises(ValueError, match=name):
                model.model_validate({**required, name: value})
    assert numbers > (40 if model is TrainConfig else 5)


def test_every_setting_is_described():
    fields = {**TrainConfig.model_fields, **LastPhase.model_fields}
    described = {"global_scale", "local_scale", "global_size", "local_size"}  # in the run's own settings
    assert [name for name, field in fields.items() if not field.description and name not in described] == []


@pytest.mark.parametrize(("recipe", "needed"), [("continue", "init"), ("distill", "teacher")])
def test_a_recipe_says_what_it_needs(tmp_path, recipe, needed):
    with pytest.raises(ValueError, match=f"^the recipe {recipe} needs {needed}: add {needed}=dinov2_vit"):
        load(tmp_path, recipe=recipe)
    assert getattr(load(tmp_path, f"{needed}=dinov2_vits14", recipe=recipe), needed) == "dinov2_vits14"


def test_what_a_recipe_needs_must_be_a_setting(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('needs = ["nonsense"]')
    with pytest.raises(ValueError, match=r"needs=\['nonsense'\] in the recipe mine must be a list of settings"):
        load(tmp_path, recipe=str(recipe))


def test_a_recipe_whose_name_no_model_can_have_is_refused_before_the_run(tmp_path):
    recipe = tmp_path / "my recipe.toml"
    recipe.write_text("epochs = 1")
    with pytest.raises(ValueError, match=r"my recipe.toml: name 'my recipe': use up to 64 letters"):
        load(tmp_path, recipe=str(recipe))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher=", "teacher='': must not be empty"),
        ("data=elsewhere", "data=elsewhere cannot be a setting: use --data"),
        ("out=elsewhere", "out=elsewhere cannot be a setting: use --out"),
        ("vit={depth = 'a'}", "vit={'depth': 'a'}: a value has the wrong type"),
        ("vit={layerscale_init = nan}", "vit: layerscale_init=nan must be a finite number"),
        ("seed=9223372036854775807", "seed=9223372036854775807: must be less than 4294967296"),
    ],
)
def test_other_mistakes_are_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, override)


def test_there_is_no_default_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", "--data", "images", "--out", str(tmp_path / "run")])
    assert main() == 2
    assert "--recipe is missing: continue trains released weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
