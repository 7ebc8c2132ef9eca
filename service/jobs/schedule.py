"""When a schedule is due: `sunday 03:00`, `daily 02:30` or `6 h`, in a time zone.

A time of day that does not exist, because the clocks are put forward, is moved forward by the same amount: 02:30
becomes 03:30. If the clocks are put back and a time of day comes twice, the first one counts.
"""

import math
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
UNITS: Final = {"min": 60, "h": 3600, "d": 86400}
SHORTEST_S: Final = 60
LONGEST_S: Final = 366 * 86400
ALLOWED: Final = (
    "write a weekday and a time of day (sunday 03:00), daily and a time of day (daily 02:30), or a number with min, h "
    "or d (6 h), from 1 min to 366 d"
)


@dataclass(frozen=True)
class Rule:
    """A parsed schedule. It is either an interval of `interval_s` seconds, or a time of day on one weekday (0: Monday)
    or on every day (None)."""

    interval_s: int | None = None
    weekday: int | None = None
    at: time = time(0, 0)


def parse_every(text: str) -> Rule:
    """Parse the text of a schedule, in any case.

    Raises:
        ValueError: the text is not a schedule. The message says what is allowed.
    """
    words = text.strip().lower()
    if match := re.fullmatch(r"(\d{1,6})\s*(min|h|d)", words):
        interval = int(match[1]) * UNITS[match[2]]
        if SHORTEST_S <= interval <= LONGEST_S:
            return Rule(interval_s=interval)
    elif match := re.fullmatch(rf"(daily|{'|'.join(DAYS)})\s+([01]\d|2[0-3]):([0-5]\d)", words):
        weekday = None if match[1] == "daily" else DAYS.index(match[1])
        return Rule(weekday=weekday, at=time(int(match[2]), int(match[3])))
    raise ValueError(f"every={text[:80]!r} is not a schedule: {ALLOWED}")


def parse_zone(name: str) -> tzinfo:
    """Return the time zone with this name of the IANA database, for example `Europe/Berlin`.

    Raises:
        ValueError: the zone is unknown.
    """
    if name == "UTC":
        return UTC  # without the database, which a small system may lack
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"time zone {name[:80]!r} is unknown: use UTC or a name of the IANA database, such as Europe/Berlin"
        ) from error


def next_time(rule: Rule, zone: tzinfo, after: float, anchor: float | None = None) -> float:
    """Return the first time after `after` at which the schedule is due. Times are seconds since 1970.

    Args:
        rule: the schedule.
        zone: the time zone of its time of day.
        after: the time now.
        anchor: for an interval, a time at which the schedule was due. Due times are whole intervals apart from it, so
            that they do not drift. If it is None, the interval begins at `after`.
    """
    if rule.interval_s is not None:
        anchor = after if anchor is None else anchor
        return anchor + (math.floor((after - anchor) / rule.interval_s) + 1) * rule.interval_s
    today = datetime.fromtimestamp(after, zone).date()
    for days in range(-1, 9):
        day = today + timedelta(days=days)
        if rule.weekday in (None, day.weekday()) and (due := _moment(day, rule.at, zone)) > after:
            return due
    raise AssertionError(f"{rule} is never due")


def _moment(day: date, at: time, zone: tzinfo) -> float:
    """Return the moment of a local time of day, in seconds since 1970. `fold=0`, the default, means the first of two
    equal times, and moves a time that does not exist forward."""
    return datetime.combine(day, at, zone).timestamp()
