"""Compares every graph in an artifact with a reference, and runs the k-NN gate on int8 graphs.

The reference is torch in float32. If torch is not installed, the reference is the numpy forward pass in float64
(`model/engines/numpy_reference.py`). The reference engine computes all its results first, and its memory is freed
before ONNX Runtime loads the first graph, because two engines for a large model may not fit into memory.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from model.artifact import WEIGHTS, GateRecord, ParityRecord, Reference, StoredWeights, input_size
from model.config import ViTConfig
from model.cpus import available_cpus
from model.engines import parity
from model.engines.knn_gate import NO_LABELS, ClassTokens, LabelledImages, class_tokens, knn_gate
from model.engines.numpy_reference import NumpyReference
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.parity import Image
from model.engines.protocol import Features, FloatArray
from model.engines.torch_engine import TorchEngine
from model.onnx_graph.spec import GraphSpec
from model.preprocess import PreprocessSpec

log = logging.getLogger(__name__)


@dataclass
class _Reference:
    """The reference's results at one input size.

    `features` and `extras` are computed from the parity images. `tokens` are the class tokens of the labelled images,
    which are needed only for the k-NN gate of int8 graphs.
    """

    pixels: FloatArray  # [B, 3, H, W]
    features: Features
    extras: dict[str, FloatArray]  # other outputs for the first `parity.BATCH` images, keyed by name
    tokens: ClassTokens | None = None


@dataclass
class Comparison:
    """The comparison of an artifact's graphs with the reference.

    If the reference is torch, it runs on the CPU, because TF32 on a GPU would not be accurate enough.
    """

    folder: Path
    config: ViTConfig
    preprocess: PreprocessSpec
    images: Sequence[Image]
    labelled: LabelledImages | None
    records: list[ParityRecord] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)  # file name -> reason
    reference: Reference = field(default_factory=lambda: "torch float32" if find_spec("torch") else "numpy float64")

    def run(self, specs: Mapping[str, GraphSpec]) -> None:
        """Compare each graph with the reference, and fill `records` and `not_compared`.

        `specs` maps each graph's file name to its spec. An int8 graph that differs too much gets a failed gate. A bf16
        graph that ONNX Runtime cannot load is entered in `not_compared`, with the reason.

        Raises:
            ParityError: the results of a graph that is not int8 differ too much from the reference's.
            ValueError: ONNX Runtime cannot load a graph that is not bf16.
        """
        sizes = {file: self._sizes(spec) for file, spec in specs.items()}
        references = self._references(specs, sizes)
        for file, spec in specs.items():
            log.info("comparing %s with %s", file, self.reference)
            self._compare(file, spec, {size: references[size] for size in sizes[file]})

    def _sizes(self, spec: GraphSpec) -> list[tuple[int, int]]:
        """Return the (H, W) sizes at which a graph is compared: its own size, or two sizes if it accepts any size."""
        if spec.size is not None:
            return [spec.size]
        height, width = input_size(self.preprocess)
        p = self.config.patch_size
        return [(height, width), (height + p, width + 3 * p)]

    def _references(
        self, specs: Mapping[str, GraphSpec], sizes: Mapping[str, list[tuple[int, int]]]
    ) -> dict[tuple[int, int], _Reference]:
        engine = self._reference_engine()
        extras = sorted({name for spec in specs.values() for name in spec.outputs if name not in Features._fields})
        references = {}
        for size in {size for of_file in sizes.values() for size in of_file}:
            pixels = parity.pixels_at(self.images, self.preprocess, size)
            extra_outputs = engine.run_outputs(pixels[: parity.BATCH], extras) if extras else {}
            references[size] = _Reference(pixels, parity.features(engine, pixels), extra_outputs)
        for file, spec in specs.items():
            reference = references[sizes[file][0]]
            if spec.precision == "int8" and self.labelled is not None and reference.tokens is None:
                reference.tokens = class_tokens(engine, self.labelled, self.preprocess, sizes[file][0])
        return references

    def _reference_engine(self) -> TorchEngine | NumpyReference:
        if self.reference == "numpy float64":
            return NumpyReference(StoredWeights(self.folder / WEIGHTS), self.config)
        return TorchEngine(self.folder / WEIGHTS, self.config, threads=available_cpus(), device="cpu")

    def _compare(self, file: str, spec: GraphSpec, references: Mapping[tuple[int, int], _Reference]) -> None:
        try:
            path = self.folder / file
            prepack = not path.with_name(f"{file}.data").exists()  # prepacking would copy a large model's weights
            engine = OnnxEngine(path, threads=available_cpus(), precision=spec.precision, prepack=prepack)
        except ValueError as error:
            if spec.precision != "bf16":
                raise
            self.not_compared[file] = f"ONNX Runtime cannot run it on the CPU: {_reason(error)}"
            return
        extras = [name for name in spec.outputs if name not in Features._fields]
        for size, reference in references.items():
            record = parity.measure(reference.features, engine, reference.pixels, file=file, size=size)
            if extras:
                ours = engine.run_outputs(reference.pixels[: parity.BATCH], extras)
                record = parity.with_extras(record, {name: reference.extras[name] for name in extras}, ours)
            record = record.model_copy(update={"reference": self.reference})
            if spec.precision != "int8":
                parity.check(record)
            elif size == next(iter(references)):
                record = record.model_copy(update={"gate": self._gate(record, engine, size, reference.tokens)})
            self.records.append(record)

    def _gate(
        self, record: ParityRecord, engine: OnnxEngine, size: tuple[int, int], reference: ClassTokens | None
    ) -> GateRecord:
        """Return the gate record of an int8 graph.

        The gate passes only if the k-NN accuracy and the cosines in `record` are within their limits.
        """
        gate = NO_LABELS
        if self.labelled is not None:
            assert reference is not None
            gate = knn_gate(reference, class_tokens(engine, self.labelled, self.preprocess, size))
        try:
            parity.check(record)
        except parity.ParityError as error:
            reason = f"{error}; {gate.reason}" if self.labelled is not None else str(error)
            return gate.model_copy(update={"status": "failed", "reason": reason})
        return gate


def _reason(error: ValueError) -> str:
    """Return the message of `error.__cause__`, or of `error` if it has no cause, as one line of at most 300 characters.

    The message of `error` itself also contains the path of the temporary folder.
    """
    return " ".join(str(error.__cause__ or error).split())[:300]
