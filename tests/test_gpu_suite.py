"""Tests of the GPU suite on a host without a GPU: checks that hang, crash or cannot run, and the code of one check on
the CPU.
"""

import json
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the checks are of torch: pip install '.[train]'")

ROOT = Path(__file__).resolve().parents[1]
ROW = "import json; print(json.dumps({'row': {'n': 1}}), flush=True); "


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_suite

    return gpu_suite


def python(suite, code: str, name: str = "it", kind: str = "kind", limit_s: float = 30.0):
    return suite.Check(name, kind, limit_s, command=[sys.executable, "-c", code])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_check_that_hangs_costs_its_time_and_keeps_its_rows(suite) -> None:
    code = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(json.dumps({'row': {'child': child.pid}}), flush=True)\n"
        "print('{\"row\": {\"half', end='', flush=True)\n"
        "print('still here', file=sys.stderr, flush=True)\n"
        "time.sleep(300)"
    )
    found = suite.run_check(python(suite, code), limit_s=2.0)
    assert found["status"] == "timed out"
    assert found["reason"] == "not finished after 2 s"
    assert "still here" in found["messages"]
    (row,) = found["rows"]
    deadline = time.monotonic() + 10
    while alive(row["child"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(row["child"]), "what a check started outlives it"


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
        ("raise ValueError('too wide')", "exit status 1: ValueError: too wide"),
    ],
)
def test_a_check_that_crashes_says_how_and_keeps_its_rows(suite, end: str, words: str) -> None:
    found = suite.run_check(python(suite, ROW + end), limit_s=30.0)
    assert found["status"] == "failed"
    assert words in found["reason"]
    assert found["rows"] == [{"n": 1}]


def test_numbers_that_stray_fail_their_check(suite) -> None:
    code = "import json; print(json.dumps({'row': {'engine': 'torch', 'passed': False}}))"
    found = suite.run_check(python(suite, code), limit_s=30.0)
    assert found["status"] == "failed"
    assert "these rows differ too much from the reference: torch" in found["reason"]


def test_a_check_of_which_nothing_ran_failed(suite) -> None:
    code = "import json; print(json.dumps({'row': {'engine': 'a', 'failed': 'ValueError: no kernel'}}))"
    found = suite.run_check(python(suite, code), limit_s=30.0)
    assert found["status"] == "failed"
    assert found["reason"] == "no engine ran: ValueError: no kernel"


def test_one_crash_costs_one_check_and_a_lack_is_told_once(suite, tmp_path, capsys) -> None:
    lacks = 'print(\'{"skipped": "no such library"}\')'
    checks = [
        python(suite, "raise SystemExit(3)", "first", "a"),
        python(suite, lacks, "second", "b"),
        python(suite, "raise SystemExit('never started')", "third", "b"),
        python(suite, ROW, "fourth", "a"),
    ]
    out = tmp_path / "deep" / "result.json"
    result = suite.run_all(checks, budget_s=120, out=out, head={"benchmark": "gpu_suite"})
    assert json.loads(out.read_text()) == result
    found = result["checks"]
    assert [found[name]["status"] for name in found] == ["failed", "skipped", "skipped", "ok"]
    assert found["third"]["reason"] == "no such library"
    assert found["third"]["seconds"] == 0
    assert "no such library" in capsys.readouterr().out


def test_what_the_budget_leaves_no_time_for_is_skipped_and_the_rest_is_kept(suite, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suite, "LEAST_S", 0.5)
    checks = [python(suite, ROW + "import time; time.sleep(300)", "slow"), python(suite, ROW, "late")]
    result = suite.run_all(checks, budget_s=2, out=tmp_path / "result.json", head={})
    assert result["checks"]["slow"]["status"] == "timed out"
    assert result["checks"]["late"]["status"] == "skipped"
    assert "of the budget are left" in result["checks"]["late"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_check_is_skipped_with_the_reason(suite, tmp_path) -> None:
    checks = suite.all_checks("cuda", tiny=False, official=None)
    assert {check.kind for check in checks} == {
        "device", "cross_entropy", "training_step", "served", "torch", "onnxruntime", "tensorrt"
    }  # fmt: skip
    engines = {
        (check.kind, check.arguments["model"][-3], check.arguments["pixels"])
        for check in checks
        if "pixels" in check.arguments
    }
    assert engines == {
        (kind, size, pixels)
        for kind in ("torch", "onnxruntime", "tensorrt")
        for size in "sblg"
        for pixels in (224, 518)
    }
    result = suite.run_all(checks, budget_s=120, out=tmp_path / "result.json", head={})
    assert {found["status"] for found in result["checks"].values()} == {"skipped"}
    assert all("no GPU" in found["reason"] for found in result["checks"].values())


def test_a_plan_has_time_to_be_built_within_its_check(suite) -> None:
    import gpu_checks

    checks = [check for check in suite.all_checks("cuda", tiny=False, official=None) if check.kind == "tensorrt"]
    assert len(checks) == 8
    for check in checks:
        assert check.arguments["limit_s"] == check.limit_s
        assert check.limit_s - gpu_checks.BESIDES_BUILD_S >= 90


def test_a_gpu_without_bf16_is_measured_in_fp16(suite, monkeypatch) -> None:
    import gpu_checks

    monkeypatch.setattr(gpu_checks, "capability_without_bf16", lambda: (7, 5))
    assert gpu_checks.half_precision() == "fp16"
    monkeypatch.setattr(gpu_checks, "capability_without_bf16", lambda: None)
    assert gpu_checks.half_precision() == "bf16"


def test_the_checks_code_runs_on_a_cpu(suite) -> None:
    arguments = {"device": "cpu", "tiny": True, "model": "dinov2_vits14", "pixels": 224}
    found = suite.run_check(suite.Check("it", "onnxruntime", 120, arguments), limit_s=120)
    assert found["status"] == "ok", found
    (row,) = found["rows"]
    assert row["passed"]
    assert row["images_per_s"] > 0
