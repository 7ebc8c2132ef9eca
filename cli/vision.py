"""The commands of the vision tasks, such as `dinov2 segment`. The commands are generated from the tasks' options, so
each command accepts the options of its endpoint.

A task's options are read when its command runs or prints its help, because reading them imports numpy and pydantic.
"""

import json
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from cli.shared import DATA, ArtifactsDirOption, EngineOption, ServedModelOption, ThreadsOption, fail
from service.vision.tasks import SUMMARIES

_SUFFIXES = {"application/json": ".json", "image/png": ".png", "application/x-npy": ".npy"}


class VisionCommand(typer.core.TyperCommand):
    """The command of one vision task."""

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(
            name, help=f"{summary}.", short_help=f"{summary}.", callback=partial(run_task, name), rich_markup_mode=None
        )

    def get_params(self, ctx: Any) -> list[Any]:
        if not self.params:
            self.params = _parameters(str(self.name))
        return super().get_params(ctx)


class Commands(typer.core.TyperGroup):
    """The group of all commands, including those of the vision tasks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, summary in SUMMARIES.items():
            self.add_command(VisionCommand(name, summary))


def _parameters(name: str) -> list[Any]:
    """Return the parameters of a task's command. Typer derives them from the signature of a function."""
    from service.vision.tasks import task

    found = task(name)
    several = f"{found.images[0]} to {found.images[1]} image files."
    kind = list[Path] if found.many else Path
    types: dict[str, tuple[Any, Any]] = {
        "images": (Annotated[kind, typer.Argument(help=several if found.many else "Image file.")], ...),
        "out": (
            Annotated[Path | None, typer.Option("--out", "-o", help="File for the answer. Default: print JSON.")],
            None,
        ),
        "model": (ServedModelOption, "auto"),
        "data_dir": (ArtifactsDirOption, DATA),
        "engine": (EngineOption, "auto"),
        "threads": (ThreadsOption, None),
    }
    for field, info in found.options.model_fields.items():
        if field in types:
            continue
        about = (info.description or field).strip()
        about = f"{about[0].upper()}{about[1:]}."
        if field == "format":
            about = f"Format of the answer: {', '.join(found.formats)}. Default: the first that suits the file."
        option: Any = bool | None if info.annotation in (bool, bool | None) else str | None
        types[field] = (Annotated[option, typer.Option(help=about)], None)

    def command(**values: Any) -> None:
        raise AssertionError("only the signature is used")

    command.__annotations__ = {field: annotation for field, (annotation, _) in types.items()}
    parameters = [
        Parameter(
            field, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is ... else default, annotation=type_
        )
        for field, (type_, default) in types.items()
    ]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return list(typer.main.get_command(app).params)


def run_task(
    name: str,
    images: Path | list[Path],
    out: Path | None,
    model: str,
    data_dir: Path,
    engine: str,
    threads: int | None,
    **options: Any,
) -> None:
    """Run a task on image files, and print or write its answer."""
    import orjson

    from service.errors import ServiceError
    from service.vision.local import open_vision
    from service.vision.task import File

    paths = [images] if isinstance(images, Path) else list(images)
    given = {option: value for option, value in options.items() if value is not None}
    try:
        if "format" in options and "format" not in given:
            given["format"] = _format_for(name, out)
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"{out}: the folder {out.parent} does not exist")
        answer = open_vision(model, data_dir, engine, threads).run(name, paths, **given)
        if isinstance(answer, File):
            if out is None:
                raise ValueError(f"format {given.get('format')} is a file: give its name with -o")
            out.write_bytes(answer.data)
        elif out is None:
            typer.echo(json.dumps(orjson.loads(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))))
        else:
            out.write_bytes(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))
    except ServiceError as error:
        raise fail(error.detail) from error
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise fail(error) from error


def _format_for(name: str, out: Path | None) -> str:
    """Return the first format of a task that suits the name of the file.

    Raises:
        ValueError: none of the task's formats suits the file's name.
    """
    from service.vision.tasks import task

    formats = task(name).formats
    suffix = ".json" if out is None else out.suffix.lower()
    for format_, media_type in formats.items():
        if _SUFFIXES[media_type] == suffix:
            return format_
    suffixes = ", ".join(dict.fromkeys(_SUFFIXES[kind] for kind in formats.values()))
    raise ValueError(f"{out}: {name} writes files that end in {suffixes}; choose another format with --format")
