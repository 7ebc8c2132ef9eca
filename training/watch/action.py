"""What a run does when a check finds that it is failing. This module does not import torch."""

from typing import Literal

Action = Literal["stop", "rollback", "warn"]
"""`stop` ends the run, `rollback` returns to the last good state, and `warn` reports the failure once."""
