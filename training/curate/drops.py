"""A decision to leave out an image, with its reason. Every stage of curation returns its decisions in this form."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Drop:
    """An image that a stage leaves out.

    `index` is the number of the image in the table that the stage was called with, and `stage` the name of the stage.
    `reason` is a text for the user. It names the evaluation image if the image is a leak. `because` is the number of
    the image that is kept instead, if the image is a copy of it.
    """

    index: int
    stage: str
    reason: str
    because: int | None = None
