"""Tests of the table of runtimes: every file has the same functions and imports its runtime only when it opens an
engine.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from model.engines.runtimes import RUNTIMES, Runtime

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=lambda runtime: runtime.name)
def test_every_file_offers_the_same_functions(runtime: Runtime) -> None:
    for function in (runtime.file.fault, runtime.file.open):
        assert list(inspect.signature(function).parameters) == ["request"]
    assert runtime.precisions


def test_every_engine_s_file_is_in_the_table() -> None:
    files = {path.stem for path in (ROOT / "model/engines").glob("*_engine.py")}
    assert {runtime.file.__name__.rpartition(".")[2] for runtime in RUNTIMES.values()} == files  # type: ignore[attr-defined]


def test_the_table_loads_no_runtime() -> None:
    """A service without torch reads the table, and `dinov2 serve --engine torch` must not load ONNX Runtime."""
    names = "{'torch', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'cuda'}"
    code = f"import sys, model.engines.choice; sys.exit(str({names} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
