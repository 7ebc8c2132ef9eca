"""The table of all vision tasks. A task's module is imported when the task is first used, so that the command line
starts fast."""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from service.vision.task import Task

SUMMARIES: Final = {
    "attention": "Show where the class token attends",
    "features": "Return patch features or show them as colours",
    "segment": "Segment an image",
    "detect": "Find objects without labels",
    "match": "Find the parts of two images that correspond",
    "depth": "Estimate the depth of each pixel",
    "words": "Say which words describe an image, and where",
    "analyze": "Compute several results from one forward pass",
}
"""The summary of each task, by name. The module `service/vision/<name>.py` defines the task as `TASK`."""


@cache
def task(name: str) -> "Task[Any, Any]":
    """Return the task with this name, which must be in `SUMMARIES`."""
    found: Task[Any, Any] = import_module(f"service.vision.{name}").TASK
    assert (found.name, found.summary) == (name, SUMMARIES[name])
    return found
