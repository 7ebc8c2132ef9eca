"""Tests of the limit on the threads of numpy's matrix products."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import service.__main__ as service_main
from service.settings import Settings

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, numpy, faiss
from threadpoolctl import threadpool_info
from service.blas import use_one_blas_thread
before = threadpool_info()
use_one_blas_thread()
rows = [[(i["filepath"], i["user_api"], i["num_threads"]) for i in info] for info in (before, threadpool_info())]
print(json.dumps(rows))
"""


def test_numpy_uses_one_thread_and_faiss_all(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(result.stdout)
    of_numpy = [path for path, api, _ in before if api == "blas" and "faiss" not in path]
    if not of_numpy:
        pytest.skip("numpy was built with a BLAS library that threadpoolctl does not know")
    assert {threads for path, _, threads in before if path in of_numpy} == {2}
    assert {threads for path, _, threads in after if path in of_numpy} == {1}
    assert [row for row in after if row[0] not in of_numpy] == [row for row in before if row[0] not in of_numpy]


def test_the_service_sets_the_limit_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(service_main, "use_one_blas_thread", lambda: called.append(True))
    service_main.load(Settings(data_dir=tmp_path, threads=1), lambda step: None).engine.close()
    assert called == [True]
