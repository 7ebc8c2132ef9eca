"""Jobs of the kind `export`: turn a checkpoint or a run into an artifact in the data folder. It is then a candidate:
the service goes on serving the live model."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from model.files import NAME_PATTERN
from service.jobs.context import Context, JobFailed
from service.jobs.kind import JobParams
from service.jobs.roots import model_source
from service.schema_base import ONE_OR_MORE
from service.settings import Settings


class ExportParams(JobParams):
    """What `POST /v1/jobs` accepts for an export."""

    source: str = Field(
        description="id of a training job, name of a published model, or path of a checkpoint, run or artifact"
    )
    name: str | None = Field(None, pattern=NAME_PATTERN, description="name of the model; unset: the name in the source")
    precision: Annotated[list[Literal["fp32", "fp16", "bf16", "int8"]], ONE_OR_MORE] = Field(
        default=[], description="precisions of additional graphs"
    )
    sizes: Annotated[list[str], ONE_OR_MORE] = Field(
        default=[], max_length=20, description="input sizes of additional graphs, such as 518"
    )
    weights_dtype: Literal["float32", "float16"] = Field("float32", description="number format of the stored weights")

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with an absolute path without links. See `JobParams.resolved`."""
        return self.model_copy(update={"source": model_source(self.source, settings)})


def export(context: Context[ExportParams]) -> None:
    """Do the work of a job."""
    context.step("export", lambda: run_export(context, context.params))


def run_export(context: Context[Any], params: ExportParams) -> Any:
    """Export a model. Return the result of the step: the path of the artifact relative to the data folder, and its
    fingerprint.

    Raises:
        JobFailed: the model cannot be exported.
    """
    arguments = ["export", f"--data-dir={context.data_dir}", f"--weights-dtype={params.weights_dtype}"]
    options = {"name": params.name, "precision": ",".join(params.precision), "sizes": ",".join(params.sizes)}
    arguments += [f"--{name}={value}" for name, value in options.items() if value]
    output = context.run_command([*arguments, "--", params.source])
    found = re.search(r"^(.+)\nfingerprint ([0-9a-f]+)$", output, re.MULTILINE)
    if found is None:
        raise JobFailed("`dinov2 export` has not printed the path and the fingerprint of the artifact")
    path = (context.data_dir / found[1]).relative_to(context.data_dir)
    return {"artifact": str(path), "fingerprint": found[2]}
