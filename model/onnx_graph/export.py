"""A checkpoint becomes an artifact: weights, ONNX graph, parity check, manifest. All of it or nothing.

Everything is written into a temporary folder beside the target, which takes its name in one rename once parity has
passed; a failed or killed export leaves no folder that looks like an artifact.

Memory: weights are written, hashed and put into graphs tensor by tensor; the reference computes everything that it is
needed for and is let go before ONNX Runtime loads the first graph. So the largest model exports with its weights in
memory twice at most (what the caller holds, and one engine): benchmarks/export_giant.py.
"""

import datetime
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from model.artifact import (
    MANIFEST,
    MODEL_CARD,
    ONNX,
    WEIGHTS,
    Artifact,
    GateRecord,
    GraphRecord,
    Manifest,
    ParityRecord,
    StoredWeights,
    describe_file,
    fingerprint,
    graph_name,
    input_size,
    load_artifact,
)
from model.config import ViTConfig
from model.cpus import available_cpus
from model.engines import knn_gate, parity
from model.engines.protocol import Features, FloatArray
from model.onnx_graph.build import GraphSpec, Precision, write_onnx
from model.onnx_graph.quantize import Int8Weights
from model.preprocess import PreprocessSpec

WeightsDtype = Literal["float32", "float16"]
PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"}

log = logging.getLogger(__name__)


def export_artifact(
    weights: Mapping[str, npt.NDArray[np.floating]],
    config: ViTConfig,
    out_dir: Path,
    *,
    name: str,
    preprocess: PreprocessSpec,
    provenance: Mapping[str, Any],
    licence: str,
    weights_dtype: WeightsDtype = "float32",
    photos: Sequence[npt.NDArray[np.uint8]] | None = None,
    model_card: str | None = None,
    keep_onnx: bool = True,
    graphs: Sequence[GraphSpec] = (),
    labelled: knn_gate.LabelledImages | None = None,
) -> Artifact:
    """Write `<out_dir>/<name>-<fingerprint8>/` and return it verified.

    Args:
        weights: the backbone's state dict as arrays, Meta's names.
        config: its shape, with the position-embedding rule that its weights were trained with.
        out_dir: folder of artifacts; made when missing.
        preprocess: the transform that serving applies; its crop is the graph's input size.
        provenance: where the weights come from, as JSON.
        licence: SPDX identifier of the weights.
        weights_dtype: how weights are stored. Parity is against torch on the weights as stored.
        photos: uint8 [H, W, 3] pictures for the parity check; None takes generated ones.
        keep_onnx: False leaves the graphs out; `load_artifact` derives them again, byte for byte.
        graphs: further graphs beside `model.onnx`, each compared with torch at its own size (a dynamic one at two). A
            bf16 graph that ONNX Runtime's CPU does not run is kept without a record.
        labelled: photos for the gate of int8 graphs; None: none of them may serve.

    Raises:
        ParityError: ONNX Runtime strays from torch. An int8 graph that does is kept, with a gate that failed.
        ValueError: sizes that do not fit each other.
        OSError: the folder cannot be written.
    """
    size = input_size(preprocess)
    stored = {key: np.ascontiguousarray(array.astype(weights_dtype, copy=False)) for key, array in weights.items()}
    digest = fingerprint(stored, config, preprocess)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".exporting-") as temporary:
        folder = Path(temporary) / f"{name}-{digest[:8]}"
        folder.mkdir()
        try:
            save_file(stored, folder / WEIGHTS)
        except SafetensorError as error:  # a full disk arrives as one
            raise OSError(f"{folder / WEIGHTS}: cannot be written: {error}") from error
        del stored
        specs = {ONNX: GraphSpec(size=size)} | {graph_name(spec.size, spec.precision): spec for spec in graphs}
        written = {}
        for file, spec in specs.items():
            log.info("writing %s", file)
            written[file] = write_onnx(StoredWeights(folder / WEIGHTS), config, spec, folder / file)
            if not keep_onnx and len(written[file]) > 1:
                raise ValueError(
                    f"{name}: {file} needs {len(written[file])} files and cannot be derived: keep_onnx=True"
                )
        comparison = _Comparison(
            folder, config, preprocess, list(photos) if photos is not None else parity.sample_photos(), labelled
        )
        comparison.run(specs)
        onnx_files = [file for names in written.values() for file in names]
        files = {WEIGHTS: describe_file(folder / WEIGHTS)}
        files |= {file: describe_file(folder / file, derived=file in specs) for file in onnx_files}
        if model_card is not None:
            (folder / MODEL_CARD).write_text(model_card)
            files[MODEL_CARD] = describe_file(folder / MODEL_CARD)
        manifest = Manifest(
            name=name,
            fingerprint=digest,
            config=config,
            preprocess=preprocess,
            input_size=size,
            parity=comparison.records,
            graphs=[
                GraphRecord(file=file, not_compared=comparison.not_compared.get(file), **asdict(spec))
                for file, spec in specs.items()
                if file != ONNX
            ],
            provenance=dict(provenance),
            licence=licence,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=files,
        )
        _write_durably(folder / MANIFEST, manifest)
        load_artifact(folder)  # as serving will: every hash, and the fingerprint from what was written
        if not keep_onnx:
            for file in onnx_files:
                (folder / file).unlink()
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes its file for the owner alone; a container's user must read it too
        target = out_dir / folder.name
        if target.exists():  # the same fingerprint: replace it, since its manifest may be older or damaged
            os.rename(target, Path(temporary) / "replaced")
        os.rename(folder, target)
    return Artifact(target, manifest, {name: target / name for name in files if (target / name).exists()})


