"""Jobs of the kind `build-engine`: build a TensorRT plan of an artifact for the GPU of the worker."""

from typing import Any, Literal, Self

from pydantic import Field

from service.jobs.context import Context
from service.jobs.kind import JobParams
from service.jobs.roots import data_source, model_source
from service.settings import Settings


class BuildEngineParams(JobParams):
    """What `POST /v1/jobs` accepts for the build of an engine."""

    model: str = Field("auto", description="name or path of an artifact, name of a published model, or auto")
    precision: Literal["bf16", "fp16", "fp8"] = Field("bf16", description="number format of the plan")
    images: str | None = Field(None, description="folder of images to compare on; unset: generated images")
    rebuild: bool = Field(False, description="build even if a plan that passed the comparison exists")

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. See `JobParams.resolved`."""
        model = self.model if self.model == "auto" else model_source(self.model, settings)
        images = None if self.images is None else data_source(self.images, settings)
        return self.model_copy(update={"model": model, "images": images})


def build_engine(context: Context[BuildEngineParams]) -> None:
    """Do the work of a job."""
    context.step("build-engine", lambda: _build(context))


def _build(context: Context[BuildEngineParams]) -> Any:
    params = context.params
    arguments = ["build-engine", f"--data-dir={context.data_dir}", f"--precision={params.precision}"]
    arguments += [f"--images={params.images}"] if params.images else []
    arguments += ["--rebuild"] if params.rebuild else []
    output = context.run_command([*arguments, "--", params.model])
    return {"output": output.splitlines()[-4:]}
