"""Run engines in separate processes, for benchmarks that measure memory or contention between processes.

A worker process loads one engine. Then it reads commands as lines of JSON and answers each with a line of JSON:

    {"do": "run", "batch": 1}
        Run one forward pass. The answer {"s": 0.08} has the seconds.
    {"do": "load", "at": 12.5, "seconds": 10, "batch": 1}
        From the time `at`, run one forward pass after another for `seconds`. The answer {"done": 117.4, "latencies":
        [...]} has the number of passes and the seconds of each pass. The last pass counts partially.
    {"do": "memory", "batch": 1}
        The answer {"rss_mb": 210.3, "peak_mb": 250.1} has the resident memory, which includes the pixels of the batch,
        and the peak since the last such command. The peak is null if it cannot be reset.

The times are those of `time.monotonic`, which is the same for all processes of a machine.
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
    """A worker process, which the parent process starts and sends commands to.

    Args:
        engine: "onnxruntime" for the engine of the service, "graph" for a plain session of ONNX Runtime, or "torch".
        path: path of the ONNX graph, or of the weights for "torch".
        size: side of the input in pixels.
        threads: number of threads per forward pass.
        spinning: whether threads spin while they wait. For torch, true means the default of libgomp.
        model: name (`model`) and number of blocks (`depth`) of the model. Only "torch" needs them.
    """

    def __init__(self, engine: str, path: Path, *, size: int, threads: int, spinning: bool, **model: Any) -> None:
        spec = {"engine": engine, "path": str(path), "size": size, "threads": threads, "spinning": spinning, **model}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        if not spinning:
            environment |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
        command = [sys.executable, __file__, json.dumps(spec)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.receive()  # the first answer says that the engine is loaded

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker exited with status {self._process.wait()}; see its message above")
        return dict(json.loads(line))

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # ends the loop of the worker
        self._process.wait(30)


def onnx_session(path: Path | bytes, threads: int, *, spinning: bool) -> Any:
    """Return a session of ONNX Runtime that runs a graph on the CPU. `path` may also be the bytes of the graph."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def memory() -> dict[str, float | None]:
    """Return the resident memory of this process and its peak since the last call, in MB. Then reset the peak.

    The peak is None if the system does not allow a reset.
    """
    text = Path("/proc/self/status").read_text()
    found = {key: int(value) / 1024 for key, value in re.findall(r"(VmHWM|VmRSS):\s+(\d+)", text)}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return {"rss_mb": found["VmRSS"], "peak_mb": None}
    return {"rss_mb": found["VmRSS"], "peak_mb": found["VmHWM"]}


def load(run: Any, at: float, seconds: float) -> dict[str, Any]:
    """Call `run` repeatedly from the time `at` to `at + seconds`.

    Return the number of calls (`done`) and the seconds of each call (`latencies`). The last call counts partially.
    """
    time.sleep(max(0.0, at - time.monotonic()))
    end, done, latencies = at + seconds, 0.0, []
    while (start := time.monotonic()) < end:
        run()
        now = time.monotonic()
        latencies.append(now - start)
        done += min(1.0, (end - start) / (now - start))
    return {"done": done, "latencies": latencies}


def engine_of(spec: dict[str, Any]) -> Any:
    """Load the engine that `spec` describes, and return it as a function of pixels [B, 3, H, W]."""
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
    os.dup2(2, 1)  # other output of this process goes to standard error
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
