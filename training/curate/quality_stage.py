"""The stage `quality`: drop images with issues such as blur or darkness."""

from typing import Final

import numpy as np

from training.curate.drops import Drop
from training.curate.quality import Limits, find_issues
from training.curate.stages import Result, Stage, Task


def _run(task: Task) -> Result:
    section = task.settings.quality
    issues = find_issues(task.images, Limits(**section.model_dump(exclude={"drop"})))
    dropped = np.zeros(len(task.images), bool)
    reasons = [list[str]() for _ in range(len(task.images))]
    for name in section.drop:
        dropped |= issues[name]
        for index in np.flatnonzero(issues[name]).tolist():
            reasons[index].append(name.replace("_", " "))
    drops = [Drop(index, QUALITY.name, ", ".join(reasons[index])) for index in np.flatnonzero(dropped).tolist()]
    return Result(drops, {"issues": {name: int(flags.sum()) for name, flags in issues.items()}})


QUALITY: Final = Stage("quality", "1", _run)
