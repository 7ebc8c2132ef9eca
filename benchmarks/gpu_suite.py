"""Run all checks of this project that need a GPU in less than ten minutes, and write one JSON file with the results.

    python benchmarks/gpu_suite.py [--out FILE] [--budget-s 540] [--official CHECKOUT] [--only PREFIX ...]
    python benchmarks/gpu_suite.py --device cpu --tiny      the same code with tiny models, without a GPU

The checks are defined in benchmarks/gpu_checks.py. They report the device, compare the Triton cross-entropy with its
definition, and measure training steps. They also measure the speed, latency and accuracy of torch in bf16, of ONNX
Runtime with CUDA and of TensorRT, for all published model sizes at 224 and 518 pixels.

Each check runs in a separate process with a time limit. If a check crashes or hangs, its results so far are kept and
the next check runs. The most informative checks come first. The result file is written after every check, so an
interrupted run also has results. The suite installs nothing. Checks that need a missing package are skipped. This file
needs only Python.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LEAST_S = 15.0  # with less time left, no check is started
MESSAGE_CHARACTERS = 1500


@dataclass(frozen=True)
class Check:
    """A check that runs in a separate process.

    If one check of a `kind` is skipped, for instance because a package is missing, all later checks of this kind are
    skipped too.
    """

    name: str
    kind: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()

    def line(self) -> list[str]:
        """Return the command line of the process, which is `command` or else a call of benchmarks/gpu_checks.py."""
        if self.command:
            return list(self.command)
        return [sys.executable, str(HERE / "gpu_checks.py"), self.kind, json.dumps(self.arguments)]


def all_checks(device: str, *, tiny: bool, official: str | None) -> list[Check]:
    """Return all checks in the order in which they run. The most informative checks are first."""
    common: dict[str, Any] = {"device": device, "tiny": tiny}
    found = [
        Check("device", "device", 60, common),
        Check("cross-entropy", "cross_entropy", 60, common),
        Check("training step vits14", "training_step", 120, common | {"preset": "vits14", "batch": 64}),
    ]

    def engine(kind: str, size: str, pixels: int) -> Check:
        # Writing and reading the graph of the giant model takes long, because it has 4 GB. A plan is built, too.
        limit_s = {"torch": 60, "onnxruntime": 90, "tensorrt": 150}[kind] if size != "g" or kind == "torch" else 210
        arguments = common | {"model": f"dinov2_vit{size}14", "pixels": pixels, "limit_s": limit_s}
        return Check(f"{kind} {size} {pixels}", kind, limit_s, arguments)

    kinds = ("torch", "onnxruntime", "tensorrt")
    found.append(Check("served", "served", 150, common))
    found += [engine(kind, size, 224) for size in ("s", "l") for kind in kinds]
    found += [Check("training step vitl14", "training_step", 120, common | {"preset": "vitl14", "official": official})]
    found += [engine(kind, size, 518) for size in ("s", "l") for kind in kinds]
    found += [engine(kind, size, pixels) for kind in kinds for size, pixels in (("b", 224), ("b", 518))]
    found += [engine(kind, "g", pixels) for kind in kinds for pixels in (224, 518)]
    return found


def run_check(check: Check, limit_s: float) -> dict[str, Any]:
    """Run a check and return its outcome.

    Returns:
        A dictionary with the `status`, which is "ok", "skipped", "failed" or "timed out", the `seconds`, and the `rows`
        that the check printed. Unless the status is "ok", it also has the `reason`. A check also fails if the numbers
        in a row differ too much from the reference.
    """
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as messages:
        # In a separate session, so that the processes that the check starts can be ended with it.
        process = subprocess.Popen(
            check.line(), stdout=out, stderr=messages, env=environment, cwd=HERE.parent, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        out.seek(0)
        messages.seek(0)
        lines, said = _json_lines(out.read()), messages.read().strip()[-MESSAGE_CHARACTERS:]
    found: dict[str, Any] = {"status": "ok", "rows": [line["row"] for line in lines if "row" in line]}
    skipped = next((line["skipped"] for line in lines if "skipped" in line), None)
    if code is None:
        found |= {"status": "timed out", "reason": f"not finished after {limit_s:.0f} s", "messages": said}
    elif code != 0:
        by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        found |= {
            "status": "failed",
            "reason": f"{by}: {said.splitlines()[-1] if said else 'no message'}",
            "messages": said,
        }
    elif skipped is not None:
        found |= {"status": "skipped", "reason": skipped}
    elif strays := [row for row in found["rows"] if row.get("passed") is False]:
        named = ", ".join(str(row.get("engine") or row.get("dtype")) for row in strays)
        found |= {"status": "failed", "reason": f"these rows differ too much from the reference: {named}"}
    elif found["rows"] and all("failed" in row for row in found["rows"]):
        found |= {"status": "failed", "reason": f"no engine ran: {found['rows'][0]['failed']}"}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes in the session of a check, even if the check itself has exited."""
    with contextlib.suppress(ProcessLookupError):  # no process of the session is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _json_lines(text: str) -> list[dict[str, Any]]:
    """Return the lines of `text` that are JSON objects. Skip other lines, such as the last line of a killed process."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def run_all(checks: Sequence[Check], budget_s: float, out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Run the checks in order within the time budget, and return all results. Write them to `out` after each check."""
    start = time.monotonic()
    result: dict[str, Any] = head | {"budget_s": budget_s, "checks": {}}
    impossible: dict[str, str] = {}
    for check in checks:
        left = budget_s - (time.monotonic() - start)
        reason = impossible.get("device") or impossible.get(check.kind)
        if reason is None and left < LEAST_S:
            reason = f"only {max(0.0, left):.0f} s of the budget are left"
        if reason is not None:
            found: dict[str, Any] = {"status": "skipped", "reason": reason, "rows": [], "seconds": 0.0}
        else:
            found = run_check(check, min(check.limit_s, left))
            if found["status"] == "skipped":
                impossible[check.kind] = found["reason"]
        result["checks"][check.name] = found
        result["seconds"] = round(time.monotonic() - start, 1)
        write(out, result)
        say(check.name, found)
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result to `path` atomically, so that the file is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def say(name: str, found: dict[str, Any]) -> None:
    """Print the outcome of a check and its rows."""
    print(f"{name:<24}{found['status']:<11}{found['seconds']:>6} s  {found.get('reason', '')}", flush=True)
    for row in found["rows"]:
        print("    " + "  ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    parser.add_argument("--budget-s", type=float, default=540, help="time limit of the whole run in seconds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to test that the code runs")
    parser.add_argument("--official", help="checkout of facebookresearch/dinov2, to compare the training step with")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PREFIX",
        help="run only checks with a name that begins with a PREFIX, and the check device",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the checks and exit")
    arguments = parser.parse_args()
    official = str(Path(arguments.official).resolve()) if arguments.official else None
    checks = all_checks(arguments.device, tiny=arguments.tiny, official=official)
    if arguments.only:
        checks = [c for c in checks if c.name == "device" or c.name.startswith(tuple(arguments.only))]
    if arguments.list:
        print("\n".join(check.name for check in checks))
        return 0
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = arguments.out or RESULTS / f"{date}-gpu-suite{'-tiny' if arguments.tiny else ''}.json"
    head = {"benchmark": "gpu_suite", "date": date, "device": arguments.device, "tiny": arguments.tiny}
    result = run_all(checks, arguments.budget_s, out, head)
    outcomes = [found["status"] for found in result["checks"].values()]
    print(json.dumps({status: outcomes.count(status) for status in sorted(set(outcomes))} | {"out": str(out)}))
    return 1 if {"failed", "timed out"} & set(outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
