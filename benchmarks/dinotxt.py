"""Measure the time and memory of dino.txt's networks at the published size, with random weights.

    python benchmarks/dinotxt.py [--threads 2] [--out results.json]

The weights are written to a temporary folder (2.3 GB). Each way of running the text encoder has its own process:

- service: as in the service: ONNX Runtime with mapped weights, and shared prefixes of sentences computed once
- prepacked: the same as `service`, but with weights that ONNX Runtime repacks for the CPU
- unshared: the same as `service`, but with one forward pass per 50 sentences, without shared prefixes
- numpy: the same computation as `service` in numpy, with scipy's error function

A sentence has the form "a photo of a {}." with one or two tokens for the word. `cpu_s` is the total CPU time of all
threads. If other processes use the CPU, `wall_s` is longer than `cpu_s` divided by the number of threads.
`anonymous_mb` is memory that only this process uses. `peak_mb` includes the mapped file, which the system can drop.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.cpus import available_cpus
from model.dinotxt.graphs import text_encoder_graph
from model.dinotxt.networks import TextEncoder, VisionHead
from model.dinotxt.prompts import PromptTree, count_nodes, prompt_tree
from model.dinotxt.store import write_safetensors
from model.dinotxt.towers import HEAD_WIDTH, text_encoder_shape
from model.engines.onnxruntime_engine import load_runtime
from model.weights import read_tensors
from tests.model.dinotxt_files import random_tensors, text_encoder_shapes, vision_head_shapes

ROOT = Path(__file__).resolve().parents[1]
START, END, SENTENCE = 49406, 49407, (320, 1125, 539, 320)  # "a photo of a"
WAYS = ("service", "prepacked", "unshared", "numpy")
Prompts = list[list[int]]


def prompts(words: int, seed: int, beginnings: int = 1) -> Prompts:
    """Return the tokens of each word in each of several sentences with different beginnings of the same length."""
    rng = np.random.default_rng(seed)
    names = [rng.integers(300, 49000, 1 + i % 2).tolist() for i in range(words)]
    starts = [[START, *(token + 1000 * number for token in SENTENCE)] for number in range(beginnings)]
    return [[*start, *name, 269, END] for start in starts for name in names]


def in_numpy(path: Path) -> Callable[[Prompts], np.ndarray]:
    """Return the text encoder in numpy. All sentences are one tree."""
    from scipy.special import erf

    tensors = read_tensors(path)
    shape = text_encoder_shape(tensors)
    heads = shape.width // HEAD_WIDTH

    def norm(key: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(1e-5))
        return centred / deviation * tensors[f"{key}.weight"] + tensors[f"{key}.bias"]

    def attention(key: str, x: np.ndarray, tree: PromptTree) -> np.ndarray:
        q, k, v = np.split(x @ tensors[f"{key}.qkv.weight"].T, 3, axis=1)
        k, v = (part[tree.paths].reshape(*tree.paths.shape, heads, HEAD_WIDTH) for part in (k, v))
        scores = q.reshape(-1, heads, 1, HEAD_WIDTH) @ k.transpose(0, 2, 3, 1) / np.float32(HEAD_WIDTH**0.5)
        after = np.arange(tree.paths.shape[1]) > tree.depths[:, None]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * ~after[:, None, None]
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = (weights @ v.transpose(0, 2, 1, 3)).reshape(len(x), -1)
        return mixed @ tensors[f"{key}.proj.weight"].T + tensors[f"{key}.proj.bias"]

    def encode(sentences: Prompts) -> np.ndarray:
        tree = prompt_tree(sentences)
        x = tensors["backbone.token_embedding.weight"][tree.tokens]
        x = x + tensors["backbone.positional_embedding"][tree.depths]
        for index in range(shape.depth):
            key = f"backbone.blocks.{index}"
            x = x + attention(f"{key}.attention", norm(f"{key}.attention_norm", x), tree)
            first, second = f"{key}.feed_forward.fc1", f"{key}.feed_forward.fc2"
            hidden = norm(f"{key}.ffn_norm", x) @ tensors[f"{first}.weight"].T + tensors[f"{first}.bias"]
            hidden *= (1 + erf(hidden * np.float32(0.5**0.5))) / 2
            x = x + hidden @ tensors[f"{second}.weight"].T + tensors[f"{second}.bias"]
        return norm("backbone.ln_final", x[tree.ends]) @ tensors["head.linear_projection.weight"].T

    return encode


def prepacked(path: Path, threads: int) -> Callable[[Prompts], np.ndarray]:
    """Return the service's text encoder with repacked weights."""
    ort = load_runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    graph = text_encoder_graph(path, text_encoder_shape(read_tensors(path)))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda sentences: session.run(["features"], prompt_tree(sentences)._asdict())[0]


