"""A checkpoint becomes an artifact: weights, ONNX graph, parity check, manifest. All of it or nothing.

Everything is written into a temporary folder beside the target, which takes its name in one rename once parity has
passed; a failed or killed export leaves no folder that looks like an artifact.
"""

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from model import parity
from model.artifact import (
    MANIFEST,
    MODEL_CARD,
    ONNX,
    WEIGHTS,
    Artifact,
    Manifest,
    describe_file,
    fingerprint,
    input_size,
    load_artifact,
)
from model.config import ViTConfig
from model.engine import available_cpus
from model.onnx_graph import GraphSpec, write_onnx
from model.preprocess import PreprocessSpec

WeightsDtype = Literal["float32", "float16"]


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
        keep_onnx: False leaves `model.onnx` out; `load_artifact` derives it again, byte for byte.

    Raises:
        ParityError: ONNX Runtime strays from torch.
        ValueError: sizes that do not fit each other.
        OSError: the folder cannot be written.
    """
    # Only the reference engine needs torch; the rest of this module loads without.
    from model.engine_onnx import OnnxEngine
    from model.engine_torch import TorchEngine

    stored = {key: np.ascontiguousarray(array.astype(weights_dtype)) for key, array in weights.items()}
    size, threads = input_size(preprocess), available_cpus()
    digest = fingerprint(stored, config, preprocess)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".exporting-") as temporary:
        folder = Path(temporary) / f"{name}-{digest[:8]}"
        folder.mkdir()
        save_file(stored, folder / WEIGHTS)
        onnx_files = write_onnx(stored, config, GraphSpec(size), folder / ONNX)
        if not keep_onnx and len(onnx_files) > 1:
            raise ValueError(f"{name}: the graph needs {len(onnx_files)} files and cannot be derived: keep_onnx=True")
        record = parity.measure(
            TorchEngine(folder / WEIGHTS, config, threads=threads, device="cpu"),  # CUDA's TF32 is no reference
            OnnxEngine(folder / ONNX, threads=threads),
            list(photos) if photos is not None else parity.sample_photos(),
            preprocess,
        )
        parity.check(record)
        files = {WEIGHTS: describe_file(folder / WEIGHTS)}
        files |= {file: describe_file(folder / file, derived=file == ONNX) for file in onnx_files}
        if model_card is not None:
            (folder / MODEL_CARD).write_text(model_card)
            files[MODEL_CARD] = describe_file(folder / MODEL_CARD)
        manifest = Manifest(
            name=name,
            fingerprint=digest,
            config=config,
            preprocess=preprocess,
            input_size=size,
            parity=[record],
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
        for written in folder.iterdir():
            written.chmod(0o644)  # safetensors makes its file for the owner alone; a container's user must read it too
        target = out_dir / folder.name
        if target.exists():  # the same fingerprint: replace it, since its manifest may be older or damaged
            shutil.rmtree(target)
        os.rename(folder, target)
    return Artifact(target, manifest, {name: target / name for name in files if (target / name).exists()})


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
) -> Artifact:
    """Export a checkpoint file of any format that `load_model` reads, or a published model by name.

    Args:
        source: a file, or a name of `model/zoo.py` (downloaded).
        arch: torch hub's name of the architecture; needed for files that do not say it (all but our own).
        name: the artifact's; default: what our own checkpoint's provenance names, else the architecture.
        licence: SPDX identifier of the weights; a published model brings its own.
        resize, crop: of the preprocessing; default: what the checkpoint was evaluated with, else 256 and 224.

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
    else:
        entry = zoo.resolve(source)
        model = load_model(entry.name)
        state, config, licence = model.state_dict(), model.config, entry.licence
        provenance, arch = {"url": entry.url}, entry.name
    evaluated = PreprocessSpec.model_validate(provenance.get("preprocess", {"patch_size": config.patch_size}))
    changes = {key: value for key, value in (("resize", resize), ("crop", crop)) if value is not None}
    return export_artifact(
        {key: tensor.numpy() for key, tensor in state.items()},
        config,
        out_dir,
        name=name or provenance.get("name") or arch or path.stem,
        preprocess=PreprocessSpec.model_validate(evaluated.model_dump() | changes),
        provenance=provenance,
        licence=licence,
        weights_dtype=weights_dtype,
        photos=photos,
        model_card=model_card,
        keep_onnx=keep_onnx,
    )


def _write_durably(path: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