class _Reference:
    """What torch float32 gives at one size: of the parity photos everything, of the labelled ones class tokens."""

    def __init__(self, pixels: FloatArray, features: Features, extras: dict[str, FloatArray]) -> None:
        self.pixels, self.features, self.extras = pixels, features, extras
        self.tokens: knn_gate.ClassTokens | None = None


@dataclass
class _Comparison:
    """Every graph of a folder beside torch float32 on the CPU (CUDA's TF32 is no reference)."""

    folder: Path
    config: ViTConfig
    preprocess: PreprocessSpec
    photos: Sequence[npt.NDArray[np.uint8]]
    labelled: knn_gate.LabelledImages | None
    records: list[ParityRecord] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)  # file -> why

    def run(self, specs: Mapping[str, GraphSpec]) -> None:
        """Fill `records` and `not_compared`.

        Raises:
            ParityError: a graph strays from torch.
            ValueError: one that ONNX Runtime's CPU should run and does not load.
        """
        sizes = {file: self._sizes(spec) for file, spec in specs.items()}
        references = self._references(specs, sizes)
        for file, spec in specs.items():
            log.info("comparing %s with torch", file)
            self._compare(file, spec, {size: references[size] for size in sizes[file]})

    def _sizes(self, spec: GraphSpec) -> list[tuple[int, int]]:
        """Sizes that a graph is compared at: a dynamic one also at a larger size that is not square."""
        if spec.size is not None:
            return [spec.size]
        height, width = input_size(self.preprocess)
        p = self.config.patch_size
        return [(height, width), (height + p, width + 3 * p)]

    def _references(
        self, specs: Mapping[str, GraphSpec], sizes: Mapping[str, list[tuple[int, int]]]
    ) -> dict[tuple[int, int], _Reference]:
        from model.engines.torch_engine import TorchEngine  # the only thing of an export that needs torch

        engine = TorchEngine(self.folder / WEIGHTS, self.config, threads=available_cpus(), device="cpu")
        extras = sorted({name for spec in specs.values() for name in spec.outputs if name not in Features._fields})
        found = {}
        for size in {size for of_file in sizes.values() for size in of_file}:
            pixels = parity.pixels_at(self.photos, self.preprocess, size)
            some = engine.run_outputs(pixels[: parity.BATCH], extras) if extras else {}
            found[size] = _Reference(pixels, parity.features(engine, pixels), some)
        for file, spec in specs.items():
            reference = found[sizes[file][0]]
            if spec.precision == "int8" and self.labelled is not None and reference.tokens is None:
                reference.tokens = knn_gate.class_tokens(engine, self.labelled, self.preprocess, sizes[file][0])
        return found

    def _compare(self, file: str, spec: GraphSpec, references: Mapping[tuple[int, int], _Reference]) -> None:
        from model.engines.onnxruntime_engine import OnnxEngine

        try:
            path = self.folder / file
            prepack = not path.with_name(f"{file}.data").exists()  # of a large model, a second copy is too much
            engine = OnnxEngine(path, threads=available_cpus(), precision=spec.precision, prepack=prepack)
        except ValueError as error:
            if spec.precision != "bf16":
                raise
            self.not_compared[file] = f"ONNX Runtime's CPU does not run it: {_reason(error)}"
            return
        extras = [name for name in spec.outputs if name not in Features._fields]
        for size, reference in references.items():
            record = parity.measure(reference.features, engine, reference.pixels, file=file, size=size)
            if extras:
                ours = engine.run_outputs(reference.pixels[: parity.BATCH], extras)
                record = parity.with_extras(record, {name: reference.extras[name] for name in extras}, ours)
            if spec.precision != "int8":
                parity.check(record)
            elif size == next(iter(references)):
                record = record.model_copy(update={"gate": self._gate(record, engine, size, reference.tokens)})
            self.records.append(record)

    def _gate(
        self, record: ParityRecord, engine: Any, size: tuple[int, int], reference: knn_gate.ClassTokens | None
    ) -> GateRecord:
        """Whether an int8 graph may serve: by the cosines of its record, and by k-NN."""
        gate = knn_gate.NO_LABELS
        if self.labelled is not None:
            assert reference is not None
            gate = knn_gate.knn_gate(reference, knn_gate.class_tokens(engine, self.labelled, self.preprocess, size))
        try:
            parity.check(record)
        except parity.ParityError as error:
            reason = f"{error}; {gate.reason}" if self.labelled is not None else str(error)
            return gate.model_copy(update={"status": "failed", "reason": reason})
        return gate


