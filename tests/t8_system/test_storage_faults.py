"""One host's path to the storage stalls, fails, tears or is slow: it fences before another host has its images.

Host A has real mounts, each over a path of its own that is made faulty; host B is the backend, with a good path to the
same directories.  A's writers never stop.  When B has got an image it writes all of it; then A's path is good again.
All is done at once, since all that takes time is to wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from harness import processes
from harness.faulty import Faulty
from harness.host import Host
from harness.watchdog import StandIn
from lockfs_paxos_lease.driver import boottime
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.leader import Leader
from t3_backends.stations import station
from t8_system.old_writer import BLOCK, BLOCKS, MARK

from lockfs.backend import Busy

TAKEOVER = 12.0
TIMING = Timing.own(TAKEOVER)
GIVES_UP = 1.8
"""Seconds after which a path gives up what stalls, and what a slow one takes: longer than a call may take, and less than
the margin between L and a takeover, as it has to be."""
NOISE = TIMING.margin / 2
"""What a busy machine may add to the time until a program sees the fence: it is not made later by that."""
LATER = 60.0
SIZE = BLOCK * BLOCKS
NEW = b"B"
PROGRAM = Path(__file__).with_name("old_writer.py")


@dataclass
class Case:
    """One share, one fault, one writer.  `stays`: what B wrote stays; otherwise what A had in memory comes later."""

    fault: str
    data: str = "passthrough"
    writes: str = "direct"
    watchdog: bool = False
    stays: bool = True
    storage: Path = Path()
    image_of_a: Path = Path()
    path: Faulty = field(init=False)
    writer: subprocess.Popen[str] = field(init=False)
    fenced: float = 0.0
    taken: float = 0.0
    renewed: float = 0.0
    """The last renewal of A that B could have seen."""

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.fault} {self.data} {self.writes}" + (" watchdog" if self.watchdog else "")

    @property
    def image(self) -> Path:
        """The image on the storage."""
        return self.storage / "img"


def cases() -> list[Case]:
    return [
        Case(f"stall {GIVES_UP}"),
        Case(f"stall {GIVES_UP}", data="gated"),
        Case("fail"),
        Case("tear"),
        Case(f"delay {GIVES_UP}"),
        # Dirty pages are out of the reach of a fence, as docs/guarantees.md says: here it shows that this is so ...
        Case("stall", writes="buffered", stays=False),
        # ... and that a watchdog helps.
        Case("stall", writes="buffered", watchdog=True),
    ]


@pytest.fixture
def made(tmp_path: Path, leaves_nothing: None) -> Iterator[list[Case]]:
    """The cases, with their paths, and their writers later."""
    all_cases = cases()
    for case in all_cases:
        case.storage = tmp_path / case.name.replace(" ", "-")
        case.storage.mkdir()
        case.image.write_bytes(bytes(SIZE))
        case.path = Faulty(case.storage, tmp_path / f"path-{case.storage.name}")
    yield all_cases
    for case in all_cases:
        case.path.close()


@pytest.fixture
def stand_in(tmp_path: Path, made: list[Case]) -> Iterator[tuple[StandIn, dict[str, Callable[[], None]]]]:
    """A watchdog, and what it does to the host when it is not fed."""
    resets: dict[str, Callable[[], None]] = {}
    device = StandIn(tmp_path, lambda: [each() for each in resets.values()] and None)
    yield device, resets
    device.close()


@pytest.mark.timeout(240)
async def test_who_cannot_reach_the_storage_is_fenced_before_others_have_what_it_held(
    made: list[Case], stand_in: tuple[StandIn, dict[str, Callable[[], None]]], make_host: Callable[..., Host],
    tmp_path: Path, expect_log: Callable[..., None],
) -> None:  # fmt: skip
    for pattern in ("could not be renewed", "is to be fenced", "lost the lock o[nf]", "fenced .*: its handles fail"):
        expect_log(pattern)
    expect_log("is slow|cannot join|has not answered|not be given back|could not give back|lockd is gone|unlock|cannot "
               "note|cannot look|still joining|lockd stops while|lockd is not running|daemon of .* does not|was killed|looking|storage of|may not be on the storage", optional=True)  # fmt: skip
    device, resets = stand_in
    watched = make_host("host-w", **device.variables)
    host = make_host("host-a")
    try:
        for case in made:
            on, more = (watched, f",watchdog={device.path}") if case.watchdog else (host, "")
            mount = on.mount(
                case.path.path, tmp_path / f"mnt-{case.storage.name}", f"backend=paxos-lease,takeover={TAKEOVER:g},data={case.data}{more}"
            )
            case.image_of_a = mount / "img"
        for case in made:
            command = [sys.executable, PROGRAM, case.image_of_a, case.writes]
            case.writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if case.watchdog:
                resets["host-w"] = lambda case=case: reset(watched, case)
        for case in made:
            assert said(case) == "ready"
        async with trio.open_nursery() as nursery:
            for case in made:
                nursery.start_soon(other_host, case, tmp_path / "run")
    finally:
        for case in made:
            if hasattr(case, "writer"):
                case.writer.kill()
                case.path.be("fine") if not case.watchdog else None
                case.writer.communicate()
    for case in made:
        print(f"{case.name}: fenced {case.fenced - case.renewed:.2f} s and taken over {case.taken - case.renewed:.2f} s after the last renewal")
    for case in made:
        assert case.taken > case.renewed + TIMING.dead_after(0), case.name
        if not case.watchdog:
            assert case.fenced < case.renewed + TIMING.fence + NOISE, f"{case.name}: fenced after L"
    assert len(device.resets) == 1, "the host was not reset"
    (case,) = [each for each in made if each.watchdog]
    assert case.fenced < case.taken, "the host was reset after another one had the image"


def reset(host: Host, case: Case) -> None:
    """End a host as a reset does: nothing runs on, and nothing that it had in memory gets anywhere."""
    case.path.lose_memory()
    case.writer.kill()
    while left := host.processes():  # what one of them has just started, too
        processes.end(left, signal.SIGKILL, 0)
    case.fenced = boottime()


def said(case: Case) -> str:
    assert case.writer.stdout is not None
    return case.writer.stdout.readline().strip()


async def other_host(case: Case, run_dirs: Path) -> None:
    """Be host B for one share."""
    options = {"takeover": f"{TAKEOVER:g}"}
    async with station(f"host-b-{case.storage.name}", case.storage, "paxos-lease", options, run_dirs=run_dirs) as b:
        with pytest.raises(Busy):
            await b.acquire()
        await trio.sleep(TIMING.renewal * 1.5)  # it knows that A lives
        if case.writes == "buffered":
            assert case.writer.stdin is not None
            case.writer.stdin.write("\n")
            case.writer.stdin.flush()
            assert await trio.to_thread.run_sync(said, case) == "written"
            assert MARK not in case.image.read_bytes(), "it was not kept in memory"
        case.path.be(case.fault)
        with trio.fail_after(LATER):
            while True:
                try:
                    grant = await b.acquire()
                    break
                except Busy:
                    await trio.sleep(0.05)
        case.taken = boottime()
        case.renewed = Leader.decode((case.storage / ".lockfs/leases/lockspace").read_bytes()).timestamp / TIMING.units
        if not case.watchdog:
            what, when = (await trio.to_thread.run_sync(said, case)).split()
            assert what == "fenced"
            case.fenced = float(when)
            assert case.fenced < case.taken, f"{case.name}: taken over before it was fenced"
        await trio.to_thread.run_sync(write_all, case.image)
        if not case.watchdog:
            case.path.be("fine")
            await trio.sleep(1)
            await trio.to_thread.run_sync(lambda: subprocess.run(["sync", "-f", case.path.path], check=True, timeout=LATER))
        await trio.sleep(1)
        there = set(case.image.read_bytes())
        assert there == ({NEW[0]} if case.stays else {MARK[0]}), f"{case.name}: {bytes(there)!r}"
        await b.release(grant)


def write_all(image: Path) -> None:
    """Write all of an image, down to the storage."""
    fd = os.open(image, os.O_WRONLY | os.O_DSYNC)
    os.pwrite(fd, NEW * SIZE, 0)
    os.close(fd)
