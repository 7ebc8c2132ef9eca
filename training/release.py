"""Finish a run: write its last checkpoint, choose and finish the checkpoint to release, and say what training achieved.

All ranks call `release`. Only rank 0 calls the other functions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint import load_checkpoint
from model.files import write_text
from model.vit import DinoVisionTransformer
from training.distributed import wait_for_all
from training.measuring import evaluate_backbone, whiten_backbone
from training.outcome import BEST, CHECKPOINT, released_backbone, write_checkpoint, write_sheet
from training.run import Run, sheet_path
from training.state import KEPT_BEST
from training.watch.monitor import EVALUATIONS, read_lines
from training.watch.sentinels import difference_error

SHOWN_K = 10  # neighbours, or fewer if there are fewer images


def release(run: Run, step: int) -> Path:
    """Finish a run that ended after `step` steps: write its checkpoints, its k-NN accuracy and an image sheet.

    The checkpoint with the best measure is released. If the run has no measure, the last checkpoint is released. If the
    setting `whiten` is not None, both are whitened first. Return the path of the released checkpoint.
    """
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    path = run.out / CHECKPOINT if run.measure is None else run.out / BEST
    if run.world.is_main:
        last = finish(run, backbone, step)
        write_checkpoint(run.out / CHECKPOINT, backbone, run.release.vit, {**run.release.facts, **last})
        results = last if run.measure is None else finish_best(run)
        write_text(run.out / "knn.json", json.dumps(results["knn"], indent=1))
        write_sheet(sheet_path(run, step), backbone, run.data, run.crops, run.release, step, run.total)
        for line in summary(run, results):
            run.monitor.tell(line)
    wait_for_all(run.world)
    return path


def finish_best(run: Run) -> dict[str, Any]:
    """Finish the best checkpoint, write it, and return its metadata with the results (see `finish`)."""
    weights, vit, facts = load_checkpoint(run.out / KEPT_BEST)
    backbone = DinoVisionTransformer(vit)
    backbone.load_state_dict(weights)
    backbone.to(run.world.device).eval().requires_grad_(False)
    results = {**run.release.facts, "measure": facts["measure"], **finish(run, backbone, facts["steps"])}
    write_checkpoint(run.out / BEST, backbone, vit, results)
    return results


def finish(run: Run, backbone: DinoVisionTransformer, step: int) -> dict[str, Any]:
    """Whiten a backbone if the run asks for it, and return its results as metadata for its checkpoint.

    They are the k-NN accuracy, whether the backbone is whitened, and the number of steps.
    """
    data, settings = run.data, run.release
    whiten_backbone(backbone, data, settings.eval_spec, settings.whiten)
    found = run.evaluations.get(step)
    if found is None:
        found = evaluate_backbone(backbone, data, settings.eval_spec, run.measure)
    return {"knn": found.knn, "whitened": settings.whiten is not None, "steps": step}


def summary(run: Run, results: Mapping[str, Any]) -> list[str]:
    """Return the last lines of a run: which checkpoint is released, how good it is, and whether training helped."""
    state, lines = run.sentinels.state, []
    if run.measure is not None and state.best is not None and state.first is not None:
        lines.append(f"{run.measure.words}: {state.first:.1%} at the start, {state.best:.1%} released")
        if state.best <= state.first and not state.best_step:
            lines.append("training did not help: the released checkpoint is the network that the run started from")
        elif state.best <= state.first:
            lines.append(
                f"training did not help: the checkpoint after step {state.best_step}, which is released, is as good as "
                "the network that the run started from"
            )
        else:
            lines.append(f"released: the checkpoint after step {state.best_step}, which has the best value")
    if (knn := results["knn"]) and (compared := knn_compared(run, knn)):
        lines.insert(-1 if lines else 0, compared)
    return lines


def knn_compared(run: Run, knn: Mapping[str, Mapping[int, float]]) -> str:
    """Return a line with the k-NN accuracy of the released checkpoint and, if it is known, that of the start."""
    n = len(run.data.labelled_held_out)
    k = max(k for k in map(int, knn["cls"]) if k <= SHOWN_K)
    by_k = {int(key): share for key, share in knn["cls"].items()}
    released = by_k[k]
    line = f"{k}-NN on {n:,} held-out images: "
    start = next((x for x in read_lines(run.out / EVALUATIONS) if x.get("step") == 0), {}).get(f"knn_cls_{k}")
    if start is None:
        return line + f"{released:.1%}"
    error = difference_error(start, released, n)
    return line + (
        f"{start:.1%} at the start, {released:.1%} released ({100 * (released - start):+.1f} points; "
        f"standard error {100 * error:.1f})"
    )
