"""Stores TensorRT plans on disk, each under its own key.

A plan is machine code for one GPU, built by one version of the TensorRT library from one graph. Its key is a sha256
hash of the GPU, driver, library, graph and options. If one of these changes, the key changes too, so a plan that was
built for another GPU, driver or library is never loaded.

    <data folder>/derived/<artifact>/plans/
      <key>.plan            the plan
      <key>.json            the plan's record: the key's fields, the plan's sha256, build times and parity metrics
      <key>.jit             kernels that TensorRT for RTX compiled on this GPU, written after the build and each start
      <graph>.graph.json    the sha256 of the graph for this artifact and one precision, so that a server can
                            compute the plan's key without writing the graph again

A record in which `passed` is false contains the metrics of a plan that failed the parity check and was not stored.
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
from model.messages import in_words
from model.onnx_graph.spec import GraphSpec

PlanPrecision = Literal["bf16", "fp16", "fp8"]
PRECISIONS: tuple[PlanPrecision, ...] = get_args(PlanPrecision)


class Profile(NamedTuple):
    """A range of batch sizes, from `low` to `high`, for which a plan has one set of kernels.

    The kernels are tuned for batch size `best`.
    """

    low: int
    best: int
    high: int


PROFILES = (Profile(1, 1, 1), Profile(2, 8, 16), Profile(17, 32, 64))
"""The profiles of every plan: one for a single image, one for small batches and one for large batches."""


@dataclass(frozen=True)
class Toolchain:
    """The TensorRT library, the CUDA bindings and the GPU that build and run plans on this host."""

    library: Library
    cuda: Cuda
    gpu: Gpu


def find_toolchain(library: str | None = None) -> Toolchain:
    """Find this host's TensorRT library, CUDA bindings and GPU.

    `library` is the name of the TensorRT library. If None, `find_library` selects the library.

    Raises:
        ModuleNotFoundError: TensorRT or the CUDA bindings are not installed. The message says how to install them.
        ValueError: CUDA cannot use any GPU, or the TensorRT library is unknown or too old.
    """
    tensorrt, cuda = find_library(library), Cuda(load_runtime())
    return Toolchain(tensorrt, cuda, describe_gpu(cuda))


def plans_folder(derived_dir: Path) -> Path:
    """Return the folder that stores an artifact's plans. `derived_dir` is the artifact's `Artifact.derived`."""
    return derived_dir / "plans"


def graph_spec(artifact: Artifact, precision: PlanPrecision, library: Library) -> GraphSpec:
    """Return the spec of the graph from which an artifact's plan is built.

    If the model has no registers, the graph has no output `registers`.
    """
    registers = ("registers",) if artifact.manifest.config.num_register_tokens else ()
    return GraphSpec(
        size=artifact.manifest.input_size,
        precision=precision,
        outputs=("cls", "patches", *registers),
        attention=attention_form(precision, library),
    )


def attention_form(precision: PlanPrecision, library: Library) -> Literal["standard", "upcast"]:
    """Return the form of attention in the graph of a plan.

    Without casts ("upcast"), an fp16 graph would compute attention's softmax in fp16. It therefore casts queries, keys
    and values to float32 if the library can fuse attention with these casts. TensorRT for RTX can, and so can the full
    library since version 11.3, according to its release notes. A bf16 graph needs no casts, because its softmax is
    computed in float32.
    """
    major, minor = (int(part) for part in library.version.split(".")[:2])
    casts = precision == "fp16" and (library.name == "tensorrt_rtx" or (major, minor) >= (11, 3))
    return "upcast" if casts else "standard"


def graph_identity(artifact: Artifact, spec: GraphSpec) -> str:
    """Return 32 hex digits that identify the graph that `spec` describes.

    The digits are a hash of the artifact's fingerprint, the spec, and the code that writes graphs.
    """
    package = Path(__file__).parents[1]
    writer = file_digest(sorted([*(package / "onnx_graph").glob("*.py"), package / "pos_embed.py"]))
    return hashlib.sha256(f"{artifact.fingerprint} {spec} {writer}".encode()).hexdigest()[:32]


class PlanMissing(ValueError):
    """The error raised when no stored plan can serve. The message gives the reason."""


class PlanKey(BaseModel):
    """The fields of a plan's key, which are everything that the plan depends on."""

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
        """The sha256 of the fields (64 hex digits), which is the base name of the plan's files."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class PlanRecord(BaseModel):
    """The content of `<key>.json`: a plan's key, hash, parity metrics and build times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: PlanKey
    artifact: str  # its name with the first 8 digits of the fingerprint
    size: tuple[int, int]  # (H, W) pixels
    sha256: str
    bytes: int
    passed: bool
    parity: list[ParityRecord]  # one per batch size in BUCKETS, in order
    reference: str  # the engine that the plan was compared with
    fused_attention: int
    build: dict[str, Any]  # seconds per step, and the library, as the build reported them
    created: str  # ISO 8601, UTC


