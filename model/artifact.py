"""The artifact directory: the only hand-over from training to serving.

    <name>-<first 8 digits of the fingerprint>/
      manifest.json         shape, preprocessing, parity, provenance, licence, and the sha256 of every file
      weights.safetensors   the backbone under Meta's parameter names
      model.onnx            the graph for serving (optional: it can be derived from the weights, byte for byte)
      model-<size>-<precision>.onnx   additional graphs, each with a record in the manifest (also optional)
      README.md             the model card, if any

The fingerprint is a sha256 over weights, architecture (with the position-embedding rule) and preprocessing: everything
that decides which vector an image gets. Vectors are tagged with it, so vectors of two models are never mixed. Loading
checks every file against the manifest and refuses a file that differs.
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
    """Raised for an artifact that cannot be read or trusted. The message names the file and the reason."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """The size and hash of one file. A derived file may be absent; it is then rebuilt and must match."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    derived: bool = False


class GateRecord(_Record):
    """The result of the k-NN gate for an int8 graph: its k-NN accuracy compared with that of float32. See
    `model/engines/knn_gate.py`.
    """

    status: Literal["passed", "failed", "not measured"]
    reason: str  # one line: why the graph may not serve, or the accuracies if it passed
    k: int | None = None  # number of voting neighbours
    val_photos: int | None = None
    val_right: tuple[int, int] | None = None  # correctly classified images of val: float32, int8
    train_photos: int | None = None
    train_right: tuple[int, int] | None = None  # correctly classified images of train, leave-one-out


Reference = Literal["torch float32", "numpy float64"]
"""The forward pass that the results of a graph are compared with."""


class ParityRecord(_Record):
    """How close one runtime comes to the reference on the same pixels (see `model/engines/parity.py`)."""

    engine: str
    precision: str
    images: int
    max_abs_error: float
    min_cosine_cls: float
    min_cosine_patches: float
    neighbour_agreement: float
    reference: Reference = "torch float32"
    file: str = "model.onnx"  # the compared graph
    size: tuple[int, int] | None = None  # (H, W) pixels of the comparison; None: the artifact's input size
    batch: int | None = None  # images in one forward pass
    gate: GateRecord | None = None  # int8 graphs only


class GraphRecord(_Record):
    """A graph of the artifact other than `model.onnx`, with its build options."""

    file: str = Field(pattern=r"^model-[a-z0-9]+-[a-z0-9]+\.onnx$")
    size: tuple[int, int] | None  # (H, W) input pixels; None: any multiples of the patch size
    precision: Precision
    outputs: tuple[str, ...]
    attention: AttentionForm
    int8_weights: Int8Weights = "s7"
    float_layers: tuple[str, ...] = ()  # layers that int8 does not quantize
    not_compared: str | None = None  # why the graph has no parity record; its engine must then pass parity at load

    @property
    def spec(self) -> GraphSpec:
        """The `GraphSpec` that `model/onnx_graph/build.py` builds this graph from."""
        return GraphSpec(**{name: getattr(self, name) for name in GraphSpec.__dataclass_fields__})


class Manifest(_Record):
    """The content of `manifest.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: ViTConfig
    preprocess: PreprocessSpec
    input_size: tuple[int, int]  # (H, W) input pixels of model.onnx
    parity: list[ParityRecord]
    graphs: list[GraphRecord] = Field(default_factory=list)  # in addition to model.onnx
    provenance: dict[str, Any]
    licence: str
    created: str  # ISO 8601, UTC
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder, its manifest, and the path of each file."""

    path: Path
    manifest: Manifest
    locations: Mapping[str, Path]
    derived_dir: Path | None = None  # the parent folder of `derived`; None: the parent of `path`

    @property
    def name(self) -> str:
        return f"{self.manifest.name}-{self.manifest.fingerprint[:8]}"

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def file(self, name: str) -> Path:
        """Return the verified path of a file that the manifest lists.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        if name not in self.locations:
            raise ArtifactError(f"{self.path}: has no {name}; its files are {', '.join(sorted(self.locations))}")
        return self.locations[name]

    @property
    def derived(self) -> Path:
        """The folder for files that a host derives from this artifact: graphs and engine plans. It may not exist.

        The fingerprint is part of its name, because an artifact's folder can be renamed or replaced by another model.
        """
        return (self.derived_dir or self.path.parent) / self.name

    @property
    def weights(self) -> Weights:
        """The tensors of `weights.safetensors`, by name. Each tensor is read on access."""
        return StoredWeights(self.file(WEIGHTS))


class StoredWeights(Mapping[str, npt.NDArray[np.floating]]):
    """A `weights.safetensors` file as a mapping that reads one tensor at a time.

    Reading all tensors in turn needs memory for only one of them.

    Raises:
        ArtifactError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="numpy")
        except Exception as error:  # safetensors raises its own unrelated class, and OSError
            raise ArtifactError(f"{path}: cannot be read as safetensors: {error}") from error
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
    """Return the file name of a graph other than `model.onnx`. `size` is (H, W) in pixels, or None if it is free.

    Examples: `model-224-int8.onnx`, `model-224x336-fp32.onnx`, `model-dynamic-fp32.onnx`.
    """
    shown = "dynamic" if size is None else str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    return f"model-{shown}-{precision}.onnx"


