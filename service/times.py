"""Write times in the form that answers and the output of commands have."""

from datetime import UTC, datetime
from typing import Final

LAST_SECOND: Final = 253_402_300_799
"""The last second of the year 9999, in seconds since 1970."""


def iso_time(seconds: float) -> str:
    """Return a time in seconds since 1970 in ISO 8601 format, in UTC and with milliseconds."""
    return (
        datetime.fromtimestamp(min(seconds, LAST_SECOND), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