def unshared(path: Path, threads: int) -> Callable[[Prompts], np.ndarray]:
    """Return the service's text encoder without shared prefixes of sentences."""
    encoder = TextEncoder(path, threads=threads)
    run = encoder._session.run

    def encode(sentences: Prompts) -> np.ndarray:
        parts = []
        for start in range(0, len(sentences), 50):
            trees = [prompt_tree([sentence]) for sentence in sentences[start : start + 50]]
            longest = max(tree.paths.shape[1] for tree in trees)
            first = np.cumsum([0, *(len(tree.tokens) for tree in trees)])
            filled = [np.pad(tree.paths, ((0, 0), (0, longest - tree.paths.shape[1])), mode="edge") for tree in trees]
            whole = PromptTree(
                np.concatenate([tree.tokens for tree in trees]),
                np.concatenate([tree.depths for tree in trees]),
                np.concatenate([paths + at for paths, at in zip(filled, first, strict=False)]),
                first[1:] - 1,
            )
            parts.append(run(["features"], whole._asdict())[0])
        return np.concatenate(parts)

    return encode


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(time.process_time() - cpu, 3)}


def memory() -> dict[str, int]:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous_mb": "RssAnon", "peak_mb": "VmHWM"}
    return {name: int(lines[field].split()[0]) // 1024 for name, field in names.items()}


def child(way: str, folder: Path, threads: int) -> dict[str, Any]:
    """Measure one way of running the text encoder."""
    path = folder / "text_encoder.safetensors"
    makers: dict[str, Callable[[], Any]] = {
        "service": lambda: TextEncoder(path, threads=threads).encode,
        "prepacked": lambda: prepacked(path, threads),
        "unshared": lambda: unshared(path, threads),
        "numpy": lambda: in_numpy(path),
    }
    encode, opened = measured(makers[way])
    report: dict[str, Any] = {"way": way, "open": opened}
    for name, sentences in {
        "first_100_words": prompts(100, 0),
        "100_words": prompts(100, 1),
        "1_word": prompts(1, 2),
        "100_words_in_7_sentences": prompts(100, 3, 7),
    }.items():
        features, report[name] = measured(lambda: encode(sentences))  # noqa: B023 - called at once
        report[name]["tokens"] = count_nodes(sentences)
        if name == "100_words":
            np.save(folder / f"{way}.npy", features)
            report["memory_after_100_words"] = memory()
    report["memory"] = memory()
    return report


def vision(folder: Path, threads: int) -> list[dict[str, Any]]:
    head = VisionHead(folder / "vision_head.safetensors", threads=threads)
    rows = []
    for side in (16, 37):  # inputs of 224 and 518 pixels
        tokens = np.random.default_rng(0).standard_normal((1, 5 + side**2, 1024), np.float32)
        head.refine(tokens)
        rows.append({"tokens": tokens.shape[1], **measured(lambda: head.refine(tokens))[1]})  # noqa: B023
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), options.threads)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = random_tensors(text_encoder_shapes(1280, 5120, 24, 49408, 77, 2048))
        write_safetensors(folder / "text_encoder.safetensors", text)
        write_safetensors(folder / "vision_head.safetensors", random_tensors(vision_head_shapes(1024, 2752, 2)))
        del text
        rows = []
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(ROOT)}
        for way in WAYS:
            command = [sys.executable, __file__, "--threads", str(options.threads), "--child", way, name]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            difference = np.abs(np.load(folder / f"{way}.npy") - np.load(folder / "service.npy")).max()
            rows[-1]["largest_difference"] = float(difference)
            print(json.dumps(rows[-1], indent=1), flush=True)
        report = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/dinotxt.py", *sys.argv[1:]]),
            "cpus": available_cpus(),
            "load_average_at_the_end": os.getloadavg(),
            "text_encoder": rows,
            "vision_head": vision(folder, options.threads),
        }
    print(json.dumps(report["vision_head"]))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
