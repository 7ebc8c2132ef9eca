"""Engines in separate processes, for benchmarks that measure memory or contention between processes.

A worker loads one engine, then answers each JSON line with a JSON line:

    {"do": "run", "batch": 1}                             {"s": 0.08}: one forward pass
    {"do": "load", "at": 12.5, "seconds": 10, "batch": 1} {"done": 117.4, "latencies": [...]}: one request after the
                                                          other from the time `at` on; the last counts partially
    {"do": "memory", "batch": 1}                          {"rss_mb": 210.3, "peak_mb": 250.1 or null}: now, with the
                                                          batch's pixels, and the peak since the last such line

Times are those of `time.monotonic`, which all processes of a machine share.
"""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """The parent's end of a worker process.

    Args:
        engine: "onnxruntime": the service's engine with the `path` of a graph; "graph": the unchanged graph in a plain
            session; "torch": with the `path` of weights, `model` and `depth`.
        size: side of the input in pixels.
        threads: threads per forward pass.
        spinning: whether threads spin while they wait: ONNX Runtime's option; for torch, libgomp's default.
    """

    def __init__(self, engine: str, path: Path, *, size: int, threads: int, spinning: bool, **model: Any) -> None:
        spec = {"engine": engine, "path": str(path), "size": size, "threads": threads, "spinning": spinning, **model}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        if not spinning:
            environment |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
        command = [sys.executable, __file__, json.dumps(spec)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.receive()  # it has loaded

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker died with status {self._process.wait()}; its message is above")
        return dict(json.loads(line))

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # ends its loop
        self._process.wait(30)


def onnx_session(path: Path | bytes, threads: int, *, spinning: bool) -> Any:
    """Return a session of the unchanged graph on ONNX Runtime's CPU provider."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def memory() -> dict[str, float | None]:
    """Return this process's resident memory and its peak since the last call, in MB; None if it cannot be reset."""
    text = Path("/proc/self/status").read_text()
    found = {key: int(value) / 1024 for key, value in re.findall(r"(VmHWM|VmRSS):\s+(\d+)", text)}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return {"rss_mb": found["VmRSS"], "peak_mb": None}
    return {"rss_mb": found["VmRSS"], "peak_mb": found["VmHWM"]}


def load(run: Any, at: float, seconds: float) -> dict[str, Any]:
    """Run one request after the other from `at` to `at + seconds`. The last one counts partially."""
    time.sleep(max(0.0, at - time.monotonic()))
    end, done, latencies = at + seconds, 0.0, []
    while (start := time.monotonic()) < end:
        run()
        now = time.monotonic()
        latencies.append(now - start)
        done += min(1.0, (end - start) / (now - start))
    return {"done": done, "latencies": latencies}


def engine_of(spec: dict[str, Any]) -> Any:
    """Return the engine as a function of pixels."""
    if spec["engine"] == "graph":
        session = onnx_session(Path(spec["path"]), spec["threads"], spinning=spec["spinning"])
        return lambda pixels: session.run(None, {"pixels": pixels})
    if spec["engine"] == "onnxruntime":
        from model.engines.onnxruntime_engine import OnnxEngine

        return OnnxEngine(Path(spec["path"]), threads=spec["threads"], spinning=spec["spinning"]).run
    from dataclasses import replace

    import torch

    from model.config import config_for
    from model.engines.torch_engine import TorchEngine

    config = replace(config_for(spec["model"]), **({"depth": spec["depth"]} if spec.get("depth") else {}))
    torch.set_num_threads(spec["threads"])
    return TorchEngine(Path(spec["path"]), config, threads=spec["threads"], device="cpu").run


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints goes to the messages
    spec = json.loads(sys.argv[1])
    run = engine_of(spec)
    import numpy as np

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    pixels = np.empty(0, np.float32)
    answer({})
    for line in sys.stdin:
        command = json.loads(line)
        shape = (command["batch"], 3, spec["size"], spec["size"])
        if pixels.shape != shape:
            pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
        if command["do"] == "memory":
            answer(memory())
        elif command["do"] == "load":
            answer(load(partial(run, pixels), command["at"], command["seconds"]))
        else:
            start = time.monotonic()
            run(pixels)
            answer({"s": time.monotonic() - start})


if __name__ == "__main__":
    main()
