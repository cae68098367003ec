"""Many processes on two hosts hammer a few images: never two of them hold one, and nobody is refused without a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.host import Host
from harness.waiting import wait_until

SECONDS = {
    backend: float(os.environ.get("LOCKFS_HAMMER_SECONDS", default))
    for backend, default in (("fcntl-lockd", "30"), ("paxos-lease", "10"))
}
"""For how long; a lock of leases is hammered without mounts, too, by the simulator."""
GRACE = {"fcntl-lockd": 0.1, "paxos-lease": 5.0}
"""Seconds within which a lock is free for others that was let go of; to give a lease back takes some I/O."""
PROCESSES = 64
IMAGES = 8
WAIT = 0.2
"""Seconds that an open waits for the holder; short, so that many are refused."""
PROGRAM = Path(__file__).with_name("hammering.py")


@dataclass(frozen=True)
class Event:
    """One line of the log.  A hold lasts from `begin` to `end`; a refused open was asked for from `begin` to `end`."""

    what: str
    who: int
    image: str
    begin: float
    end: float
    asked: float = 0.0
    detail: str = ""


def overlaps(events: Iterable[Event]) -> list[tuple[Event, Event]]:
    """Return the pairs of holds of one image that overlap in time, each with the hold before it that lasts longest."""
    found = []
    latest: dict[str, Event] = {}
    for event in sorted((each for each in events if each.what == "held"), key=lambda each: each.begin):
        before = latest.get(event.image)
        if before and event.begin < before.end:
            found.append((before, event))
        if before is None or event.end > before.end:
            latest[event.image] = event
    return found


def unjustified(events: Iterable[Event], grace: float = 0.0) -> list[Event]:
    """Return the refusals of an image that nobody else held or was just getting or leaving while it was asked for.

    A lock is held for longer than its holder can know: from some time after it asked until, at most *grace*
    seconds after it began to close, the close has reached the lock table.
    """
    events = list(events)
    holds: dict[str, list[Event]] = {}
    for event in events:
        if event.what == "held":
            holds.setdefault(event.image, []).append(event)
    return [
        refusal
        for refusal in events
        if refusal.what == "refused"
        and not any(
            hold.who != refusal.who and hold.asked <= refusal.end and hold.end + grace >= refusal.begin
            for hold in holds.get(refusal.image, ())
        )
    ]


def held(who: int, begin: float, end: float, image: str = "a") -> Event:
    return Event("held", who, image, begin, end, begin)


def test_the_check_finds_overlaps() -> None:
    assert overlaps([held(1, 0, 2), held(2, 2, 3), held(1, 3, 4), held(3, 0, 9, "b")]) == []
    assert overlaps([held(1, 0, 2), held(2, 1, 3)]) == [(held(1, 0, 2), held(2, 1, 3))]
    assert len(overlaps([held(1, 0, 9), held(2, 1, 2), held(3, 8, 10)])) == 2


def test_the_check_finds_refusals_without_a_reason() -> None:
    refusal = Event("refused", 9, "a", 5, 6)
    assert unjustified([refusal, held(1, 5.5, 7)]) == []
    assert unjustified([refusal, held(1, 0, 5.2)]) == []
    assert unjustified([refusal, held(1, 0, 4.9)]) == [refusal]
    assert unjustified([refusal, held(1, 6.1, 9)]) == [refusal]
    assert unjustified([refusal, held(9, 0, 9)]) == [refusal]
    assert unjustified([refusal, held(1, 0, 9, "b")]) == [refusal]


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [pytest.param(each, marks=pytest.mark.timeout(seconds * 2 + 120)) for each, seconds in SECONDS.items()]
)
def test_no_two_hold_one_image(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, backend: str, expect_log: Callable[..., None]
) -> None:
    seconds = SECONDS[backend]
    expect_log("is slow|could not be renewed", optional=True)
    for number in range(IMAGES):
        (storage / f"image-{number}").write_bytes(bytes(1 << 16))
    mounts = [each.mount(storage, tmp_path / each.name, f"backend={backend},wait={WAIT}") for each in (host, host_b)]
    log = tmp_path / "events"
    processes = [
        subprocess.Popen(
            [
                sys.executable, PROGRAM, str(number), log, str(seconds),
                *(mounts[number % 2] / f"image-{image}" for image in range(IMAGES)),
            ]
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    for process in processes:
        assert process.wait(seconds + 60) == 0
    events = [Event(**json.loads(line)) for line in log.read_text().splitlines()]
    holds = [event for event in events if event.what == "held"]
    print(f"{len(holds)} holds, {sum(event.what == 'refused' for event in events)} refusals in {seconds:g} s")
    assert [event for event in events if event.what == "failed"] == []
    assert [event for event in holds if event.detail] == []
    assert overlaps(events) == []
    assert unjustified(events, GRACE[backend]) == []
    # Or the hammer has hit nothing.
    assert {(event.who % 2, event.image) for event in holds} == {(side, f"image-{n}") for side in (0, 1) for n in range(IMAGES)}
    assert {event.who for event in holds} == set(range(PROCESSES))
    for each in (host, host_b):
        wait_until(lambda each=each: not each.locks(), 5, f"{each.name} to hold nothing")
