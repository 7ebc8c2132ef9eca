"""The lines that a console has shown."""

import re

from rich.console import Console


def told(console: Console) -> list[str]:
    """Return the lines that a console has written to its file, without the time of day with which each begins."""
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines), lines
    return [line[10:] for line in lines]
