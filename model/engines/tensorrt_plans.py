"""Stores TensorRT plans on disk, each under a key of everything that it depends on.

A plan is machine code for one GPU, built by one version of the library from one graph. Its key is a sha256 over GPU,
driver, library, graph and options. After a change of any of these no stored plan matches, so a plan that would be slow,
refused or wrong is never loaded.

    <data folder>/derived/<artifact>/plans/
      <key>.plan            the plan
      <key>.json            the plan's record: the parts of the key, sha256, build time and parity figures
      <key>.jit             kernels that TensorRT for RTX compiled on this GPU, written at the first start
      <graph>.graph.json    the sha256 of the ONNX graph for an artifact, size and precision, so that a server
                            can compute the plan's key without writing the graph again

If `passed` is false in a record, it stores the figures of a plan that failed parity and was deleted.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.artifact import Artifact, ParityRecord
from model.engines.cuda_memory import Cuda, Gpu, describe_gpu, load_runtime
from model.engines.tensorrt_build import Library, find_library
from model.files import write_bytes, write_text
from model.onnx_graph.build import GraphSpec

PlanPrecision = Literal["bf16", "fp16", "fp8"]
PRECISIONS: tuple[PlanPrecision, ...] = get_args(PlanPrecision)


class Profile(NamedTuple):
    """The lowest and highest batch size that one set of kernels supports, and the size that it is tuned for."""

    low: int
    best: int
    high: int


PROFILES = (Profile(1, 1, 1), Profile(2, 8, 16), Profile(17, 32, 64))
"""The profiles of every plan: one for a single image, one for small batches and one for large batches."""


@dataclass(frozen=True)
class Toolchain:
    """The library, CUDA and GPU that build and run plans on this host."""

    library: Library
    cuda: Cuda
    gpu: Gpu


def find_toolchain(library: str | None = None) -> Toolchain:
    """Return TensorRT, CUDA and the GPU of this host. `find_library` selects the TensorRT library.

    Raises:
        ModuleNotFoundError: TensorRT or the CUDA bindings are not installed. The message says how to install them.
        ValueError: CUDA can use no GPU, or the library is too old.
    """
    tensorrt, cuda = find_library(library), Cuda(load_runtime())
    return Toolchain(tensorrt, cuda, describe_gpu(cuda))


def plans_folder(derived_dir: Path) -> Path:
    """Return the folder that stores an artifact's plans. `derived_dir` is the artifact's `Artifact.derived`."""
    return derived_dir / "plans"


def graph_spec(artifact: Artifact, precision: PlanPrecision, library: Library) -> GraphSpec:
    """Return the spec of the graph from which an artifact's plan is built.

    With bf16, attention computes its softmax in float32. With fp16, it computes the softmax in fp16 unless queries,
    keys and values are cast to float32. TensorRT for RTX can fuse attention with these casts, and the full library can
    since 11.3 according to its release notes, so the graph has the casts for these libraries. The graph of a model
    without registers has no output `registers`, which would be empty.
    """
    major, minor = (int(part) for part in library.version.split(".")[:2])
    casts = precision == "fp16" and (library.name == "tensorrt_rtx" or (major, minor) >= (11, 3))
    registers = ("registers",) if artifact.manifest.config.num_register_tokens else ()
    return GraphSpec(
        size=artifact.manifest.input_size,
        precision=precision,
        outputs=("cls", "patches", *registers),
        attention="upcast" if casts else "standard",
    )


def graph_identity(artifact: Artifact, spec: GraphSpec) -> str:
    """Return 32 hex digits that identify a graph: a hash of the weights, the spec and the code that writes graphs."""
    package = Path(__file__).parents[1]
    writer = file_digest(sorted([*(package / "onnx_graph").glob("*.py"), package / "pos_embed.py"]))
    return hashlib.sha256(f"{artifact.fingerprint} {spec} {writer}".encode()).hexdigest()[:32]


class PlanMissing(ValueError):
    """Raised if no plan may serve. The message gives the reason."""


class PlanKey(BaseModel):
    """Everything that a plan depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    onnx_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    precision: PlanPrecision
    library: str
    version: str
    gpu: str
    capability: tuple[int, int]
    driver: str
    profiles: tuple[Profile, ...] = PROFILES
    refit: bool = False

    @property
    def digest(self) -> str:
        """The sha256 of the key (64 hex digits), which is the base name of the plan's files."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class PlanRecord(BaseModel):
    """The content of `<key>.json`: a plan's key, hash, parity figures and build times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: PlanKey
    artifact: str  # its name with the first 8 digits of the fingerprint
    size: tuple[int, int]  # (H, W) pixels
    sha256: str
    bytes: int
    passed: bool
    parity: list[ParityRecord]  # one per batch bucket, in order
    reference: str  # the engine that the plan was compared with
    fused_attention: int
    build: dict[str, Any]  # seconds per step, library; as reported by the build
    created: str  # ISO 8601, UTC


