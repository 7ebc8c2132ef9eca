"""Jobs of the kind `retrain`: train, export, compare with the live model, and make the new model live if it passes.

    train  ─▶  export (with its parity check)  ─▶  gate  ─▶  approval, if wanted  ─▶  migrate and switch

The images of the gate are chosen first, and the training leaves them out (`service/jobs/gate_images.py`).
Each step is stored, so another worker goes on after the last one that has finished. If the gate refuses the new model,
the job fails with the reasons, the live model stays, and the new one remains in the data folder. The gate compares with
the model that was live at the start: if another model becomes live meanwhile, the job fails.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import Field, field_validator

from model.files import NAME_PATTERN, write_text
from service.artifact_choice import artifact_of
from service.generations import Generations, utc
from service.jobs.compare import list_file
from service.jobs.context import ChildFailed, Context, JobFailed
from service.jobs.export import ExportParams, run_export
from service.jobs.gate_images import GateImages, gate_images
from service.jobs.job_file import FOLDER
from service.jobs.reindex import MigrationParams, items_to_embed, path_of, run_migration
from service.jobs.roots import data_source
from service.jobs.train import (
    RUN,
    TOLD,
    Override,
    TrainParams,
    check_training,
    read_object,
    run_training,
    train_command,
)
from service.jobs.verdict import GateRules
from service.migration.images import described
from service.schema_base import ONE_OR_MORE
from service.settings import Settings

VERDICT: Final = "verdict.json"
EXCLUDED: Final = "excluded.txt"
"""The file in the job's folder with the paths of the images that the training leaves out."""
REFUSED_STATUS: Final = 3
"""The exit status of `dinov2 models compare` if the gate refuses the new model."""
SHARES: Final = {"train": (0.0, 0.7), "migrate": (0.8, 1.0)}
"""The parts of the job's progress that the long steps cover."""


