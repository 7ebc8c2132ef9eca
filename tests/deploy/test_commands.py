"""The commands that README and CONTRIBUTING name exist, and CI runs them."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CI = (ROOT / ".ci" / "run").read_text()

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=alone, capture_output=True, text=True, check=False)


def named_in_documents() -> set[str]:
    """Targets in code of the pages for users and contributors."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    return {target for page in pages for target in re.findall(r"(?:^ *|`)make ([a-z][a-z-]+)", page.read_text(), re.M)}


@needs_make
def test_help_is_the_default_and_lists_every_target_that_documents_name() -> None:
    listed = {line.split()[0] for line in make(ROOT).stdout.splitlines()}
    assert listed == {
        "help",
        "run",
        "test",
        "test-service",
        "test-ray",
        "test-cpus",
        "check",
        "docs",
        "bench",
        "hashes",
        "sbom",
        "clean",
    }
    assert {"run", "test"} <= named_in_documents() <= listed


@needs_make
@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("no-such-python", "'no-such-python' does not run: install python3"),
        ("./old-python", "is Python 3.8.18, but 3.11 or newer is needed"),
        ("./bare-python", "apt install python3-venv"),
    ],
)
def test_an_unusable_python_is_told_in_one_line(tmp_path: Path, python: str, said: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stand_ins = {  # by what they are asked: $2 is the code
        "old-python": 'case "$2" in *print*) echo 3.8.18;; *exit*) exit 1;; esac',
        "bare-python": 'case "$2" in *print*) echo 3.11.7;; *ensurepip*) exit 1;; esac',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    result = make(tmp_path, "run", f"PYTHON={python}")
    assert result.returncode != 0
    assert said in result.stderr
    assert not (tmp_path / ".venv-run").exists()


def test_ci_ends_with_the_command_for_tests() -> None:
    assert [line for line in CI.splitlines() if line.strip()][-1] == "make test"
    assert "make check" in CI
    assert "set -euo pipefail" in CI


def test_serving_needs_no_torch_and_extras_bring_it() -> None:
    project = PYPROJECT["project"]
    assert not [line for line in project["dependencies"] if re.match(r"(torch|transformers|tensorrt)\b", line)]
    assert project["optional-dependencies"]["train"] == ["torch>=2.11"]
    everything = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    assert not [line for line in everything if re.match(r"(torchvision|timm|xformers)\b", line)]


def test_constraints_pin_every_requirement() -> None:
    def name(line: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line.strip(), maxsplit=1)[0]).lower()

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name(line): line for line in lines if line.strip() and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in pins.values())
    project = PYPROJECT["project"]
    extras = {extra: lines for extra, lines in project["optional-dependencies"].items() if extra != "tensorrt"}
    wanted = {name(line) for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]}
    assert wanted <= set(pins)
    assert pins["torch"] == "torch==2.13.0"
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()


def test_the_makefile_installs_extras_that_exist() -> None:
    asked = re.findall(r"\.\[([a-z,-]+)\]", (ROOT / "Makefile").read_text())
    assert asked
    assert {extra for group in asked for extra in group.split(",")} <= set(
        PYPROJECT["project"]["optional-dependencies"]
    )