def make_key(onnx_sha256: str, precision: PlanPrecision, toolchain: Toolchain, *, refit: bool) -> PlanKey:
    """Return the key of a plan that `toolchain` builds from the graph with the hash `onnx_sha256`.

    `refit` states whether the plan's weights can be replaced later.
    """
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
    """Return the path of the plan with this key in `folder`. The file may not exist."""
    return folder / f"{key.digest}.plan"


def find_plan(
    artifact: Artifact, precision: PlanPrecision, toolchain: Toolchain, folder: Path
) -> tuple[bytes, PlanRecord]:
    """Return the bytes and the record of the stored plan that can serve `artifact` on this host.

    A plan whose weights cannot be replaced is preferred to one that was built with `refit`.

    Raises:
        PlanMissing: no plan can serve. The message gives the reason.
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
    """Return the bytes and the record of the plan with this key. The bytes are checked against the record's hash.

    Raises:
        PlanMissing: the plan is missing or damaged, or it failed the parity check.
    """
    name = key.digest
    try:
        record = PlanRecord.model_validate_json((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        raise PlanMissing(
            f"no {key.precision} plan for {key.library} {key.version} on {key.gpu} with driver {key.driver}: "
            "`dinov2 build-engine` builds one"
        ) from None
    except (OSError, ValidationError) as error:
        reason = in_words(error) if isinstance(error, ValidationError) else error.strerror
        raise PlanMissing(f"{folder / name}.json: damaged ({reason}): build it again") from error
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
    """Store a plan and its record, and return the plan's path. If `plan` is None, only the record is stored.

    The plan is written before its record, so if a record with `passed` true exists, its plan exists too.

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
    """Store a graph's sha256 under `identity`, the value that `graph_identity` returned for the graph."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{identity}.graph.json", json.dumps({"onnx_sha256": onnx_sha256}))


def recall_graph(folder: Path, identity: str) -> str:
    """Return the sha256 that `remember_graph` stored under `identity`.

    Raises:
        PlanMissing: no plan was built for this graph on this host.
    """
    try:
        onnx_sha256 = json.loads((folder / f"{identity}.graph.json").read_bytes())["onnx_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PlanMissing("no plan was built for this model on this host: `dinov2 build-engine` builds one") from None
    return str(onnx_sha256)


def figures(parity: Sequence[ParityRecord]) -> str:
    """Return the worst parity metrics over all batch sizes, as text for a message."""
    return (
        f"class cosine {min(record.min_cosine_cls for record in parity):.6f}, "
        f"patch cosine {min(record.min_cosine_patches for record in parity):.6f}, "
        f"max error {max(record.max_abs_error for record in parity):.3g}, {parity[0].images} images"
    )


def file_digest(paths: Sequence[Path]) -> str:
    """Return the sha256 (64 hex digits) of the concatenated content of several files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