class RetrainParams(MigrationParams):
    """What `POST /v1/jobs` accepts for a retraining."""

    data: Annotated[list[str], ONE_OR_MORE] = Field(
        min_length=1,
        max_length=100,
        description="folders of images to train on, below DINOV2_JOB_ROOTS (unset: data/datasets)",
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
        description="folder of images on which the models are compared, and which the training leaves out; unset: a "
        "share of the first folder in data",
    )
    gate_rules: dict[str, Any] = Field(default={}, max_length=30, description="rules of the gate that differ")
    approve: bool = Field(False, description="whether the job waits for approval before the new model becomes live")
    dry_run: bool = Field(False, description="only report what the retraining would do and need, and change nothing")

    @field_validator("gate_rules")
    @classmethod
    def _rules_are_known(cls, rules: dict[str, Any]) -> dict[str, Any]:
        GateRules.read(rules)
        return rules

    @property
    def training(self) -> TrainParams:
        """The parameters of the training, without those that are known when it starts."""
        return TrainParams(data=self.data, recipe=self.recipe, hours=self.hours, overrides=self.overrides)

    def training_from(self, champion: str, excluded: Path | None = None) -> TrainParams:
        """Return the parameters of a training that starts from the live model, whose artifact is in the folder
        `champion`. Another recipe than `continue`, or the override `init`, starts from something else. The file
        `excluded` lists images that the training leaves out."""
        overrides = list(self.overrides)
        if self.recipe == "continue" and not any(each.startswith("init=") for each in overrides):
            overrides.append(f'init="{champion}"')
        if excluded is not None:
            overrides.append(f'exclude="{excluded}"')
        return self.training.model_copy(update={"overrides": overrides})

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. See `JobParams.resolved`."""
        training = self.training.resolved(settings)
        gate_data = data_source(self.gate_data or self.data[0], settings)
        if not Path(gate_data).is_dir():
            name = "gate_data" if self.gate_data else "data"
            raise ValueError(
                f"{name} {gate_data[:200]!r} does not exist or is not a folder: the gate needs a folder, named in "
                "gate_data"
            )
        return self.model_copy(update={"data": training.data, "overrides": training.overrides, "gate_data": gate_data})


def check_retraining(params: RetrainParams, settings: Settings) -> None:
    """Check the settings of the training before the job is accepted. Without a live model, nothing is checked, because
    the job fails in its first step.

    Raises:
        ValueError: the recipe or a setting does not exist, or a value is not allowed. The message names it.
    """
    live = Generations(settings.data_dir).live() if Generations.exists(settings.data_dir) else None
    if live is not None:
        champion = artifact_of(live, settings.data_dir).absolute()
        check_training(params.training_from(str(champion)), settings)


def retrain(context: Context[RetrainParams]) -> None:
    """Do the work of a job."""
    params = context.params
    if params.dry_run:
        context.step("plan", lambda: _plan(context))
        context.report(1.0, "this was a dry run: nothing has changed")
        return
    champion = context.step("champion", lambda: _live(context.data_dir))
    frozen = context.step("frozen set", lambda: _freeze(context))
    context.step("images of the collections", lambda: _check_images(context))
    # An older version may have finished the step.
    training = params.training_from(champion["path"], context.folder / EXCLUDED if frozen.get("excluded") else None)
    context.step("train", lambda: run_training(context, training, context.folder / RUN, SHARES["train"]))
    export = ExportParams(source=str(context.folder / RUN), name=params.name, weights_dtype="float32")
    challenger = context.step("export", lambda: _export(context, export))
    if challenger["fingerprint"] == champion["fingerprint"]:
        raise JobFailed("the training did not help: the network that it released is the live model")
    path = path_of(challenger, context.data_dir)
    verdict = context.step("gate", lambda: _run_gate(context, Path(champion["path"]), path, frozen))
    if not verdict["passed"]:
        raise JobFailed(f"the gate refused the new model, and the live model stays: {'; '.join(verdict['reasons'])}")
    if params.approve:
        context.wait_for_approval("approve", f"make {path.name} live: {'; '.join(verdict['reasons']) or 'it passed'}")
    _check_champion(context, champion, challenger)
    arguments = ["models", "promote", str(path)]
    report = context.step("migrate", lambda: run_migration(context, params, arguments, [], SHARES["migrate"]))
    metrics = {"gate": verdict, "gate_held_out": frozen.get("held_out", False)}
    Generations(context.data_dir).set_metrics(report["generation"], metrics)
    context.report(1.0, f"generation {report['generation']} is live: {path.name}")


def plan_retraining(
    params: RetrainParams, settings: Settings, excluded: Path, tell: Callable[[str], object]
) -> tuple[dict[str, Any], list[str]]:
    """Find what a retraining would do, without changing the data folder.

    Args:
        params: the parameters, with resolved paths.
        settings: the settings.
        excluded: a file, to which the paths of the images are written that the training leaves out.
        tell: called with one line about each image that is left out, and about the choice.

    Returns:
        the model that it starts from, the images of the gate, the collections with their numbers of items, and how many
        items have no image that can be read, as JSON types. Also the arguments of `dinov2` that estimate the training.

    Raises:
        JobFailed: no model is live.
        ValueError, OSError: the images of the gate cannot be used.
    """
    data_dir = settings.data_dir.absolute()
    champion = _live(data_dir)
    images = _gate_images(params, data_dir, tell, write=False)
    write_text(excluded, "\n".join(images.excluded))
    collections, lost = asyncio.run(items_to_embed(settings))
    plan = {
        "champion": champion,
        "gate": {
            "folder": str(params.gate_data),
            "images": len(images.frozen.images),
            "held_out": images.held_out,
            "excluded": len(images.excluded),
        },
        "collections": collections,
        "lost": {name: len(ids) for name, ids in lost.items()},
    }
    training = params.training_from(champion["path"], excluded if images.excluded else None)
    return plan, train_command(training, data_dir / FOLDER / RUN, "--dry-run")


def _plan(context: Context[RetrainParams]) -> dict[str, Any]:
    """Return the plan of the retraining, with what its training would do and need."""
    context.report(0.0, "checking the images of the gate")
    plan, command = plan_retraining(context.params, context.settings, context.folder / EXCLUDED, context.log)
    context.report(0.5, "estimating the training", {"gate_images": plan["gate"]["images"]})
    return {**plan, "training": TOLD.findall(context.run_command(command))}


def _live(data_dir: Path) -> dict[str, Any]:
    live = Generations(data_dir).live() if Generations.exists(data_dir) else None
    if live is None:
        raise JobFailed("no model is live: start the service once, so that it records its model")
    path = artifact_of(live, data_dir).absolute()
    return {"generation": live.number, "fingerprint": live.fingerprint, "path": str(path)}


def _freeze(context: Context[RetrainParams]) -> dict[str, Any]:
    """Choose the images of the gate, or check those that were chosen before, so that the job does not fail after the
    training because one is missing. Write the list of images that the training leaves out."""
    context.report(0.0, "checking the images of the gate")
    images = _gate_images(context.params, context.data_dir, context.log)
    write_text(context.folder / EXCLUDED, "\n".join(images.excluded))
    frozen = images.frozen
    context.report(
        0.0, "the images of the gate are chosen", {"gate_images": len(frozen.images), "gate_held_out": images.held_out}
    )
    return {
        "images": len(frozen.images),
        "sha256": frozen.digest,
        "file": str(images.file.relative_to(context.data_dir)),
        "held_out": images.held_out,
        "excluded": len(images.excluded),
    }


def _gate_images(
    params: RetrainParams, data_dir: Path, tell: Callable[[str], object], *, write: bool = True
) -> GateImages:
    least = GateRules.read(params.gate_rules).min_queries
    return gate_images(data_dir, params.data, Path(str(params.gate_data)), least, tell, write=write)


def _list_of(context: Context[RetrainParams], frozen: dict[str, Any]) -> Path:
    """Return the list of the images that `_freeze` has chosen. Older versions have always used the default list."""
    if "file" in frozen:
        return context.data_dir / str(frozen["file"])
    return list_file(context.data_dir, Path(str(context.params.gate_data)))


def _check_images(context: Context[RetrainParams]) -> dict[str, int]:
    """Find the items that cannot be embedded again, so that the job does not fail after the training.

    Raises:
        JobFailed: there are such items, and `lost` is "refuse".
        Conflict: the store cannot re-embed collections.
    """
    _, lost = asyncio.run(items_to_embed(context.settings))
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


def _export(context: Context[RetrainParams], params: ExportParams) -> Any:
    context.report(SHARES["train"][1], "exporting the new model")
    return run_export(context, params)


def _check_champion(context: Context[RetrainParams], champion: dict[str, Any], challenger: dict[str, Any]) -> None:
    live = Generations(context.data_dir).live()
    if live is None or live.fingerprint not in (champion["fingerprint"], challenger["fingerprint"]):
        raise JobFailed(
            f"generation {live.number if live else 'none'} is live, but the new model was compared with generation "
            f"{champion['generation']}: retrain again"
        )


def _run_gate(
    context: Context[RetrainParams], champion: Path, challenger: Path, frozen: dict[str, Any]
) -> dict[str, Any]:
    """Compare the two models. Return whether the new one passed, the reasons, and the figures."""
    out = context.folder / VERDICT
    out.unlink(missing_ok=True)
    params = context.params
    rules = [f"--rule={name}={value}" for name, value in params.gate_rules.items()]
    context.report(0.75, "comparing the models")
    arguments = ["models", "compare", str(champion), str(challenger), f"--data={params.gate_data}", f"--out={out}"]
    arguments += [f"--set={_list_of(context, frozen)}", f"--data-dir={context.data_dir}"]
    try:
        context.run_command([*arguments, *rules])
    except ChildFailed as failed:
        if failed.status != REFUSED_STATUS:
            raise
    verdict = read_object(out)
    if "passed" not in verdict:
        raise JobFailed("the comparison of the models has written no verdict")
    return verdict
