"""The settings of a training run that takes seconds, for tests of the training loop."""

import torch
from rich.console import Console

from benchmarks.tiny_training import TINY
from training.distributed import World

__all__ = ["ALONE", "QUIET", "TINY"]

ALONE = World(0, 1, torch.device("cpu"))
QUIET = Console(quiet=True)
