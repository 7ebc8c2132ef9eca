"""Load a recipe, which is a TOML file of settings, and apply `key=value` overrides to it.

The recipes of this package are in `training/recipes/`. The key `needs` of a recipe lists settings that the user has to
give, such as the weights to start from.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from model.artifact import MANIFEST, read_manifest
from model.config import CONFIGS
from model.files import name_problem
from model.loading import published, read_model
from model.messages import in_words
from training.config import TrainConfig

RECIPES = Path(__file__).parent / "recipes"
NEEDS = "needs"
EXAMPLES = {"init": "init=dinov2_vits14_reg", "teacher": "teacher=dinov2_vitl14_reg"}


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_config(recipe: str, data: str | Path | Sequence[str], out: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a recipe by its name or from a TOML file, apply `key=value` overrides, and return the settings.

    Raises:
        OSError: the recipe's file cannot be read.
        ValueError: the recipe is unknown (the message lists the names) or is not TOML, an override has no `=`, a key or
            a value is not allowed, or a setting that the recipe needs is not given.
    """
    values, recipe = _read(recipe)
    needs = values.pop(NEEDS, [])
    values |= parse_overrides(overrides)
    for key in ("data", "out", "recipe"):
        if key in values:
            raise ValueError(f"{key}={values[key]} cannot be a setting: use --{key}")
    for key in values:
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(key, TrainConfig.model_fields, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "docs/training-settings.md lists the settings"
            raise ValueError(f"unknown setting {key!r}: {hint}")
    if not isinstance(needs, list) or not set(needs) <= set(TrainConfig.model_fields):
        raise ValueError(f"{NEEDS}={needs!r} in the recipe {recipe} must be a list of settings")
    for key in needs:
        if values.get(key) is None:
            raise ValueError(
                f"the recipe {recipe} needs {key}: add {EXAMPLES.get(key, f'{key}=...')} "
                f"({TrainConfig.model_fields[key].description})"
            )
    if values.get("scale") == "continue" and isinstance(init := values.get("init"), str):
        values = settings_of(init, values) | values
    try:
        return TrainConfig.model_validate({**values, "recipe": recipe, "data": data, "out": out.expanduser()})
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def check_recipe(recipe: str | None) -> str:
    """Return the recipe that the user has given.

    Raises:
        ValueError: none was given. There is no default, because a recipe decides what a run is good for.
    """
    if recipe is None:
        raise ValueError(
            "--recipe is missing: continue trains released weights on your own images, smoke checks that training "
            f"works; the others are {', '.join(name for name in recipe_names() if name not in ('continue', 'smoke'))}"
        )
    return recipe


def settings_of(init: str, given: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of the network and of its preprocessing that a run takes over from its initial weights.

    `given` contains the settings that the recipe and the user give. If they name the network, it is not taken over.

    Raises:
        ValueError: `init` is not a model.
        OSError: a file is missing or cannot be read.
    """
    if given.keys() & {"model", "vit"}:
        return {}
    if (entry := published(init)) is not None and not Path(init).exists():
        return {"model": entry.name}
    is_artifact = (Path(init) / MANIFEST).is_file()  # its manifest is enough; the weights may be gigabytes
    loaded = read_manifest(Path(init)) if is_artifact else read_model(init)
    settings = head_settings(Path(init), given)
    name = next(
        (name for name, config in CONFIGS.items() if config == loaded.config), TrainConfig.model_fields["model"].default
    )
    base, spec = asdict(CONFIGS[name]), loaded.preprocess
    settings |= {
        "model": name,
        "vit": {key: value for key, value in asdict(loaded.config).items() if value != base[key]},
    }
    if spec.resize is not None and spec.crop is not None and not given.keys() & {"eval_resize", "eval_crop"}:
        settings |= {"eval_resize": spec.resize, "eval_crop": spec.crop}
    return settings


def head_settings(run: Path, given: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with which a run continues with the heads of another run, whose folder is `run`.

    The heads have learned already, so the backbone is not frozen at first. The result is empty if `run` is not a run's
    folder with a state, or if the user gives other settings for the heads: the heads are then new.

    Raises:
        ValueError: the settings of the other run are damaged.
    """
    file = run / "config.json"
    if not file.is_file() or not any((run / "states").glob("*.json")):
        return {}
    try:
        theirs = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"init={run}: {file} is damaged ({error})") from error
    names = ("n_prototypes", "head_hidden_dim", "head_bottleneck_dim", "ibot_bottleneck_dim", "shared_head")
    return {
        **{name: theirs[name] for name in names if name in theirs},
        "freeze_backbone": 0.0,
        "freeze_last_layer": 0.0,
    }


def with_hours(overrides: Sequence[str], hours: float | None) -> list[str]:
    """Return the overrides together with the value of the option `--hours`.

    Raises:
        ValueError: the overrides set `epochs` or `hours` too.
    """
    if hours is None:
        return list(overrides)
    for key in parse_overrides(overrides):
        if key in ("epochs", "hours"):
            raise ValueError(f"--hours {hours:g} and {key} contradict each other: --hours chooses the epochs; give one")
    return [*overrides, f"hours={hours!r}"]


def _read(recipe: str) -> tuple[dict[str, object], str]:
    """Read a recipe, given by its name or as the path of a TOML file, and return its settings and its name."""
    path = RECIPES / f"{recipe}.toml"
    if recipe.endswith(".toml"):
        path, recipe = Path(recipe), Path(recipe).stem
    elif recipe not in recipe_names():
        raise ValueError(f"unknown recipe {recipe!r}: give a TOML file, or one of {', '.join(recipe_names())}")
    if problem := name_problem(recipe):  # the name of the recipe becomes part of the model's name
        raise ValueError(f"recipe {path}: {problem}")
    try:
        return tomllib.loads(path.read_text()), recipe
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _parse_value(text: str) -> object:
    """Parse `text` as a TOML value, such as `0.1`, `true` or `{depth = 6}`. Return `text` itself if it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """Parse settings of the form `key=value` into a dictionary. A value that is not TOML is stored as text, and
    the last value of a key counts.

    Raises:
        ValueError: an override has no `=`.
    """
    values: dict[str, object] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} must look like key=value")
        values[key] = _parse_value(text)
    return values
