"""Runs the two networks of dino.txt in ONNX Runtime, on the CPU.

The weights are mapped from their file. ONNX Runtime does not repack them for faster matrix products, because the
repacked copy would take 2 GB for the published text encoder (measurements: docs/decisions/0027-dinotxt.md).

Legend: B images, T tokens per image, P prompts, D width, O width of the text encoder's output.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.cpus import available_cpus
from model.dinotxt.graphs import text_encoder_graph, vision_head_graph
from model.dinotxt.prompts import Prompt, in_parts, prompt_tree
from model.dinotxt.towers import text_encoder_shape, vision_head_shape
from model.engines.onnxruntime_engine import load_runtime
from model.weights import read_tensors

Floats = npt.NDArray[np.float32]


class VisionHead:
    """A vision head, opened from a safetensors file with float32 tensors under Meta's names.

    Raises:
        CheckpointError: the file does not contain a vision head.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.shape = vision_head_shape(read_tensors(path))
        self._session = _session(vision_head_graph(path, self.shape), path.parent, threads)

    def refine(self, tokens: Floats) -> Floats:
        """Return the refined tokens [B, T, D] of a batch of images.

        `tokens` [B, T, D] are the backbone's tokens after its final norm, in the order class, registers, patches.
        """
        refined: Floats = self._session.run(["refined"], {"tokens": tokens.astype(np.float32, copy=False)})[0]
        return refined


class TextEncoder:
    """A text encoder, opened from a safetensors file with float32 tensors under Meta's names.

    Raises:
        CheckpointError: the file does not contain a text encoder.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.shape = text_encoder_shape(read_tensors(path))
        self._session = _session(text_encoder_graph(path, self.shape), path.parent, threads)

    def encode(self, prompts: Sequence[Prompt]) -> Floats:
        """Return one vector per prompt, [P, O], not normalised. A prompt is a list of token ids."""
        features = np.empty((len(prompts), self.shape.out_dim), np.float32)
        for part in in_parts(prompts):
            tree = prompt_tree([prompts[index] for index in part])
            features[part] = self._session.run(["features"], tree._asdict())[0]
        return features


def _session(graph: bytes, folder: Path, threads: int | None) -> Any:
    ort = load_runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cpus() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    entries = {
        "session.intra_op.allow_spinning": "0",
        "session.disable_prepacking": "1",
        "session.model_external_initializers_file_folder_path": str(folder),
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
