"""What happens when, second by second, after the last good renewal of a host: made from the engine's own numbers.

Times are those of the host itself up to L, and of another host after that; what lies between is the margin.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.engine.timing import WATCHDOG, Timing
from lockfs_paxos_lease.lockspace import FENCE_LEAD, FENCE_LEAD_SHARE

SANLOCK_GRACE = 40
"""Seconds from L on in which a sanlock daemon asks before it kills (its option -g)."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happens *at* so many seconds after the last good renewal was begun."""

    at: float
    what: str


def moments(timing: Timing) -> list[Moment]:
    """Return what happens to what a host holds that cannot renew its lease any more, and for those who wait for it."""
    lead = min(FENCE_LEAD, timing.fence / FENCE_LEAD_SHARE)
    dead = timing.dead_after(timing.stored)
    found = [
        Moment(0.0, "the host begins the renewal that is to be its last good one"),
        Moment(timing.renewal, "the next renewal is due, and fails: a warning is logged"),
        Moment(timing.fence - lead, "lockd tells all that the host holds lost, and fences it"),
        Moment(timing.fence, "L: nobody on this host can write any more"),
        Moment(dead, "another host that saw that renewal at once takes over, at the earliest"),
        Moment(latest(timing), "another host that saw it only with its next look has taken over, but for its I/O"),
    ]
    if timing.is_sanlock:
        found += [
            Moment(timing.fence, "a sanlock daemon in its place has its killpath programs run, or sends SIGTERM"),
            Moment(timing.fence + SANLOCK_GRACE, "a sanlock daemon sends SIGKILL to who still has leases"),
            Moment(timing.fence + WATCHDOG - 1, "the watchdog, where sanlock uses it, has reset the host"),
        ]
    return sorted(found, key=lambda moment: moment.at)


def latest(timing: Timing) -> float:
    """Return when a lease can be had at the latest, in seconds after the last good renewal, but for the time of I/O.

    The renewal is seen one renewal interval later at most, and the owner is looked at every `poll` seconds.
    """
    return timing.renewal + timing.dead_after(timing.stored) + timing.poll


def text(timing: Timing) -> str:
    """Return a timetable for people."""
    return "".join(f"{moment.at:8.2f} s  {moment.what}\n" for moment in moments(timing))


def markdown(timing: Timing) -> str:
    """Return a timetable as a Markdown table."""
    rows = ["| seconds | what happens |", "|---:|---|"]
    rows += [f"| {moment.at:g} | {moment.what} |" for moment in moments(timing)]
    return "\n".join(rows) + "\n"


def summary(timings: dict[str, Timing]) -> str:
    """Return the bounds of several timings as a Markdown table."""
    rows = [
        "| option | renewal every | L: fenced | margin | taken over, at the earliest | at the latest | I/O time-out |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, timing in timings.items():
        dead = timing.dead_after(timing.stored)
        numbers = (timing.renewal, timing.fence, timing.margin, dead, latest(timing), timing.io_timeout)
        rows.append(f"| `{name}` | " + " | ".join(f"{number:g} s" for number in numbers) + " |")
    return "\n".join(rows) + "\n"


def document() -> str:
    """Return the tables of the page about timing."""
    own, sanlock = Timing.own(), Timing.sanlock()
    options = {f"takeover={seconds:g}": Timing.own(seconds) for seconds in (4, 10, 16, 30, 60)}
    options |= {
        "takeover=sanlock": sanlock,
        "takeover=sanlock,io_timeout=1": Timing.sanlock(1),
    }
    return "\n".join((
        "With `takeover=16`, the default:\n", markdown(own),
        "With `takeover=sanlock`, and `io_timeout=10`, the default:\n", markdown(sanlock),
        "With other values:\n", summary(options),
    ))  # fmt: skip
