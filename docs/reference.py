"""Generate the reference pages from the code: `python docs/reference.py` (or `make docs`).

The pages are settings.md, metrics.md, commands.md, training-settings.md and curation-settings.md. They describe the
settings and metrics of the service, the command line, and the settings of training and curation. A test compares the
stored pages with the output of this script, so that the pages match the code.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from cli import app  # noqa: E402
from service.settings import PREFIX, Settings  # noqa: E402
from service.telemetry import Metrics  # noqa: E402
from training.config import LastPhase, TrainConfig  # noqa: E402
from training.curate.settings import CurateSettings, Section  # noqa: E402

RULES = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))
NOTE = "<!-- Made by docs/reference.py: change the code and run `make docs`. -->\n\n"


def cell(text: str) -> str:
    """Return the text on one line and with escaped pipe characters, for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def settings_page() -> str:
    """Return the Markdown page with the default, allowed values and meaning of every setting of the service."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | {_default(field)} | {_allowed(field)} | {cell(field.description or '')} |"
        for name, field in Settings.model_fields.items()
    ]
    return (
        f"{NOTE}# Settings\n\n"
        "The service reads its settings from the environment. An empty value means the default. If a `DINOV2_*` name\n"
        "is not listed here, the service does not start and suggests the nearest name. Options of `dinov2 serve`\n"
        "override the environment.\n\n"
        "Sizes are in bytes or pixels and times in seconds; the names contain the unit.\n\n"
        "| setting | default | allowed | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _default(field: Any) -> str:
    """Return the text that describes the default value of a setting."""
    if field.default_factory is not None:
        return "the number of CPUs"
    value = field.default
    if value is None:
        return "unset"
    return f"`{value}`"


def _allowed(field: Any) -> str:
    """Return the text that describes the allowed values of a setting."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    bounds = []
    for rule in field.metadata:
        bounds += [f"{words} {getattr(rule, name)}" for name, words in RULES if hasattr(rule, name)]
    return ", ".join(bounds) or _kind(field.annotation)


