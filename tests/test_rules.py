"""Checks the rules of ARCHITECTURE.md that an import linter cannot check."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("packages", "pattern", "allowed"),
    [
        # Reading the environment: settings, mirrors of published weights, what torchrun says, and Triton's C compiler.
        # (model/engines/onnxruntime_engine.py sets a variable.)
        (
            ["service", "training", "model"],
            r"os\.(environ\[|environ\.get|getenv)",
            {"service/settings.py", "model/zoo.py", "training/distributed.py", "training/kernels.py"},
        ),
        (["service", "training", "model"], r"\btorchvision\b.*import|import torchvision", set()),
        (["training"], r"torch\.distributed", {"training/distributed.py"}),
        # Decoding images: everything else uses model/decode.py. The other modules read maps of evaluations and
        # images that they have written themselves.
        (
            ["service", "training", "model", "cli"],
            r"Image\.open\(|ImageFile\b|\bcv2\b|imread\(|imageio|decode_(jpeg|png)\(|\btorchvision\.io\b",
            {
                "model/decode.py",
                "training/curate/copies/edits.py",
                "training/evaluate/depth.py",
                "training/evaluate/robustness.py",
                "training/evaluate/segmentation.py",
                "training/pages/report.py",
            },
        ),
        # Listing images: everything else uses model/folder.py.
        (["service", "training", "model", "cli"], r"\.rglob\(|os\.walk\(|scandir\(", {"model/folder.py"}),
        # Pickles: only what this program's own driver and actors of a Ray cluster exchange.
        (
            ["service", "model", "training"],
            r"weights_only\s*=\s*False|pickle\.loads?\(",
            {"training/curate/ray_engine.py"},
        ),
    ],
)
def test_only_where_the_rules_allow(packages: list[str], pattern: str, allowed: set[str]) -> None:
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert files
    found = {str(path.relative_to(ROOT)) for path in files if re.search(pattern, path.read_text())}
    assert found <= allowed


def test_nothing_in_the_tree_names_a_machine() -> None:
    """Code and documents must not contain absolute paths of a particular machine."""
    kinds = {".py", ".md", ".toml", ".yml", ".txt", ""}
    folders = ["service", "model", "training", "benchmarks", "deploy", "docs"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files if path.suffix in kinds}
    assert not [name for name, text in texts.items() if re.search(r"/(home|work|Users)/\w+/", text)]
