"""The option watchdog=: when the device is armed, fed, starved and disarmed, with a stand-in for the device."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.faulty import Faulty
from harness.host import Host
from harness.waiting import wait_until
from harness.watchdog import StandIn

TAKEOVER = 8.0
RENEWAL, FENCE, DEAD = TAKEOVER / 8, TAKEOVER / 2, TAKEOVER * 3 / 4
LATER = 40.0
RESULT = "could not be renewed|is to be fenced|lost the lock o[nf]|fenced .*: its handles fail"
OPTIONAL = "is slow|has not answered|cannot join|not be given back|could not give back|storage of"


@pytest.fixture
def device(tmp_path: Path, leaves_nothing: None) -> Iterator[StandIn]:
    """A watchdog that resets nobody, but says that it would have."""
    made = StandIn(tmp_path, lambda: None)
    yield made
    made.close()


@pytest.fixture
def path(device: StandIn, storage: Path, tmp_path: Path) -> Iterator[Faulty]:
    """The way of the host to the storage."""
    made = Faulty(storage, tmp_path / "path")
    yield made
    made.close()


def fed_since(device: StandIn, when: float) -> int:
    return sum(each > when for each in device.fed)


def test_it_is_armed_fed_starved_and_disarmed(
    device: StandIn, path: Faulty, make_host: Callable[..., Host], tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    for pattern in RESULT.split("|"):
        expect_log(pattern)
    expect_log(OPTIONAL, optional=True)
    host = make_host("host-a", **device.variables)
    options = f"backend=paxos-lease,takeover={TAKEOVER:g},watchdog={device.path}"
    mount = host.mount(path.path, tmp_path / "mnt", options)
    assert not device.fed, "nothing is held: a host must not be reset for nothing"
    with Actor() as one:
        fd = one.call("open", mount / "img", os.O_RDWR | os.O_CREAT)
        assert device.armed
        assert device.timeout == int(DEAD - 1), "others may take over sooner than it resets"
        began = time.monotonic()
        wait_until(lambda: fed_since(device, began) >= 3, LATER, "it is fed with each renewal")
        one.call("close", fd)
        wait_until(lambda: not device.armed, LATER, "it is disarmed: nothing is held any more")
        assert not device.resets
        # The storage hangs, but what was lost is fenced, and nothing of it is in memory: there is no need for a reset.
        fd = one.call("open", mount / "img", os.O_RDWR)
        path.be("stall")
        stalled = time.monotonic()
        wait_until(lambda: "its handles fail" in host.log(), LATER, "the fence")
        fenced = time.monotonic()
        # Between the last renewal and the fence nobody may say that all is well.
        assert all(each < stalled + RENEWAL or each > fenced - 2 for each in device.fed)
        wait_until(lambda: fed_since(device, fenced) >= 3, LATER, "it is fed again")
        path.be("fine")
        one.result("close", fd)
        wait_until(lambda: not device.armed, LATER, "it is disarmed")
        wait_until(lambda: one.result("open", mount / "img", os.O_RDWR) == "ok", LATER, "a new lease")
        assert device.armed
    wait_until(lambda: not device.armed, LATER, "it is disarmed")


def test_a_host_whose_lockd_is_stopped_is_reset(
    device: StandIn, storage: Path, make_host: Callable[..., Host], tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    """What no program can promise: nobody is there who could fence, or who could know that he has to."""
    expect_log(f"{RESULT}|{OPTIONAL}|lockd is gone|not answer|hangs", optional=True)
    host = make_host("host-a", LOCKFS_RESTARTS="0", **device.variables)
    options = f"backend=paxos-lease,takeover={TAKEOVER / 2:g},watchdog={device.path}"
    mount = host.mount(storage, tmp_path / "mnt", options)
    with Actor() as one:
        one.call("open", mount / "img", os.O_RDWR | os.O_CREAT)
        lockd = host.lockd()
        os.kill(lockd, signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            wait_until(lambda: device.resets, LATER, "the reset")
            # Counted from its last feeding, which was no later than it was stopped.
            assert device.resets[0] - device.fed[-1] >= device.timeout
            assert device.fed[-1] <= stopped + 0.1
        finally:
            os.kill(lockd, signal.SIGCONT)
