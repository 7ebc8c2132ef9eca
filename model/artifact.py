"""The artifact directory: the only thing that training hands to serving.

    <name>-<first 8 digits of the fingerprint>/
      manifest.json         what it is: shape, preprocessing, parity, provenance, licence, every file with its sha256
      weights.safetensors   the backbone under Meta's parameter names
      model.onnx            the graph that serving runs (may be left out: it is derived from the weights, byte for byte)
      model-<size>-<precision>.onnx   further graphs, each with its record in the manifest; derived in the same way
      README.md             the model card, when there is one

The fingerprint is a sha256 over weights, architecture (with the position-embedding rule) and preprocessing: everything
that decides which vector an image gets. Vectors are tagged with it, so those of two models are never mixed. Loading
checks every file against the manifest and refuses what differs.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open

from model.config import ViTConfig
from model.files import publish
from model.onnx_graph.build import AttentionForm, GraphSpec, Precision, write_onnx
from model.onnx_graph.quantize import Int8Weights
from model.preprocess import PreprocessSpec, output_size

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ONNX = "model.onnx"
MODEL_CARD = "README.md"
FORMAT_VERSION: Literal[1] = 1
BUNDLED_DIR = Path(__file__).parent / "bundled"

Weights = Mapping[str, npt.NDArray[np.floating]]


class ArtifactError(ValueError):
    """An artifact that cannot be trusted or read; the message names the file and why."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """One file of the artifact. A derived one may be absent: it is made again from the weights and must then match."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    derived: bool = False


class GateRecord(_Record):
    """Whether an int8 graph may serve: k-NN with its class tokens beside float32's; see `model/engines/knn_gate.py`."""

    status: Literal["passed", "failed", "not measured"]
    reason: str  # why not, in one line; of a passed gate its figures
    k: int | None = None  # neighbours that vote
    val_photos: int | None = None
    val_right: tuple[int, int] | None = None  # images of val classified rightly: float32, int8
    train_photos: int | None = None
    train_right: tuple[int, int] | None = None  # the same of train, each image among the others


class ParityRecord(_Record):
    """How close one runtime comes to torch float32 on the same pixels (see `model/engines/parity.py`)."""

    engine: str
    precision: str
    images: int
    max_abs_error: float
    min_cosine_cls: float
    min_cosine_patches: float
    neighbour_agreement: float
    file: str = "model.onnx"  # the graph compared
    size: tuple[int, int] | None = None  # (H, W) pixels that were compared; None: the artifact's input size
    batch: int | None = None  # images in one forward pass
    gate: GateRecord | None = None  # of an int8 graph


class GraphRecord(_Record):
    """A further graph of the artifact, and what it was built as."""

    file: str = Field(pattern=r"^model-[a-z0-9]+-[a-z0-9]+\.onnx$")
    size: tuple[int, int] | None  # (H, W) pixels that it takes; None: any multiples of the patch size
    precision: Precision
    outputs: tuple[str, ...]
    attention: AttentionForm
    int8_weights: Int8Weights = "s7"
    float_layers: tuple[str, ...] = ()  # that int8 leaves alone
    not_compared: str | None = None  # why no parity record stands beside it; then an engine must pass at load

    @property
    def spec(self) -> GraphSpec:
        """What `model/onnx_graph/build.py` makes it from."""
        return GraphSpec(**{name: getattr(self, name) for name in GraphSpec.__dataclass_fields__})


class Manifest(_Record):
    """What `manifest.json` holds."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: ViTConfig
    preprocess: PreprocessSpec
    input_size: tuple[int, int]  # (H, W) pixels that the graph takes
    parity: list[ParityRecord]
    graphs: list[GraphRecord] = Field(default_factory=list)  # beside model.onnx
    provenance: dict[str, Any]
    licence: str
    created: str  # ISO 8601, UTC
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder, its manifest, and where each file lies."""

    path: Path
    manifest: Manifest
    locations: Mapping[str, Path]
    derived_dir: Path | None = None  # where files made from the artifact are kept; None: beside its folder

    @property
    def name(self) -> str:
        return f"{self.manifest.name}-{self.manifest.fingerprint[:8]}"

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def file(self, name: str) -> Path:
        """The verified path of a file of the manifest."""
        if name not in self.locations:
            raise ArtifactError(f"{self.path}: holds no {name}; it has {', '.join(sorted(self.locations))}")
        return self.locations[name]

    @property
    def derived(self) -> Path:
        """The folder of what hosts make from this artifact: further graphs, engine plans. It may not exist.

        Named by the fingerprint: an artifact's folder can be renamed, and another model put in its place.
        """
        return (self.derived_dir or self.path.parent) / self.name

    @property
    def weights(self) -> Weights:
        """The weights as stored, each tensor read when it is asked for."""
        return StoredWeights(self.file(WEIGHTS))


class StoredWeights(Mapping[str, npt.NDArray[np.floating]]):
    """A `weights.safetensors` as a mapping that holds none of it: what walks through it needs memory for one tensor.

    Raises:
        ArtifactError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="numpy")
        except Exception as error:  # safetensors raises its own unrelated class, and OSError
            raise ArtifactError(f"{path}: not weights: {error}") from error
        self._keys: list[str] = list(self._file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> npt.NDArray[np.floating]:
        if key not in self._keys:
            raise KeyError(key)
        array: npt.NDArray[np.floating] = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def graph_name(size: tuple[int, int] | None, precision: str) -> str:
    """The file of a further graph: `model-224-int8.onnx`, `model-224x336-fp32.onnx`, `model-dynamic-fp32.onnx`."""
    shown = "dynamic" if size is None else str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    return f"model-{shown}-{precision}.onnx"


def fingerprint(weights: Weights, config: ViTConfig, preprocess: PreprocessSpec) -> str:
    """sha256 (64 hex digits) over everything that decides a vector."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        array = np.ascontiguousarray(weights[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    identity = {"config": asdict(config), "preprocess": preprocess.model_dump(mode="json")}
    digest.update(json.dumps(identity, sort_keys=True).encode())
    return digest.hexdigest()


