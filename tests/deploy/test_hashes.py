"""The files in hashes/: pip installs only these files into the images, and they are those of constraints.txt."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FILES = sorted((ROOT / "hashes").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.strip().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name.strip(), maxsplit=1)[0]).lower()


PINNED = {normal(name): version for name, version in CONSTRAINTS.items()}


def requirements(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Return the version and the hashes of each package in a file."""
    found = {}
    for entry in path.read_text().replace("\\\n", " ").splitlines():
        if entry.strip() and not entry.startswith("#"):
            match = re.match(
                r"([\w.-]+)==([\w.!+-]+)( *;[^-]*(?:-(?!-)[^-]*)*)?((?: +--hash=sha256:[0-9a-f]{64})+) *$", entry
            )
            assert match, f"{path.name}: {entry[:100]}"
            found[normal(match[1])] = (match[2], match[4].split())
    return found


def test_there_is_a_file_for_each_target() -> None:
    assert [path.name for path in FILES] == ["gpu.txt", "serve.txt", "train.txt"]
    for path in FILES:
        assert f"--require-hashes -r hashes/{path.name}" in DOCKERFILE.replace("--no-deps ", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_package_has_hashes_and_the_version_that_was_tested(path: Path) -> None:
    found = requirements(path)
    assert len(found) > 30
    assert all(len(hashes) == len(set(hashes)) >= 1 for _, hashes in found.values())
    for name, (version, _) in found.items():
        assert PINNED.get(name, version) == version, f"{name} is {PINNED.get(name)} in constraints.txt: run make hashes"


@pytest.mark.parametrize(("file", "extra"), [("serve", None), ("gpu", "gpu"), ("train", "train")])
def test_every_dependency_of_a_target_is_in_its_file(file: str, extra: str | None) -> None:
    wanted = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]
    missing = {normal(line) for line in wanted} - set(requirements(ROOT / "hashes" / f"{file}.txt"))
    assert missing == ({"onnxruntime"} if file == "gpu" else set())


def test_what_has_a_hash_is_a_wheel_because_pip_checks_no_hash_of_what_builds_a_source_package() -> None:
    with_hashes = re.findall(r"pip install ([^&\\\n]*--require-hashes[^&\\\n]*)", DOCKERFILE)
    assert len(with_hashes) == len(FILES)
    assert all(line.startswith("--only-binary :all: ") for line in with_hashes)


def test_the_project_is_built_with_a_setuptools_that_has_a_hash() -> None:
    assert "setuptools" in requirements(ROOT / "hashes" / "serve.txt")
    building = re.findall(r"pip (?:install|wheel)[^&\n]*?(?:\"\.\$|\s\.$)", DOCKERFILE, re.MULTILINE)
    assert len(building) == 2
    assert all("--no-build-isolation" in line for line in building)


def test_only_named_exceptions_are_installed_without_hashes() -> None:
    without = [line for line in re.findall(r"pip install ([^&\\\n]*)", DOCKERFILE) if "--require-hashes" not in line]
    exceptions = ("EXTRAS", "/wheels/*.whl", "https://pypi.nvidia.com", '"tensorrt-rtx')
    assert all(any(exception in line for exception in exceptions) for line in without), without
