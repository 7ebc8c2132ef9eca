"""Checks that the documentation agrees with the code: the reference pages, the links, and the README's file tree."""

import importlib.util
import itertools
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def script(name: str) -> ModuleType:
    """Import a script in docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("reference")


@pytest.mark.parametrize(
    "name", ["settings.md", "metrics.md", "commands.md", "training-settings.md", "curation-settings.md"]
)
def test_reference_pages_are_made_from_the_code(reference: ModuleType, name: str) -> None:
    """`make docs` must reproduce the committed reference pages."""
    assert (ROOT / "docs" / name).read_text() == reference.PAGES[name]()


def test_the_gallery_shows_the_commands_of_its_script() -> None:
    """`python docs/gallery.py` must reproduce the committed page, and there is a picture for each command."""
    gallery = script("gallery")
    assert (ROOT / "docs" / "gallery.md").read_text() == gallery.page()
    pictures = {path.name for path in (ROOT / "docs" / "gallery").iterdir()}
    assert pictures == {gallery.picture_name(case) for case in gallery.CASES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_conflict_of_a_merge_is_left(page: Path) -> None:
    assert not re.search("^(<{7}|>{7}) ", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("case", script("gallery").CASES, ids=lambda case: case.heading)
def test_the_options_of_the_gallery_exist(case: Any) -> None:
    from service.options import parse_options
    from service.vision import tasks

    name, *words = shlex.split(case.command)
    options = dict(itertools.pairwise(words))
    given = {word[2:].replace("-", "_"): value for word, value in options.items() if word.startswith("--")}
    parse_options(tasks.task(name).options, given)


def test_reference_pages_are_complete(reference: ModuleType) -> None:
    """Each setting, metric and command must be named on its reference page."""
    from cli import app
    from service.settings import Settings
    from service.telemetry import Metrics

    settings, metrics, commands = (reference.PAGES[name]() for name in ("settings.md", "metrics.md", "commands.md"))
    assert not [name for name in Settings.model_fields if f"`DINOV2_{name.upper()}`" not in settings]
    served = re.findall(r"^# TYPE (dinov2_\w+)", Metrics().render().decode(), re.MULTILINE)
    assert len(served) > 15
    assert not [name for name in served if f"`{name}`" not in metrics and not name.endswith("_created")]
    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert len(names) > 8
    assert not [name for name in names if f"## `dinov2 {name}`" not in commands]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_readme_lists_the_folders_that_are_there() -> None:
    block = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("```")[2].partition("```")[0]
    listed = set(re.findall(r"^(\w+)/", block, re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.partition("/")[0] for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    assert listed == folders


def test_files_named_in_the_documentation_exist() -> None:
    """A path in backticks must exist, such as `service/errors.py`. Wildcards and files that a run writes are exempt."""
    folders = "benchmarks|cli|deploy|docs|model|service|tests|training"
    pattern = re.compile(rf"`((?:{folders})/[\w/.-]+\.(?:py|md|toml|yml|yaml|npz|html))`")
    missing = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        if page.name not in ("CHANGELOG.md", "log.md")
        for name in pattern.findall(page.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing
