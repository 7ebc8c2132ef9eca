"""Detect a failing run, report the failure, and decide whether the run continues, rolls back or stops.

The checks that do this are called sentinels. They detect three kinds of failure, each with its own configured action:

- collapse: the network no longer tells images apart. Several consecutive lines of metrics.jsonl show the same
  combination of signs (training/watch/collapse.py).
- not finite: a loss or a gradient is NaN or infinite. The batch is stored so that it can be inspected and repeated.
- measure: the measure of the features on held-out images (`training/watch/measure.py`) is below the run's best value
  by more than a configured margin. Continued training of published weights can lose accuracy
  (facebookresearch/dinov2#204: from 80 to 10 %).

The action is `stop`, `warn` (one report each time the failure begins) or `rollback`. A rollback loads the newest
checkpoint from step `Verdict.back_to` or earlier, and deletes later checkpoints. The sentinels forget what they
recorded for later steps (`forget_after`), but keep the rest of their state. Without a change, the run would fail again.
After "not finite", it therefore skips the failing step (`passes_over`), and the step's images are not used in this
epoch. After "collapse" or "measure", all later learning rates are multiplied by `lr_factor`. The run stops if a
rollback is needed after `max_rollbacks` rollbacks, or if no checkpoint is old enough.

Decisions depend only on the metrics in metrics.jsonl and evaluations.jsonl and on a state of plain JSON types, so a
resumed run makes the same decisions. Steps are counted from 1, as in metrics.jsonl.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoint import save_safetensors
from model.files import write_text
from training.spread import rankme as rankme
from training.spread import rankme_share as rankme_share
from training.watch.action import Action
from training.watch.collapse import CollapseLimits, CollapseState, check_collapse
from training.watch.measure import Measure

Kind = Literal["collapse", "not_finite", "measure"]
LEAST_RANKME = 0.9  # of its first value; a best checkpoint has at least this RankMe
NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Limits:
    """The thresholds of the sentinels (the checks for a failing run), and the action for each kind of failure.

    `measure_margin` is in percentage points. `n_measured` is the number of images from which the measure is computed,
    or 0 if nothing is measured.
    """

    n_prototypes: int
    on_collapse: Action = "stop"
    on_not_finite: Action = "rollback"
    on_measure: Action = "stop"
    patience: int = 5  # consecutive log lines with the same combination of signs of collapse
    min_rankme_share: float = 0.05
    measure_margin: float = 5.0
    rollback_lr_factor: float = 0.5
    max_rollbacks: int = 3
    patience_evaluations: int = 0  # evaluations without a new best value after which the run ends; 0: never
    n_measured: int = 0

    @property
    def collapse(self) -> CollapseLimits:
        """Return the limits of the signs of collapse."""
        return CollapseLimits(
            n_prototypes=self.n_prototypes,
            n_measured=self.n_measured,
            patience=self.patience,
            min_rankme_share=self.min_rankme_share,
        )


@dataclass(frozen=True)
class Verdict:
    """A failure that was found at step `step`, and the action to take. `message` explains the verdict to the user.

    `back_to` is the last step that showed no sign of this failure.
    """

    kind: Kind
    action: Action
    step: int
    back_to: int
    message: str


@dataclass
class State:
    """What the sentinels (the checks for a failing run) remember between steps, as JSON types."""

    bad_lines: dict[str, int] = field(default_factory=dict)  # combination of signs -> consecutive log lines with it
    start: dict[str, float] = field(default_factory=dict)  # figure of the features -> its first value
    highest: dict[str, float] = field(default_factory=dict)  # figure of the features -> its highest value
    good_step: int = 0  # step of the last log line without a combination of signs
    warned: bool = False  # whether the current collapse was reported
    measure: str = ""  # name of the measure to which the next fields belong
    first: float | None = None
    first_rankme: float | None = None
    latest: float | None = None  # value of retrieval or else of the measure, for the checks for collapse
    best: float | None = None
    best_step: int = 0
    since_best: int = 0  # evaluations since the measure last rose above its best value
    fallen: bool = False
    rollbacks: int = 0
    passed_over: list[int] = field(default_factory=list)
    lr_factor: float = 1.0


def difference_error(first: float, second: float, n: int) -> float:
    """Estimate the standard error of the difference between two shares of n images. Other values count as 0 or 1.

    One hit and one miss are added to each share (Agresti and Coull, 1998), so that shares of 0 and 1 have an error too.
    """
    shares = [(min(max(share, 0.0), 1.0) * n + 1) / (n + 2) for share in (first, second)]
    return math.sqrt(sum(share * (1 - share) / (n + 2) for share in shares))


class FirstNotFinite:
    """A record of the first step in which a loss or another metric is not finite. The record is stored on the device,
    so the CPU need not wait for the device in each step.

    `step` is an int64 scalar tensor. It is `NEVER` as long as all metrics are finite. If a run has several processes,
    the first such step of the run is the minimum of `step` over the processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._names: list[str] = []
        self._values: Tensor | None = None

    def note(self, step: int, figures: Mapping[str, Tensor]) -> None:
        """Check the metrics of one step, which are scalars such as losses and gradient norms. Every call must pass the
        same names."""
        values = torch.stack([value.detach().reshape(()).float() for value in figures.values()])
        first = ~values.isfinite().all() & (self.step == NEVER)
        self.step = torch.where(first, step, self.step)
        self._values = values if self._values is None else torch.where(first, values, self._values)
        self._names = list(figures)

    def read(self) -> tuple[int, dict[str, float]] | None:
        """Return the recorded step and its metrics, or None if all metrics were finite.

        This method waits for the device, so call it only when a log line is written.
        """
        step = int(self.step)
        if step == NEVER or self._values is None:
            return None
        return step, dict(zip(self._names, self._values.tolist(), strict=True))

    def clear(self) -> None:
        """Delete the record, so that the next step with a value that is not finite is recorded."""
        self.step, self._values = torch.full_like(self.step, NEVER), None


class Sentinels:
    """The checks for a failing run. They decide whether the run continues, warns, rolls back or stops.

    The training loop calls a check after each log line, after each evaluation, and when a metric is not finite. All
    processes of a run must act on the same verdict.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.state = limits, State()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sentinels as JSON types, so that it can be stored in a checkpoint."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state of the sentinels with a stored state. A rollback uses `forget_after` instead."""
        self.state = State(**json.loads(json.dumps(state)))  # a deep copy

    def forget_after(self, then: Mapping[str, Any], kind: Kind) -> None:
        """Forget what was recorded for the steps after a restored checkpoint, because the run repeats these steps.

        The number of rollbacks, the steps to skip and the learning rate factor are kept.

        Args:
            then: the `state_dict` that the restored checkpoint contains.
            kind: the kind of failure that caused the rollback. After "measure", the best value is kept too, because
                later values are compared with it.
        """
        old = State(**json.loads(json.dumps(then)))
        kept = ["bad_lines", "start", "highest", "good_step", "warned"]
        if kind != "measure":
            kept += ["measure", "first", "first_rankme", "best", "best_step", "since_best", "fallen", "latest"]
        self.state = replace(self.state, **{name: getattr(old, name) for name in kept})

    @property
    def lr_factor(self) -> float:
        """Return the factor by which the scheduled learning rates are multiplied."""
        return self.state.lr_factor

    def passes_over(self, step: int) -> bool:
        """Return whether the run skips step `step`, counted from 1. A skipped step does not train on its images and
        updates nothing."""
        return step in self.state.passed_over

    def may_go_back_to(self) -> list[int]:
        """Return the steps that a rollback may need. Their checkpoints must not be deleted, however old they are.

        A rollback because of a value that is not finite uses the newest checkpoint, which is never deleted.
        """
        limits, state = self.limits, self.state
        steps = [state.good_step] if limits.on_collapse == "rollback" else []
        return steps + ([state.best_step] if limits.on_measure == "rollback" and state.best is not None else [])

    def check_line(self, step: int, figures: Mapping[str, Any]) -> Verdict | None:
        """Check the metrics of one log line for signs of collapse. Return a verdict, or None if there is nothing to
        report.

        `training.watch.collapse.signs` lists the metrics. The latest value of the measure is added to them.
        """
        state, limits = self.state, self.limits
        memory = CollapseState(state.start, state.highest, state.bad_lines)
        found = check_collapse({"measure": state.latest, **figures}, limits.collapse, memory)
        state.start, state.highest, state.bad_lines = memory.start, memory.highest, memory.bad_lines
        if not state.bad_lines:
            state.good_step, state.warned = step, False
        if found is None or state.warned:
            return None
        state.warned = limits.on_collapse == "warn"
        begin = (
            f"step {step}: collapse: {found.words}. {found.n_lines} lines in a row show these signs: "
            f"{'; '.join(found.signs.values())}."
        )
        advice = f" {found.advice} on_collapse=warn lets such a run continue."
        return self._decide("collapse", limits.on_collapse, step, state.good_step, begin, advice)

    def check_finite(self, step: int, figures: Mapping[str, float], replay: Path | None) -> Verdict:
        """Return the verdict on a step with metrics that are not finite.

        Args:
            step: the step, counted from 1.
            figures: the metrics that `FirstNotFinite.read` returned.
            replay: the file in which the step's batch is stored, or None if the batch is not stored.
        """
        wrong = ", ".join(f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value))
        begin = f"step {step}: {wrong or 'a weight is not finite'}."
        if replay is not None:
            begin += f" The batch is stored in {replay}."
        advice = " A lower lr or clip_grad, a longer warmup or precision=fp32 may help; also look at the images."
        return self._decide("not_finite", self.limits.on_not_finite, step, step - 1, begin, advice)

    def check_measure(
        self,
        step: int,
        measure: Measure,
        value: float,
        n_images: int,
        rankme_share: float | None = None,
        retrieval: float | None = None,
    ) -> Verdict | None:
        """Compare a value of the run's measure (0 to 1) after `step` steps with the best value so far. Return a
        verdict, or None if there is nothing to report.

        The first call is made before training, with step 0. If the measure is another one than at the last call, the
        comparison begins again.

        A fall within the noise of `n_images` held-out images is not reported: besides the margin, a fall by twice the
        standard error of the difference of two shares is accepted.

        If RankMe of the measured features, `rankme_share`, is given and has fallen to less than `LEAST_RANKME` of its
        first value, the value is not the best one, however high it is: training can raise a measure on a run's own
        images and still harm the features (docs/decisions/0032-continue-on-small-sets.md).

        The checks for collapse use `retrieval` instead of the measure if it is given, because k-NN missed collapses
        that it found (docs/decisions/0034-signs-of-collapse.md).
        """
        state, limits = self.state, self.limits
        if state.measure != measure.name:
            state.measure, state.first, state.best = measure.name, value, None
            state.first_rankme = rankme_share
            state.highest.pop("measure", None)
        state.latest = value if retrieval is None else retrieval
        narrowed = rankme_share is not None and rankme_share < LEAST_RANKME * (state.first_rankme or 0.0)
        risen = not narrowed and (state.best is None or value > state.best)
        state.since_best = 0 if risen else state.since_best + 1
        if not narrowed and (state.best is None or value >= state.best):
            state.best, state.best_step, state.fallen = value, step, False
            return None
        assert state.best is not None  # the first features are not narrower than themselves
        noise = 2 * difference_error(state.best, value, n_images)
        fallen, state.fallen = state.fallen, state.best - value > limits.measure_margin / 100 + noise
        if not state.fallen or (fallen and limits.on_measure == "warn"):
            return None
        begin = (
            f"step {step}: {measure.words} is {value:.1%}, down from {state.best:.1%} at step {state.best_step}: "
            f"it lost more than {limits.measure_margin:g} points and the noise of {n_images} images."
        )
        advice = " A lower lr, a longer freeze_backbone or a smaller layer_decay preserve more of the initial weights."
        return self._decide("measure", limits.on_measure, step, state.best_step, begin, advice)

    @property
    def is_stale(self) -> bool:
        """Return whether the measure has had no new best value for so long that the run should end early."""
        return 0 < self.limits.patience_evaluations <= self.state.since_best

    def _decide(self, kind: Kind, action: Action, step: int, back_to: int, begin: str, advice: str) -> Verdict:
        """Return the verdict on a failure. If the action is a rollback, count it, and record the step to skip or the
        lower learning rate factor."""
        state, limits = self.state, self.limits
        verdict = Verdict(kind, action, step, back_to, begin + advice)
        if action == "warn":
            return verdict
        if action == "rollback" and state.rollbacks >= limits.max_rollbacks:
            after = f" The run stops after {state.rollbacks} rollbacks, the maximum (max_rollbacks)."
            return replace(verdict, action="stop", message=begin + after + advice)
        if action == "stop":
            return replace(verdict, message=begin + " The run stops; its checkpoints are kept." + advice)
        state.rollbacks += 1
        state.bad_lines, state.good_step, state.fallen = {}, min(state.good_step, back_to), False
        if kind == "not_finite":
            state.passed_over = sorted({*state.passed_over, step})
            after = f" The run goes back to step {back_to} or before, and skips step {step}"
        else:
            state.lr_factor *= limits.rollback_lr_factor
            after = f" The run goes back to step {back_to} or before, and continues with {state.lr_factor:g} of the lr"
        return replace(
            verdict, message=f"{begin}{after} (rollback {state.rollbacks} of {limits.max_rollbacks}).{advice}"
        )


@dataclass(frozen=True)
class Replay:
    """A batch that was stored because of a failure: the step, the names of the images, the crops keyed by name, and the
    metrics of the step (`terms`).
    """

    step: int
    names: list[str]
    crops: dict[str, Tensor]
    terms: dict[str, float]


def save_replay(
    folder: Path,
    step: int,
    names: Sequence[str],
    crops: Mapping[str, Tensor],
    terms: Mapping[str, float],
    *,
    facts: Mapping[str, Any] | None = None,
    keep: int = 3,
) -> Path:
    """Store a batch so that it can be inspected and repeated, and return the path of the file.

    The file `step_NNNNNNNN.safetensors` contains the crops. Its metadata contains `step`, `names`, `terms` and `facts`,
    which are also written to a JSON file with the same name for people to read.

    Args:
        folder: the folder to which the files are written. It is created if it is missing.
        step: the step of the batch, counted from 1.
        names: the names of the images, in the order of the batch.
        crops: the crops as tensors, keyed by name, such as the fields of `training.data.crops.Crops`.
        terms: the metrics of the step, which may be NaN.
        facts: further values of JSON types, such as indices, the seed and learning rates.
        keep: the number of batches to keep in the folder. Batches of earlier steps are deleted.

    Raises:
        OSError: a file cannot be written.
    """
    assert keep >= 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.safetensors"
    record = {
        **(facts or {}),
        "step": step,
        "names": list(names),
        "terms": {name: str(float(value)) for name, value in terms.items()},  # JSON has no NaN
    }
    save_safetensors(path, crops, {"replay": json.dumps(record)})
    write_text(path.with_suffix(".json"), json.dumps(record, indent=1))  # a readable copy of the record above
    for old in sorted(folder.glob("step_*.safetensors"))[:-keep]:
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()
    return path


def load_replay(path: Path) -> Replay:
    """Load a batch that `save_replay` stored, with tensors on the CPU.

    Raises:
        ValueError: the file was not written by `save_replay`.
        FileNotFoundError: the file does not exist.
    """
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["replay"])
            crops = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise
    except Exception as error:  # errors of safetensors, missing entries or invalid JSON
        raise ValueError(f"{path} is not a batch stored by a training run: {error}") from error
    return Replay(record["step"], record["names"], crops, {k: float(v) for k, v in record["terms"].items()})