def _table(fields: Iterable[tuple[str, Any]]) -> str:
    """Return the Markdown table of the fields of a pydantic model."""
    rows = [
        f"| `{name}` | {_training_default(field)} | {cell(_values(field.annotation, field.metadata))} | "
        f"{cell(field.description or '')} |"
        for name, field in fields
    ]
    return "| setting | default | allowed | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def curation_settings_page() -> str:
    """Return the Markdown page with the default, allowed values and meaning of every setting of a curation."""
    fields = CurateSettings.model_fields
    sections = {
        name: field.annotation
        for name, field in fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    parts = [
        f"{NOTE}# Settings of a curation\n\n"
        "A TOML file (`dinov2 curate --config`) or `--set section.key=value` sets them. [curation.md](curation.md)\n"
        "explains the stages.\n\n" + _table((name, field) for name, field in fields.items() if name not in sections)
    ]
    for name, section in sections.items():
        described = inspect.cleandoc(section.__doc__ or "")
        parts.append(f"## `[{name}]`\n\n{described}\n\n" + _table(section.model_fields.items()))
    return "\n".join(parts)


def training_settings_page() -> str:
    """Return the Markdown page with the default, allowed values and meaning of every setting of training."""
    return (
        f"{NOTE}# Settings of training\n\n"
        "A recipe or a `key=value` argument of `dinov2 train` sets them. Values are written as in TOML: `0.1`,\n"
        "`true`, `[0.4, 1.0]`, `{depth = 6}`. A *share* is a number from 0 to 1. [training.md](training.md) explains\n"
        "how to train.\n\n" + _table(TrainConfig.model_fields.items()) + "\n## `last_phase`\n\n"
        "The settings of the end of a run, for example\n"
        "`'last_phase={share = 0.1, global_size = 518, local_size = 98}'`.\n\n" + _table(LastPhase.model_fields.items())
    )


def _training_default(field: Any) -> str:
    """Return the text that describes the default value of a training setting, as TOML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, ""):
        return "unset"
    return f"`{json.dumps(value)}`".replace('"', "")


def _values(annotation: Any, metadata: Any = ()) -> str:
    """Return the text that describes the values that a type annotation allows."""
    origin, parts = get_origin(annotation), get_args(annotation)
    bounds = [bound for item in metadata for bound in _bounds(item)]
    if origin is Annotated:
        return _values(
            parts[0], [*metadata, *(part for item in parts[1:] for part in getattr(item, "metadata", [item]))]
        )
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, UnionType):
        return " or ".join(_values(part, metadata) for part in parts if part is not type(None))
    if origin is tuple and parts[1:] == (...,):
        return f"a list, each: {_values(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} values, each: {_values(parts[0])}"
    words = {str: "text", int: "an integer", float: "a number", bool: "`true`, `false`", Path: "a path"}
    text = words.get(annotation, "a table")
    return f"{text}, {' and '.join(bounds)}" if bounds else text


def _bounds(rule: Any) -> list[str]:
    """Return the bounds that a pydantic rule sets, in words."""
    return [f"{words} {getattr(rule, name)}" for name, words in RULES if getattr(rule, name, None) is not None]


def _kind(annotation: Any) -> str:
    """Return the words for a type, for instance "a number" for `float` or `float | None`."""
    if get_origin(annotation) in (Union, UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not type(None)]
    words = {str: "text", int: "an integer", float: "a number", bool: "`true`, `false`", Path: "a path"}
    return words[annotation]


def metrics_page() -> str:
    """Return the Markdown page with the name, type, labels and meaning of every metric of the service."""
    metrics = Metrics()
    rows = []
    for collector in vars(metrics).values():
        if not hasattr(collector, "_labelnames"):
            continue
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        name = collector._name + ("_total" if collector._type == "counter" else "")
        rows.append(f"| `{name}` | {collector._type} | {labels} | {cell(collector._documentation)} |")
    return (
        f"{NOTE}# Metrics\n\n"
        "`GET /metrics` responds in Prometheus' text format. Times are in seconds. The response also has metrics of\n"
        "the process and of the Python runtime (`process_...`, `python_info`).\n\n"
        "| metric | type | labels | meaning |\n|---|---|---|---|\n" + "\n".join(sorted(rows)) + "\n"
    )


def commands_page() -> str:
    """Return the Markdown page with all commands of `dinov2`, their arguments and their options."""
    parts = [
        f"{NOTE}# Commands\n\n"
        "`make run` installs the command `dinov2` into `.venv-run`. `dinov2 COMMAND --help` shows the same texts,\n"
        "with the allowed ranges.\n"
    ]
    parts += _group(typer.main.get_command(app), "dinov2")
    return "\n".join(parts)


def _group(group: Any, path: str) -> list[str]:
    """Return the Markdown sections of all commands of a group and of its subgroups."""
    parts = []
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            parts += _group(command, f"{path} {name}")
        else:
            parts.append(_command(command, f"{path} {name}"))
    return parts


def _command(command: Any, path: str) -> str:
    """Return the Markdown section of one command, which is a command object of click."""
    params = [param for param in command.get_params(typer.Context(command)) if param.name != "help"]
    arguments = [param for param in params if param.param_type_name == "argument"]
    options = [param for param in params if param.param_type_name == "option" and not param.hidden]
    usage = " ".join([path, *map(_metavar, arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## `{path}`", "", inspect.cleandoc(command.help or ""), "", f"    {usage}", ""]
    if arguments:
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| `{_metavar(argument)}` | {cell(argument.help or '')} |" for argument in arguments]
        lines.append("")
    if options:
        lines += ["| option | default | meaning |", "|---|---|---|", *map(_option, options), ""]
    return "\n".join(lines)


def _metavar(argument: Any) -> str:
    """Return the name of an argument in capitals, with brackets if the argument is optional."""
    name = argument.metavar or argument.name.upper()
    dots = "..." if argument.nargs != 1 else ""
    return f"{name}{dots}" if argument.required else f"[{name}{dots}]"


def _option(option: Any) -> str:
    """Return the table row of an option: its names, default and meaning."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    default = option.default
    if option.required:
        shown = "required"
    elif callable(default) or default in (None, (), [], ""):
        shown = ""
    elif isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = f"`{default}`"
    annotation = option.type_descriptor.annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    allowed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return f"| {names} | {cell(shown)} | {cell((option.help or '') + allowed)} |"


PAGES = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "commands.md": commands_page,
    "training-settings.md": training_settings_page,
    "curation-settings.md": curation_settings_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())