def wanted_graphs(
    config: ViTConfig,
    size: tuple[int, int],
    *,
    sizes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    outputs: Sequence[str] = (),
    int8_weights: Int8Weights = "s7",
    float_layers: Sequence[str] | None = None,
) -> list[GraphSpec]:
    """The further graphs that a command line asks for: every size in every precision, less what `model.onnx` is.

    Args:
        config: the model's shape.
        size: (H, W) pixels of `model.onnx`.
        sizes: "224" (square), "224x336" (H x W) or "dynamic"; none: the size of `model.onnx`.
        precisions: of `PRECISIONS`; none: fp32.
        outputs: cls, patches and registers, which serving reads, and any of attention and layer.N; none: those three.
        int8_weights, float_layers: of int8 graphs, see `GraphSpec`; None: `sensitive_layers`, since with them
            in int8 a trained model missed the gate (docs/decisions/0018-int8.md).

    Raises:
        ValueError: another value; the message names it and what is allowed.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
    if float_layers and "int8" not in precisions:
        raise ValueError(f"float layers {','.join(float_layers)} are for int8, which is not among the precisions")
    chosen = tuple(outputs) or Features._fields
    allowed = [*Features._fields, "attention", *(f"layer.{i}" for i in range(config.depth))]
    for output in chosen:
        if output not in allowed:
            raise ValueError(f"output {output!r}: one of {', '.join(allowed[:4])}, layer.0 to layer.{config.depth - 1}")
        if chosen.count(output) > 1:
            raise ValueError(f"output {output!r} is given twice")
    missing = [name for name in Features._fields if name not in chosen]
    if missing:
        raise ValueError(f"outputs {','.join(chosen)}: {', '.join(missing)} must be among them, serving reads it")
    wanted = [_parse_size(text, config.patch_size) for text in sizes] or [size]
    specs = []
    for text in precisions or ["fp32"]:
        spec = GraphSpec(size=size, precision=PRECISIONS[text], outputs=chosen)
        if text == "int8":
            left = sensitive_layers(config) if float_layers is None else tuple(float_layers)
            spec = replace(spec, int8_weights=int8_weights, float_layers=left)
        specs.append(spec)
    every = dict.fromkeys(replace(spec, size=each) for each in wanted for spec in specs)
    return [spec for spec in every if spec != GraphSpec(size=size)]


def sensitive_layers(config: ViTConfig) -> tuple[str, ...]:
    """Linear layers whose error reaches the features: those that end a residual branch, and the last block's."""
    return "attn.proj", "mlp.fc2" if config.ffn == "mlp" else "mlp.w3", f"blocks.{config.depth - 1}"


