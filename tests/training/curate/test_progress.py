"""Tests of how the progress of a curation is shown."""

import io
import re
import time

from rich.console import Console

from training.curate.progress import in_bars, in_lines


def test_short_work_is_not_told() -> None:
    told: list[str] = []
    track = in_lines(told.append, every_s=3600)
    for _ in range(50):
        with track("comparing pairs for copies", 64) as advance:
            advance(64)
    assert told == []


def test_many_blocks_give_a_line_now_and_then_and_add_up() -> None:
    told: list[tuple[float, str]] = []
    track = in_lines(lambda line: told.append((time.monotonic(), line)), every_s=0.2)
    begin = time.monotonic()
    for _ in range(40):
        with track("comparing pairs for copies", 10) as advance:
            advance(4)
            time.sleep(0.02)
            advance(6)
    seconds = time.monotonic() - begin
    assert 1 <= len(told) <= seconds / 0.2
    times = [at for at, _ in told]
    assert all(after - before > 0.19 for before, after in zip([begin, *times], times, strict=False))
    for _, line in told:
        match = re.fullmatch(r"comparing pairs for copies: (\d+) of (\d+)(, 0:\d\d:\d\d left)?", line)
        assert match is not None, line
        done, total = int(match[1]), int(match[2])
        assert total - 10 <= done <= total
        assert (match[3] is not None) == (done > 0)
    assert total > 10


def test_a_line_comes_even_if_nothing_moves() -> None:
    told: list[str] = []
    with in_lines(told.append, every_s=0.05)("scan of images", 2_000):
        time.sleep(0.3)
    assert told
    assert set(told) == {"scan of images: 0 of 2,000"}


def test_a_terminal_shows_one_bar_that_disappears() -> None:
    screen = io.StringIO()
    track = in_bars(Console(file=screen, force_terminal=True, width=100, color_system=None))
    for _ in range(3):
        with track("comparing pairs for copies", 10) as advance:
            advance(5)
    shown = screen.getvalue()
    assert "━" in shown
    assert re.search(r"comparing pairs for copies .* 15/30 0:\d\d:\d\d left", shown), shown
    assert shown.endswith("\x1b[1A\x1b[2K")
