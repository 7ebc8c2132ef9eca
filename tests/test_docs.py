"""Checks that the documentation agrees with the code: the reference pages, the links, and the README's file tree."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "metrics.md", "commands.md"])
def test_reference_pages_are_made_from_the_code(reference: ModuleType, name: str) -> None:
    """`make docs` must reproduce the committed reference pages."""
    assert (ROOT / "docs" / name).read_text() == reference.PAGES[name]()


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
