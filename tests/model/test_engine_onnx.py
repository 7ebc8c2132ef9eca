"""The engine keeps to itself: no files at home, no reports."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """Its telemetry writes a device id below the home folder as soon as it loads; nothing may be there."""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # not CI: there it is silent by itself
    subprocess.run([sys.executable, "-c", "import model.engine_onnx"], cwd=ROOT, env=environment, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
