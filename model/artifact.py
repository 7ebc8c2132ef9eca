"""Artifacts: folders that contain an exported model, ready for serving.

    <name>-<first 8 digits of the fingerprint>/
      manifest.json         model shape, preprocessing, parity results, provenance, licence, sha256 of every file
      weights.safetensors   the backbone under Meta's parameter names
      model.onnx            the graph for serving (optional, because it can be rebuilt from the weights)
      model-<size>-<precision>.onnx   more graphs, each with a record in the manifest (optional)
      README.md             the model card (optional)

The fingerprint is a sha256 over the weights, the architecture (including the position-embedding rule) and the
preprocessing. Together these determine an image's features. The vector store records the fingerprint with the vectors,
so vectors from different models are never mixed. `load_artifact` checks every file against the manifest, and every
graph against the one that the weights give, and raises an error if a file differs.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.config import ViTConfig
from model.files import NAME_PATTERN, publish
from model.messages import in_words
from model.onnx_graph.spec import GRAPH_SUFFIXES, AttentionForm, GraphSpec, Int8Weights, Precision
from model.preprocess import PreprocessSpec, output_size

if TYPE_CHECKING:  # `dinov2 models` imports this module, and importing numpy would take a quarter of its time
    import numpy as np
    import numpy.typing as npt

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ONNX = "model.onnx"
MODEL_CARD = "README.md"
FORMAT_VERSION: Literal[1] = 1
BUNDLED_DIR = Path(__file__).parent / "bundled"

Weights = Mapping[str, "npt.NDArray[np.floating]"]


class ArtifactError(ValueError):
    """The error raised when an artifact cannot be read or trusted. The message names the file and the reason."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """The size and the hash of one file in an artifact.

    If `derived` is True and the file is missing, it is rebuilt from the weights and must match this record.
    """

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    derived: bool = False


class GateRecord(_Record):
    """The result of the k-NN gate for one int8 graph.

    The gate compares the k-NN accuracy of the int8 graph with that of the float32 model (see
    `model/engines/knn_gate.py`). A graph that does not pass the gate must not be used for serving.
    """

    status: Literal["passed", "failed", "not measured"]
    reason: str  # one line: the reason why the graph may not serve, or the accuracies
    k: int | None = None  # number of voting neighbours
    val_photos: int | None = None
    val_right: tuple[int, int] | None = None  # correctly classified images in val: (float32, int8)
    train_photos: int | None = None
    train_right: tuple[int, int] | None = None  # correctly classified images in train, leave-one-out


Reference = Literal["torch float32", "numpy float64"]
"""The forward pass that the results of a graph are compared with."""


class ParityRecord(_Record):
    """How much one engine's features differ from those of the reference on the same pixels.

    The reference is the model's forward pass in torch or numpy (see `model/engines/parity.py`).
    """

    engine: str
    precision: str
    images: int
    max_abs_error: float
    min_cosine_cls: float
    min_cosine_patches: float
    neighbour_agreement: float
    reference: Reference = "torch float32"
    file: str = "model.onnx"  # the compared graph
    size: tuple[int, int] | None = None  # input (H, W) in pixels; None means the artifact's input size
    batch: int | None = None  # images in one forward pass
    gate: GateRecord | None = None  # int8 graphs only


class GraphRecord(_Record):
    """The manifest's record of a graph other than `model.onnx`, including the options that the graph was built with."""

    file: str = Field(pattern=r"^model-[a-z0-9]+-[a-z0-9]+\.onnx$")
    size: tuple[int, int] | None  # input (H, W) in pixels; None means any multiples of the patch size
    precision: Precision
    outputs: tuple[str, ...]
    attention: AttentionForm
    int8_weights: Int8Weights = "s7"
    float_layers: tuple[str, ...] = ()  # layers that int8 does not quantize
    not_compared: str | None = None  # the reason for a missing parity record

    @property
    def spec(self) -> GraphSpec:
        """The options from which `model/onnx_graph/build.py` builds this graph."""
        return GraphSpec(**{name: getattr(self, name) for name in GraphSpec.__dataclass_fields__})


