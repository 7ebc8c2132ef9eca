"""Jobs of the kind `evaluate`: evaluate a model on one task, and store the report."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field

from service.jobs.context import Context
from service.jobs.kind import JobParams
from service.jobs.roots import data_source, model_source
from service.jobs.train import Override, read_object, with_source
from service.schema_base import ONE_OR_MORE
from service.settings import Settings

REPORT: Final = "evaluation.json"
PATHS: Final = frozenset({"ground_truth"})
"""Settings of the tasks that name a file."""

Task = Literal["knn", "logistic", "linear", "segmentation", "depth", "retrieval"]


class EvaluateParams(JobParams):
    """What `POST /v1/jobs` accepts for an evaluation."""

    model: str = Field(
        description="id of a training job, name of a published model, path of a checkpoint, run or artifact, or auto"
    )
    task: Task = Field(description="task to evaluate the model on")
    data: str = Field(description="data of the task, below DINOV2_JOB_ROOTS (unset: data/datasets)")
    settings: Annotated[list[Override], ONE_OR_MORE] = Field(
        default=[], max_length=100, description="settings of the task, as key=value"
    )

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. See `JobParams.resolved`."""
        model = self.model if self.model == "auto" else model_source(self.model, settings)
        given = [with_source(override, PATHS, data_source, settings) for override in self.settings]
        return self.model_copy(update={"model": model, "data": data_source(self.data, settings), "settings": given})


def evaluate(context: Context[EvaluateParams]) -> None:
    """Do the work of a job."""
    context.step("evaluate", lambda: _evaluate(context))


def _evaluate(context: Context[EvaluateParams]) -> Any:
    params, out = context.params, context.folder / REPORT
    arguments = ["eval", f"--task={params.task}", f"--data={params.data}", f"--out={out}"]
    arguments += [f"--data-dir={context.data_dir}", f"--cache={context.folder / 'features'}"]
    context.run_command([*arguments, "--", params.model, *params.settings])
    report = read_object(out)
    return {name: report.get(name) for name in ("task", "model", "fingerprint", "figures", "notes")}
