"""Jobs of the kind `curate`: run `dinov2 curate` as a child process. The dataset is `dataset` in the job's folder.

The settings of a curation are not known here. `dinov2 curate --check` checks them when a job is created. A job that is
started again goes on where its command ended.
"""

import json
import logging
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import Field

from service.jobs.context import CODE, Context, JobFailed
from service.jobs.kind import JobParams
from service.jobs.roots import data_source, model_source
from service.jobs.train import CHECK_S, REFUSED_STATUS
from service.schema_base import ONE_OR_MORE
from service.settings import Settings

log = logging.getLogger(__name__)

DATASET: Final = "dataset"
MODELS: Final = frozenset({"scan.model"})
"""Settings of a curation that name a model."""
DATA: Final = frozenset(
    {
        *("examples.good", "examples.bad", "leaks.evaluation", "retrieve.seeds"),
        *("sensitive.examples", "sensitive.harmless"),
    }
)
"""Settings of a curation that name images."""
PROGRESS: Final = re.compile(r"^(\w[\w ]*): ([\d,]+) of ([\d,]+)(?:, (\S+) left)?$", re.MULTILINE)
"""A line that tells how far a stage is (training/curate/progress.py)."""
WRITTEN: Final = re.compile(r"^dataset: .*, digest ([0-9a-f]{64})$", re.MULTILINE)

Override = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]*=", max_length=10_000)]


class CurateParams(JobParams):
    """What `POST /v1/jobs` accepts for a curation."""

    data: Annotated[list[str], ONE_OR_MORE] = Field(
        min_length=1,
        max_length=100,
        description="folders of images, tar files or datasets, below DINOV2_JOB_ROOTS (unset: data/datasets)",
    )
    settings: Annotated[list[Override], ONE_OR_MORE] = Field(
        default=[], max_length=200, description="settings of the curation, as section.key=value"
    )
    workers: int | None = Field(None, ge=1, le=1024, description="number of processes; unset: one per CPU")

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. See `JobParams.resolved`."""
        return self.model_copy(
            update={
                "data": [data_source(text, settings) for text in self.data],
                "settings": [_resolved(override, settings) for override in self.settings],
            }
        )


def _resolved(override: str, settings: Settings) -> str:
    """Return an override in which the names of images and models are absolute.

    Raises:
        ValueError: a name is not allowed, or the value is a table, which could contain names too.
    """
    key, _, text = override.partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if isinstance(value, dict):
        raise ValueError(f"{override[:200]!r}: give each setting by itself, as section.key=value")
    if key not in MODELS | DATA:
        return override
    resolve = model_source if key in MODELS else data_source
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{override[:200]!r} must name a path or several paths")
    paths = [resolve(name, settings) for name in names]
    return f"{key}={json.dumps(paths if isinstance(value, list) else paths[0], ensure_ascii=False)}"


def check_curation(params: CurateParams, settings: Settings) -> None:
    """Check the settings of a curation before its job is accepted, in a child process that needs no torch.

    The images are not looked at. If the child cannot decide, the job is accepted, and its worker decides. `params` has
    resolved paths. `settings` is not needed here.

    Raises:
        ValueError: a setting does not exist, or a value is not allowed. The message names it.
    """
    if find_spec("training") is None:
        return
    command = [sys.executable, "-m", "cli", *_command(params, Path(DATASET)), "--check", "--", *params.data]
    try:
        done = subprocess.run(  # noqa: S603 - the arguments are checked, and the sources follow "--"
            command, cwd=CODE, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the settings of a curation were not checked: %s", error)
        return
    errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("error: ")]
    if done.returncode == REFUSED_STATUS and errors:
        raise ValueError(errors[-1].removeprefix("error: "))


def _command(params: CurateParams, out: Path) -> list[str]:
    options = [f"--set={override}" for override in params.settings]
    if params.workers is not None:
        options.append(f"--workers={params.workers}")
    return ["curate", f"--out={out}", *options]


def curate(context: Context[CurateParams]) -> None:
    """Do the work of a job."""
    context.step("curate", lambda: _curate(context))


def _curate(context: Context[CurateParams]) -> Any:
    out = context.folder / DATASET

    def watch() -> None:
        share, text = progress_of(context.recent_output)
        if text:
            context.report(share, text)

    output = context.run_command([*_command(context.params, out), "--", *context.params.data], watch)
    written = WRITTEN.search(output)
    if written is None:
        raise JobFailed("`dinov2 curate` has not printed the digest of the dataset")
    return {"dataset": str(out.relative_to(context.data_dir)), "digest": written[1]}


def progress_of(output: str) -> tuple[float, str]:
    """Return the share of the current stage that is done, and a text such as `scan of images: 128 of 2,640`.

    If the output has no such line, the text is empty.
    """
    lines = list(PROGRESS.finditer(output))
    if not lines:
        return 0.0, ""
    done, total = (int(lines[-1][group].replace(",", "")) for group in (2, 3))
    return min(done / max(total, 1), 1.0), lines[-1][0]