def _parse_size(text: str, patch_size: int) -> tuple[int, int] | None:
    if text == "dynamic":
        return None
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < patch_size or any(side % patch_size for side in sides):
        raise ValueError(
            f"size {text!r}: a multiple of the patch size {patch_size} (e.g. {16 * patch_size}), two of them with x "
            f"between (height x width), or dynamic"
        )
    return sides


def export_checkpoint(
    source: str,
    out_dir: Path,
    *,
    arch: str | None = None,
    name: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    weights_dtype: WeightsDtype = "float32",
    photos: Sequence[npt.NDArray[np.uint8]] | None = None,
    model_card: str | None = None,
    licence: str = "unknown",
    keep_onnx: bool = True,
    sizes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    outputs: Sequence[str] = (),
    int8_weights: Int8Weights = "s7",
    float_layers: Sequence[str] | None = None,
    labelled: knn_gate.LabelledImages | None = None,
) -> Artifact:
    """Export a checkpoint file of any format that `load_model` reads, or a published model by name.

    Args:
        source: a file, or a name of `model/zoo.py` (downloaded).
        arch: torch hub's name of the architecture; needed for files that do not say it (all but our own).
        name: the artifact's; default: what our own checkpoint's provenance names, else the architecture.
        licence: SPDX identifier of the weights; a published model brings its own.
        resize, crop: of the preprocessing; default: what the checkpoint was evaluated with, else 256 and 224.
        sizes, precisions, outputs, int8_weights, float_layers: further graphs, see `wanted_graphs`.

    Others: see `export_artifact`.

    Raises:
        ValueError: no such file or published name, no checkpoint, or one that needs `arch`.
        zoo.DownloadError: a published model cannot be downloaded.
        See also `export_artifact`.
    """
    from model import zoo
    from model.checkpoint import is_own_checkpoint, load_checkpoint, load_model

    provenance: dict[str, Any]
    path = Path(source)
    if path.is_file() and is_own_checkpoint(path):
        state, config, provenance = load_checkpoint(path)
    elif path.is_file():
        if arch is None:
            raise ValueError(f"{source} does not say its architecture: add --arch, e.g. --arch dinov2_vits14")
        model = load_model(arch, weights=path)
        state, config, provenance = model.state_dict(), model.config, {"file": path.name}
    elif path.is_dir():
        raise ValueError(f"{source} is a folder; a checkpoint file is exported, a run's is its checkpoint.safetensors")
    else:
        try:
            entry = zoo.resolve(source)
        except ValueError as error:
            raise ValueError(f"{source}: no such file; {error}") from error
        model = load_model(entry.name)
        state, config, licence = model.state_dict(), model.config, entry.licence
        provenance, arch = {"url": entry.url}, entry.name
    evaluated = PreprocessSpec.model_validate(provenance.get("preprocess", {"patch_size": config.patch_size}))
    changes = {key: value for key, value in (("resize", resize), ("crop", crop)) if value is not None}
    spec = PreprocessSpec.model_validate(evaluated.model_dump() | changes)
    graphs = wanted_graphs(
        config,
        input_size(spec),
        sizes=sizes,
        precisions=precisions,
        outputs=outputs,
        int8_weights=int8_weights,
        float_layers=float_layers,
    )
    return export_artifact(
        {key: tensor.numpy() for key, tensor in state.items()},
        config,
        out_dir,
        name=name or provenance.get("name") or arch or path.stem,
        preprocess=spec,
        provenance=provenance,
        licence=licence,
        weights_dtype=weights_dtype,
        photos=photos,
        model_card=model_card,
        keep_onnx=keep_onnx,
        graphs=graphs,
        labelled=labelled,
    )


def _write_durably(path: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: ValueError) -> str:
    """What a runtime said, in one line without the temporary folder's path."""
    return " ".join(str(error.__cause__ or error).split())[:300]