def input_size(preprocess: PreprocessSpec) -> tuple[int, int]:
    """(H, W) of the fixed input that `preprocess` gives.

    Raises:
        ValueError: the transform keeps the aspect, so there is no one size.
    """
    if preprocess.crop is None:
        raise ValueError("crop=None keeps every image's own size: an exported graph takes one size, so give a crop")
    return output_size(preprocess.crop, preprocess.crop, preprocess)


def describe_file(path: Path, *, derived: bool = False) -> FileRecord:
    """Hash a file for the manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, bytes=path.stat().st_size, derived=derived)


def read_manifest(path: Path) -> Manifest:
    """Parse `manifest.json` of an artifact folder without checking the files it names.

    Raises:
        ArtifactError: no such file, or not a manifest this version reads.
    """
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: not an artifact: {MANIFEST}: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        raise ArtifactError(f"{path / MANIFEST}: not a manifest of format {FORMAT_VERSION}: {error}") from error
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, "..", "."):
            raise ArtifactError(f"{path / MANIFEST}: file name {name!r} leaves the artifact's folder")
    for graph in manifest.graphs:
        if graph.file not in manifest.files:
            raise ArtifactError(f"{path / MANIFEST}: describes {graph.file}, which is none of its files")
    return manifest


def load_artifact(path: Path, *, derived_dir: Path | None = None) -> Artifact:
    """Open an artifact and check every file.

    Args:
        path: the artifact's folder.
        derived_dir: where files that can be derived are kept when the folder lacks them; None: the folder itself.

    Raises:
        ArtifactError: a file is missing, changed or unreadable; the message names it and why.
    """
    manifest = read_manifest(path)
    locations = {}
    for name, record in manifest.files.items():
        location = path / name
        if record.derived and not location.exists():
            location = _derived(path, manifest, name, (derived_dir or path.parent) / path.name)
        _verify(location, record)
        locations[name] = location
    if WEIGHTS not in locations:
        raise ArtifactError(f"{path / MANIFEST}: names no {WEIGHTS}")
    found = fingerprint(StoredWeights(locations[WEIGHTS]), manifest.config, manifest.preprocess)
    if found != manifest.fingerprint:
        raise ArtifactError(
            f"{path / MANIFEST}: fingerprint is {manifest.fingerprint}, but weights, architecture and preprocessing "
            f"give {found}: one of them was changed"
        )
    return Artifact(path=path, manifest=manifest, locations=locations, derived_dir=derived_dir)


def bundled_artifact() -> Path:
    """The folder of the artifact that comes with the project.

    Raises:
        ArtifactError: there is none, or more than one.
    """
    found = sorted(path.parent for path in BUNDLED_DIR.glob(f"*/{MANIFEST}"))
    if len(found) != 1:
        raise ArtifactError(f"{BUNDLED_DIR}: one bundled artifact expected, found {len(found)}")
    return found[0]


def find_artifacts(data_dir: Path) -> list[Path]:
    """Artifact folders that can be served, newest first: those of the data folder, then the bundled one."""
    local = [path.parent for path in (data_dir / "artifacts").glob(f"*/{MANIFEST}") if path.parent.name[0] != "."]
    return [
        *sorted(local, key=_created, reverse=True),
        *sorted(path.parent for path in BUNDLED_DIR.glob(f"*/{MANIFEST}")),
    ]


def _created(path: Path) -> tuple[str, str]:
    """Sort key: when the artifact was made; one whose manifest cannot be read comes last."""
    try:
        return read_manifest(path).created, path.name
    except ArtifactError:
        return "", path.name


def _verify(path: Path, record: FileRecord) -> None:
    try:
        found = describe_file(path)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error
    if (found.bytes, found.sha256) != (record.bytes, record.sha256):
        raise ArtifactError(
            f"{path}: has {found.bytes} bytes and sha256 {found.sha256}, the manifest says {record.bytes} bytes and "
            f"{record.sha256}: it was changed or cut short"
        )


def _derived(path: Path, manifest: Manifest, name: str, directory: Path) -> Path:
    """Make a derived file from the weights, unless an earlier start left it; the caller verifies it."""
    specs = {ONNX: GraphSpec(size=manifest.input_size)} | {graph.file: graph.spec for graph in manifest.graphs}
    if name not in specs:
        raise ArtifactError(f"{path / name}: missing, and only graphs can be derived")
    target = directory / name
    if target.exists() and describe_file(target).sha256 == manifest.files[name].sha256:
        return target
    _verify(path / WEIGHTS, manifest.files[WEIGHTS])
    derive_graph(StoredWeights(path / WEIGHTS), manifest.config, specs[name], target)
    return target


def derive_graph(weights: Weights, config: ViTConfig, spec: GraphSpec, target: Path) -> None:
    """Write a graph as `target`, whole or not at all.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    directory = target.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".deriving-") as temporary:
            names = write_onnx(weights, config, spec, Path(temporary) / target.name)
            for written in reversed(names):  # the graph's own file last: with it, the others are there
                publish(Path(temporary) / written, directory / written)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written: {error.strerror}") from error