def make_key(onnx_sha256: str, precision: PlanPrecision, toolchain: Toolchain, *, refit: bool) -> PlanKey:
    """Return the key of a plan that `toolchain` builds from the graph with this sha256."""
    return PlanKey(
        onnx_sha256=onnx_sha256,
        precision=precision,
        library=toolchain.library.name,
        version=toolchain.library.version,
        gpu=toolchain.gpu.name,
        capability=toolchain.gpu.capability,
        driver=toolchain.gpu.driver,
        refit=refit,
    )


def plan_path(folder: Path, key: PlanKey) -> Path:
    """Return the path at which `folder` stores the plan of `key`. The file need not exist."""
    return folder / f"{key.digest}.plan"


def find_plan(
    artifact: Artifact, precision: PlanPrecision, toolchain: Toolchain, folder: Path
) -> tuple[bytes, PlanRecord]:
    """Return the plan that may serve `artifact` on this host, and its record. The plan may be refittable.

    Raises:
        PlanMissing: no plan may serve. The message has the reason.
    """
    identity = graph_identity(artifact, graph_spec(artifact, precision, toolchain.library))
    onnx_sha256 = recall_graph(folder, identity)
    reasons = []
    for refit in (False, True):
        try:
            return read_plan(folder, make_key(onnx_sha256, precision, toolchain, refit=refit))
        except PlanMissing as missing:
            reasons.append(str(missing))
    specific = [reason for reason in reasons if not reason.startswith("no ")] or reasons
    raise PlanMissing(specific[0])


def read_plan(folder: Path, key: PlanKey) -> tuple[bytes, PlanRecord]:
    """Return the plan of `key` and its record, after checking the plan against the record.

    Raises:
        PlanMissing: the plan is missing, is damaged, or failed parity.
    """
    name = key.digest
    try:
        record = PlanRecord.model_validate_json((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        raise PlanMissing(
            f"no {key.precision} plan for {key.library} {key.version} on {key.gpu} with driver {key.driver}: "
            "`dinov2 build-engine` builds one"
        ) from None
    except (OSError, ValidationError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise PlanMissing(f"{folder / name}.json: damaged ({first_line}): build it again") from error
    if record.key != key:
        raise PlanMissing(f"{folder / name}.json: record of another plan: build it again")
    if not record.passed:
        raise PlanMissing(f"the {key.precision} plan failed parity: {figures(record.parity)}")
    try:
        plan = (folder / f"{name}.plan").read_bytes()
    except OSError as error:
        raise PlanMissing(f"{folder / name}.plan: {error.strerror}: build it again") from error
    if hashlib.sha256(plan).hexdigest() != record.sha256:
        raise PlanMissing(f"{folder / name}.plan: changed or truncated: build it again")
    return plan, record


def write_plan(folder: Path, plan: bytes | None, record: PlanRecord) -> Path:
    """Store a plan and its record, and return the plan's path. If `plan` is None, store only the record.

    The plan is written before the record, so that a record of a passed plan never exists without the plan.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = plan_path(folder, record.key)
    target.with_suffix(".jit").unlink(missing_ok=True)  # kernels compiled for the previous plan
    if plan is None:
        target.unlink(missing_ok=True)
    else:
        write_bytes(target, plan)
    text = json.dumps(record.model_dump(mode="json"), indent=2) + "\n"
    write_text(target.with_suffix(".json"), text)
    return target


def remember_graph(folder: Path, identity: str, onnx_sha256: str) -> None:
    """Store the sha256 of the graph that `graph_identity` identifies by `identity`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{identity}.graph.json", json.dumps({"onnx_sha256": onnx_sha256}))


def recall_graph(folder: Path, identity: str) -> str:
    """Return the sha256 that `remember_graph` stored for `identity`.

    Raises:
        PlanMissing: no plan was built for this graph on this host.
    """
    try:
        onnx_sha256 = json.loads((folder / f"{identity}.graph.json").read_bytes())["onnx_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PlanMissing("no plan was built for this model on this host: `dinov2 build-engine` builds one") from None
    return str(onnx_sha256)


def figures(parity: Sequence[ParityRecord]) -> str:
    """Return the worst parity figures over all batch sizes as text."""
    return (
        f"class cosine {min(record.min_cosine_cls for record in parity):.6f}, "
        f"patch cosine {min(record.min_cosine_patches for record in parity):.6f}, "
        f"max error {max(record.max_abs_error for record in parity):.3g}, {parity[0].images} images"
    )


def file_digest(paths: Sequence[Path]) -> str:
    """Return the sha256 of the concatenated content of several files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
