"""The page about timing says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
from lockfs_paxos_lease.cli import timetable
from lockfs_paxos_lease.engine.timing import Timing

PAGE = Path(__file__).parents[2] / "docs" / "timing.md"


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    text = PAGE.read_text()
    begin = text.index("\n", text.index("<!-- tables: made by")) + 1
    assert text[begin : text.index("<!-- end of tables -->")] == timetable.document()


@pytest.mark.parametrize("seconds", [2, 4, 10, 16, 60, 600])
def test_the_moments_come_in_the_order_that_makes_it_safe(seconds: float) -> None:
    timing = Timing.own(seconds)
    renewal, told, fenced, first, last = (moment.at for moment in timetable.moments(timing)[1:])
    assert 0 < renewal < told < fenced < first < last < seconds
    # A renewal that times out can be tried again before L.
    assert renewal + 2 * timing.io_timeout <= fenced
    assert first - fenced == timing.margin == fenced / 2


@pytest.mark.parametrize("io_timeout", [1, 10, 30])
def test_with_sanlocks_timing(io_timeout: int) -> None:
    timing = Timing.sanlock(io_timeout)
    at = [moment.at for moment in timetable.moments(timing)]
    assert at == sorted(at)
    first = next(moment.at for moment in timetable.moments(timing) if "earliest" in moment.what)
    assert first == 8 * io_timeout + 60
    reset = next(moment.at for moment in timetable.moments(timing) if "watchdog" in moment.what)
    assert timing.fence < reset < first


def test_what_the_page_says_besides() -> None:
    text = " ".join(PAGE.read_text().split())
    own = Timing.own()
    assert f"with 16, {16 - timetable.latest(own):g} s" in text
    assert own.io_timeout == 2
    assert own.dead_after(own.stored) / own.fence == 1.5
    assert Timing.sanlock().margin == 60