def fingerprint(weights: Weights, config: ViTConfig, preprocess: PreprocessSpec) -> str:
    """Return the sha256 (64 hex digits) of weights, configuration and preprocessing, which determine every vector."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        array = np.ascontiguousarray(weights[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    identity = {"config": asdict(config), "preprocess": preprocess.model_dump(mode="json")}
    digest.update(json.dumps(identity, sort_keys=True).encode())
    return digest.hexdigest()


def input_size(preprocess: PreprocessSpec) -> tuple[int, int]:
    """Return the (H, W) in pixels of every input that the transform `preprocess` produces.

    Raises:
        ValueError: the transform does not crop, so the size differs from image to image.
    """
    if preprocess.crop is None:
        raise ValueError("crop=None keeps each image's own size, but an exported graph takes one size: set a crop")
    return output_size(preprocess.crop, preprocess.crop, preprocess)


def describe_file(path: Path, *, derived: bool = False) -> FileRecord:
    """Return the manifest's record of the file at `path`: its sha256, its size, and whether it is derivable."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, bytes=path.stat().st_size, derived=derived)


def read_manifest(path: Path) -> Manifest:
    """Parse the `manifest.json` of an artifact folder, without checking the content of the listed files.

    Raises:
        ArtifactError: the manifest is missing, has another format, or lists a file outside the folder.
    """
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: not an artifact: {MANIFEST}: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        raise ArtifactError(f"{path / MANIFEST}: not a manifest of format {FORMAT_VERSION}: {error}") from error
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, "..", "."):
            raise ArtifactError(f"{path / MANIFEST}: file name {name!r} points outside the artifact's folder")
    for graph in manifest.graphs:
        if graph.file not in manifest.files:
            raise ArtifactError(f"{path / MANIFEST}: describes {graph.file}, which is not in its list of files")
    return manifest


def load_artifact(path: Path, *, derived_dir: Path | None = None) -> Artifact:
    """Open an artifact and check every file.

    Args:
        path: the artifact's folder.
        derived_dir: graphs that the folder lacks are derived into a folder of the same name in `derived_dir`; None:
            into the artifact's folder.

    Raises:
        ArtifactError: a file is missing, changed or unreadable; the message names the file and the reason.
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
        raise ArtifactError(f"{path / MANIFEST}: does not list {WEIGHTS}")
    actual = fingerprint(StoredWeights(locations[WEIGHTS]), manifest.config, manifest.preprocess)
    if actual != manifest.fingerprint:
        raise ArtifactError(
            f"{path / MANIFEST}: fingerprint is {manifest.fingerprint}, but weights, architecture and preprocessing "
            f"give {actual}: one of them was changed"
        )
    return Artifact(path=path, manifest=manifest, locations=locations, derived_dir=derived_dir)


def bundled_artifact() -> Path:
    """Return the folder of the artifact that ships with the project.

    Raises:
        ArtifactError: the project ships no artifact, or more than one.
    """
    found = sorted(path.parent for path in BUNDLED_DIR.glob(f"*/{MANIFEST}"))
    if len(found) != 1:
        raise ArtifactError(f"{BUNDLED_DIR}: expected one bundled artifact, found {len(found)}")
    return found[0]


def find_artifacts(data_dir: Path) -> list[Path]:
    """Return all artifact folders: those in `<data_dir>/artifacts`, newest first, then the bundled one."""
    local = [path.parent for path in (data_dir / "artifacts").glob(f"*/{MANIFEST}") if path.parent.name[0] != "."]
    return [
        *sorted(local, key=_created, reverse=True),
        *sorted(path.parent for path in BUNDLED_DIR.glob(f"*/{MANIFEST}")),
    ]


def _created(path: Path) -> tuple[str, str]:
    """Return the sort key of an artifact: its creation time. An artifact with an unreadable manifest sorts last."""
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
            f"{path}: has {found.bytes} bytes and sha256 {found.sha256}, but the manifest says {record.bytes} bytes "
            f"and {record.sha256}: the file was changed or truncated"
        )


def _derived(path: Path, manifest: Manifest, name: str, directory: Path) -> Path:
    """Return the path of the derived file `name`, building it from the weights if needed. The caller verifies it."""
    specs = {ONNX: GraphSpec(size=manifest.input_size)} | {graph.file: graph.spec for graph in manifest.graphs}
    if name not in specs:
        raise ArtifactError(f"{path / name}: missing, and only graphs can be rebuilt")
    target = directory / name
    if target.exists() and describe_file(target).sha256 == manifest.files[name].sha256:
        return target
    _verify(path / WEIGHTS, manifest.files[WEIGHTS])
    derive_graph(StoredWeights(path / WEIGHTS), manifest.config, specs[name], target)
    return target


def derive_graph(weights: Weights, config: ViTConfig, spec: GraphSpec, target: Path) -> None:
    """Build a graph from the weights and write it to `target`, completely or not at all.

    Raises:
        ArtifactError: the folder of `target` cannot be written.
    """
    directory = target.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".deriving-") as temporary:
            names = write_onnx(weights, config, spec, Path(temporary) / target.name)
            for written in reversed(names):  # the graph file last: once it exists, so do the other files
                publish(Path(temporary) / written, directory / written)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written: {error.strerror}") from error
