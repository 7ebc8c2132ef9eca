"""Jobs of the kind `retrain`: train, export, compare with the live model, and make the new model live if it passes.

    train  ─▶  export (with its parity check)  ─▶  gate  ─▶  approval, if wanted  ─▶  migrate and switch

Each step is stored, so another worker goes on after the last one that has finished. If the gate refuses the new model,
the job fails with the reasons, the live model stays, and the new one remains in the data folder. The gate compares with
the model that was live at the start: if another model becomes live meanwhile, the job fails.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import Field, field_validator

from model.files import NAME_PATTERN
from service.artifact_choice import artifact_of
from service.generations import Generations, utc
from service.jobs.compare import list_file
from service.jobs.context import ChildFailed, Context, JobFailed
from service.jobs.export import ExportParams, run_export
from service.jobs.frozen_set import open_frozen_set
from service.jobs.reindex import MigrationParams, lost_items, path_of, run_migration
from service.jobs.roots import data_source
from service.jobs.train import RUN, Override, TrainParams, read_object, run_training
from service.jobs.verdict import GateRules
from service.migration.images import described
from service.schema_base import ONE_OR_MORE
from service.settings import Settings

VERDICT: Final = "verdict.json"
REFUSED_STATUS: Final = 3
"""The exit status of `dinov2 models compare` if the gate refuses the new model."""
SHARES: Final = {"train": (0.0, 0.7), "migrate": (0.8, 1.0)}
"""The parts of the job's progress that the long steps cover."""