class Manifest(_Record):
    """The content of an artifact's `manifest.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=NAME_PATTERN)
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: ViTConfig
    preprocess: PreprocessSpec
    input_size: tuple[int, int]  # input (H, W) of model.onnx in pixels
    parity: list[ParityRecord]
    graphs: list[GraphRecord] = Field(default_factory=list)  # in addition to model.onnx
    provenance: dict[str, Any]
    licence: str
    created: str  # ISO 8601, UTC
    files: dict[str, FileRecord]

    @property
    def specs(self) -> dict[str, GraphSpec]:
        """The options of every graph that the manifest describes, keyed by file name. `files` may lack `model.onnx`."""
        return {ONNX: GraphSpec(size=self.input_size)} | {graph.file: graph.spec for graph in self.graphs}


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder, its manifest, and the path of each file."""

    path: Path
    manifest: Manifest
    locations: Mapping[str, Path]
    derived_dir: Path | None = None  # the parent folder of `derived`; None means the parent of `path`

    @property
    def name(self) -> str:
        return f"{self.manifest.name}-{self.manifest.fingerprint[:8]}"

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists. The file has already been verified.

        Raises:
            ArtifactError: the artifact has no file of this name.
        """
        if name not in self.locations:
            raise ArtifactError(f"{self.path}: has no {name}; its files are {', '.join(sorted(self.locations))}")
        return self.locations[name]

    @property
    def derived(self) -> Path:
        """The folder for the graphs and TensorRT plans that this host builds from the artifact.

        The folder may not exist yet. Its name contains the fingerprint, because the artifact's own folder can be
        renamed, or replaced with another model's folder.
        """
        return (self.derived_dir or self.path.parent) / self.name

    @property
    def weights(self) -> Weights:
        """The tensors in `weights.safetensors`, keyed by name. Each is read from the file when it is accessed."""
        return StoredWeights(self.file(WEIGHTS))


class StoredWeights(Mapping[str, "npt.NDArray[np.floating]"]):
    """A `weights.safetensors` file as a mapping from name to array.

    Each access reads one tensor from the file. Code that processes the tensors one at a time therefore needs memory for
    only one tensor.

    Raises:
        ArtifactError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        try:
            self._file = safe_open(path, framework="numpy")
        except Exception as error:  # safetensors raises its own exception class, or OSError
            raise ArtifactError(f"{path}: cannot be read as safetensors: {error}") from error
        self._keys: list[str] = list(self._file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> "npt.NDArray[np.floating]":
        if key not in self._keys:
            raise KeyError(key)
        array: npt.NDArray[np.floating] = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def graph_name(size: tuple[int, int] | None, precision: str) -> str:
    """Return the file name of a graph other than `model.onnx`.

    `size` is the input size (H, W) in pixels, or None for a graph that accepts any size. Examples are
    `model-224-int8.onnx`, `model-224x336-fp32.onnx` and `model-dynamic-fp32.onnx`.
    """
    shown = "dynamic" if size is None else str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    return f"model-{shown}-{precision}.onnx"


def fingerprint(weights: Weights, config: ViTConfig, preprocess: PreprocessSpec) -> str:
    """Return the sha256 (64 hex digits) of the weights, the configuration and the preprocessing.

    Together these determine every vector that the model computes.
    """
    import numpy as np

    digest = hashlib.sha256()
    for key in sorted(weights):
        array = np.ascontiguousarray(weights[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    identity = {"config": asdict(config), "preprocess": preprocess.model_dump(mode="json")}
    digest.update(json.dumps(identity, sort_keys=True).encode())
    return digest.hexdigest()


def input_size(preprocess: PreprocessSpec) -> tuple[int, int]:
    """Return the (H, W) in pixels of the network input, which is the same for every image.

    Raises:
        ValueError: the transform `preprocess` does not crop, so the size differs from image to image.
    """
    if preprocess.crop is None:
        raise ValueError("crop=None keeps each image's own size, but an exported graph takes one size: set a crop")
    return output_size(preprocess.crop, preprocess.crop, preprocess)


def describe_file(path: Path, *, derived: bool = False) -> FileRecord:
    """Return a manifest record for the file at `path`, with the file's sha256 and size in bytes.

    `derived` is copied into the record. It marks a file that can be rebuilt from the weights.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, bytes=path.stat().st_size, derived=derived)


def read_manifest(path: Path) -> Manifest:
    """Parse and return the `manifest.json` in the artifact folder `path`. The files that it lists are not checked.

    Raises:
        ArtifactError: the manifest is missing, has another format, lists a file outside the folder, or describes a
            graph whose file it does not list or whose file has the name of another graph.
    """
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: not an artifact: {MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{path / MANIFEST}: not a manifest of format {FORMAT_VERSION}: {in_words(error)}"
        ) from error
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, "..", "."):
            raise ArtifactError(f"{path / MANIFEST}: file name {name!r} points outside the artifact's folder")
    for graph in manifest.graphs:
        if graph.file not in manifest.files:
            raise ArtifactError(f"{path / MANIFEST}: describes {graph.file}, which is not in its list of files")
        if graph.file != (name := graph_name(graph.size, graph.precision)):
            raise ArtifactError(f"{path / MANIFEST}: describes {graph.file}, but the name of this graph is {name}")
    return manifest


def load_artifact(path: Path, *, derived_dir: Path | None = None) -> Artifact:
    """Check every file of an artifact and return the artifact. Missing graphs are built from the weights.

    The fingerprint does not cover the graphs, so each graph is compared with the one that the weights give.

    Args:
        path: the artifact's folder.
        derived_dir: a folder for missing graphs. They are stored in a subfolder that has the same name as the
            artifact's folder. If `derived_dir` is None, they are stored in the artifact's folder itself.

    Raises:
        ArtifactError: the manifest or a file is missing, changed or unreadable, a graph does not belong to the weights,
            or a missing graph cannot be written. The message names the file and the reason.
    """
    manifest = verified_manifest(path)
    check_graphs(path, manifest)
    locations = {WEIGHTS: path / WEIGHTS}
    for name, record in manifest.files.items():
        if name == WEIGHTS:
            continue
        location = path / name
        if record.derived and not location.exists():
            location = _derived(path, manifest, name, (derived_dir or path.parent) / path.name)
        verify_file(location, record)
        locations[name] = location
    return Artifact(path=path, manifest=manifest, locations=locations, derived_dir=derived_dir)


def verified_manifest(path: Path) -> Manifest:
    """Check the weights of an artifact, and return its manifest. Other files are neither checked nor built.

    Raises:
        ArtifactError: the manifest or the weights are missing, changed or unreadable, or a weight is not finite.
    """
    manifest = read_manifest(path)
    if WEIGHTS not in manifest.files:
        raise ArtifactError(f"{path / MANIFEST}: does not list {WEIGHTS}")
    verify_file(path / WEIGHTS, manifest.files[WEIGHTS])
    _check_weights(path, manifest)
    return manifest


def _check_weights(path: Path, manifest: Manifest) -> None:
    """Check that an artifact's weights match the fingerprint and are finite."""
    from model.convert import finite_problem

    weights = StoredWeights(path / WEIGHTS)
    actual = fingerprint(weights, manifest.config, manifest.preprocess)
    if actual != manifest.fingerprint:
        raise ArtifactError(
            f"{path / MANIFEST}: fingerprint is {manifest.fingerprint}, but weights, architecture and preprocessing "
            f"give {actual}: one of them was changed"
        )
    for name, array in weights.items():
        if problem := finite_problem(name, array):
            raise ArtifactError(f"{path / WEIGHTS}: {problem}")


def check_graphs(path: Path, manifest: Manifest) -> None:
    """Check that the manifest of an artifact lists only graphs that its weights give. The weights are already verified,
    and the files of the graphs are not read.

    Raises:
        ArtifactError: the manifest lists another graph, or a graph that cannot be built.
    """
    from model.onnx_graph.foreign import foreign_graph  # imports onnx

    specs = {name: spec for name, spec in manifest.specs.items() if name in manifest.files}
    listed = {name: record.sha256 for name, record in manifest.files.items() if name.endswith(GRAPH_SUFFIXES)}
    try:
        foreign = foreign_graph(listed, specs, StoredWeights(path / WEIGHTS), manifest.config)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if foreign is not None:
        raise ArtifactError(
            f"{path / foreign}: not the graph that {WEIGHTS} gives: the file was changed, or another version of this "
            f"project made it. If you trust the weights, export them again: dinov2 export {path} --out FOLDER"
        )


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
    """Return the artifact folders in `<data_dir>/artifacts`, newest first, followed by the one that ships with the
    project.
    """
    local = [path.parent for path in (data_dir / "artifacts").glob(f"*/{MANIFEST}") if path.parent.name[0] != "."]
    return [
        *sorted(local, key=_created, reverse=True),
        *sorted(path.parent for path in BUNDLED_DIR.glob(f"*/{MANIFEST}")),
    ]


def _created(path: Path) -> tuple[str, str]:
    """Return the creation time and the folder name of an artifact, as a sort key.

    If the manifest is unreadable, the creation time is an empty string.
    """
    try:
        return read_manifest(path).created, path.name
    except ArtifactError:
        return "", path.name


def verify_file(path: Path, record: FileRecord) -> None:
    try:
        found = describe_file(path)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error
    if (found.bytes, found.sha256) != (record.bytes, record.sha256):
        raise ArtifactError(
            f"{path}: has {found.bytes} bytes and sha256 {found.sha256}, but the manifest has {record.bytes} bytes "
            f"and {record.sha256}: the file was changed or truncated"
        )


def _derived(path: Path, manifest: Manifest, name: str, directory: Path) -> Path:
    """Return the path of the graph `name` in `directory`.

    An existing file is used if its hash matches the manifest. Otherwise the graph is built from the weights, which the
    caller has verified, and the caller must verify the new file.

    Raises:
        ArtifactError: `name` is not a graph, or the file cannot be written.
    """
    if name not in manifest.specs:
        raise ArtifactError(f"{path / name}: missing, and only graphs can be rebuilt")
    target = directory / name
    if target.exists() and describe_file(target).sha256 == manifest.files[name].sha256:
        return target
    derive_graph(StoredWeights(path / WEIGHTS), manifest.config, manifest.specs[name], target)
    return target


def derive_graph(weights: Weights, config: ViTConfig, spec: GraphSpec, target: Path) -> None:
    """Build a graph from the weights and write it to the file `target`, completely or not at all.

    Raises:
        ArtifactError: the file or its folder cannot be written.
    """
    from model.onnx_graph.build import write_onnx  # imports onnx

    directory = target.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".deriving-") as temporary:
            names = write_onnx(weights, config, spec, Path(temporary) / target.name)
            for written in reversed(names):  # the graph file last, so that the other files exist once it exists
                publish(Path(temporary) / written, directory / written)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written: {error.strerror}") from error