class RetrainParams(MigrationParams):
    """What `POST /v1/jobs` accepts for a retraining."""

    data: Annotated[list[str], ONE_OR_MORE] = Field(
        min_length=1, max_length=100, description="images to train on, below DINOV2_JOB_ROOTS"
    )
    recipe: str = Field(
        "continue",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="name of a recipe; continue starts from the live model",
    )
    hours: float | None = Field(None, gt=0, le=8760, description="time that the training may take")
    overrides: Annotated[list[Override], ONE_OR_MORE] = Field(
        default=[], max_length=100, description="settings of the training, as key=value"
    )
    name: str | None = Field(None, pattern=NAME_PATTERN, description="name of the new model")
    gate_data: str | None = Field(
        None,
        description="folder of images on which the models are compared; images that neither was trained on are best; "
        "unset: the first of data",
    )
    gate_rules: dict[str, Any] = Field(default={}, max_length=30, description="rules of the gate that differ")
    approve: bool = Field(False, description="whether the job waits for approval before the new model becomes live")

    @field_validator("gate_rules")
    @classmethod
    def _rules_are_known(cls, rules: dict[str, Any]) -> dict[str, Any]:
        GateRules.read(rules)
        return rules

    @property
    def training(self) -> TrainParams:
        """The parameters of the training."""
        return TrainParams(data=self.data, recipe=self.recipe, hours=self.hours, overrides=self.overrides)

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. See `JobParams.resolved`."""
        training = self.training.resolved(settings)
        gate_data = data_source(self.gate_data or self.data[0], settings)
        if not Path(gate_data).is_dir():
            name = "gate_data" if self.gate_data else "data"
            raise ValueError(f"{name} {gate_data[:200]!r} is not a folder: the gate needs a folder, named in gate_data")
        return self.model_copy(update={"data": training.data, "overrides": training.overrides, "gate_data": gate_data})


def retrain(context: Context[RetrainParams]) -> None:
    """Do the work of a job."""
    params = context.params
    champion = context.step("champion", lambda: _live(context))
    context.step("frozen set", lambda: _freeze(context))
    context.step("images of the collections", lambda: _check_images(context))
    overrides = list(params.overrides)
    if params.recipe == "continue" and not any(each.startswith("init=") for each in overrides):
        overrides.append(f'init="{champion["path"]}"')
    training = params.training.model_copy(update={"overrides": overrides})
    context.step("train", lambda: run_training(context, training, context.folder / RUN, SHARES["train"]))
    export = ExportParams(source=str(context.folder / RUN), name=params.name, weights_dtype="float32")
    challenger = context.step("export", lambda: run_export(context, export))
    if challenger["fingerprint"] == champion["fingerprint"]:
        raise JobFailed("the training did not help: the network that it released is the live model")
    path = path_of(challenger, context.data_dir)
    verdict = context.step("gate", lambda: _run_gate(context, Path(champion["path"]), path))
    if not verdict["passed"]:
        raise JobFailed(f"the gate refused the new model, and the live model stays: {'; '.join(verdict['reasons'])}")
    if params.approve:
        context.wait_for_approval("approve", f"make {path.name} live: {'; '.join(verdict['reasons']) or 'it passed'}")
    _check_champion(context, champion, challenger)
    arguments = ["models", "promote", str(path)]
    report = context.step("migrate", lambda: run_migration(context, params, arguments, [], SHARES["migrate"]))
    Generations(context.data_dir).set_metrics(report["generation"], {"gate": verdict})
    context.report(1.0, f"generation {report['generation']} is live: {path.name}")


def _live(context: Context[RetrainParams]) -> dict[str, Any]:
    live = Generations(context.data_dir).live()
    if live is None:
        raise JobFailed("no model is live: start the service once, so that it records its model")
    path = artifact_of(live, context.data_dir).absolute()
    return {"generation": live.number, "fingerprint": live.fingerprint, "path": str(path)}


def _freeze(context: Context[RetrainParams]) -> dict[str, Any]:
    """Choose the images of the gate, or check those that were chosen before, so that the job does not fail after the
    training because one is missing."""
    folder = Path(str(context.params.gate_data))
    context.report(0.0, "checking the images of the gate")
    if str(folder) in context.params.data:
        context.log("the gate compares the models on the images of the training; better name others with gate_data")
    frozen = open_frozen_set(list_file(context.data_dir, folder), folder, tell=context.log)
    return {"images": len(frozen.images), "sha256": frozen.digest}


def _check_images(context: Context[RetrainParams]) -> dict[str, int]:
    """Find the items that cannot be embedded again, so that the job does not fail after the training.

    Raises:
        JobFailed: there are such items, and `lost` is "refuse".
        Conflict: the store cannot re-embed collections.
    """
    lost = asyncio.run(lost_items(context.settings))
    former = Generations(context.data_dir).window()
    if former is not None and former.keep_until is not None and not context.params.end_window:
        context.log(
            f"generation {former.number} can become live again at once until {utc(former.keep_until)}; if the training "
            "ends earlier, the job fails before the switch. To give this up, use end_window=true"
        )
    if lost and context.params.lost == "refuse":
        raise JobFailed(
            f"items without an image that can be read ({described(lost)}): use lost=drop to drop them, or lost=keep to "
            "keep their collections on the old model"
        )
    return {name: len(ids) for name, ids in lost.items()}


def _check_champion(context: Context[RetrainParams], champion: dict[str, Any], challenger: dict[str, Any]) -> None:
    live = Generations(context.data_dir).live()
    if live is None or live.fingerprint not in (champion["fingerprint"], challenger["fingerprint"]):
        raise JobFailed(
            f"generation {live.number if live else 'none'} is live, but the new model was compared with generation "
            f"{champion['generation']}: retrain again"
        )


def _run_gate(context: Context[RetrainParams], champion: Path, challenger: Path) -> dict[str, Any]:
    """Compare the two models. Return whether the new one passed, the reasons, and the figures."""
    out = context.folder / VERDICT
    out.unlink(missing_ok=True)
    params = context.params
    rules = [f"--rule={name}={value}" for name, value in params.gate_rules.items()]
    context.report(0.75, "comparing the models")
    arguments = ["models", "compare", str(champion), str(challenger), f"--data={params.gate_data}", f"--out={out}"]
    try:
        context.run_command([*arguments, f"--data-dir={context.data_dir}", *rules])
    except ChildFailed as failed:
        if failed.status != REFUSED_STATUS:
            raise
    verdict = read_object(out)
    if "passed" not in verdict:
        raise JobFailed("the comparison of the models has written no verdict")
    return verdict
