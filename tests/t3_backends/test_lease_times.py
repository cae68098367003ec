"""What takes its time: takeover, loss, and return, by what the clock says.  Hosts are real processes.

All of it is done at once, before the first test of this module, each with a share of its own; the tests report on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from t3_backends.lease_process import LeaseHost

TAKEOVER = 6.0
"""Seconds.  L is half of it, and others take over after three quarters."""
LATE = 10.0
"""What a busy test machine may add."""

Start = Callable[..., LeaseHost]
Scenario = Callable[[Start], None]
SCENARIOS: dict[str, Scenario] = {}


def at_once(scenario: Scenario) -> Scenario:
    """Have a scenario run with the others."""
    SCENARIOS[scenario.__name__] = scenario
    return scenario


def run(scenario: Scenario, top: Path) -> None:
    """Run a scenario on a share in *top*; its hosts are ended after it."""
    storage, made = top / "storage", []
    storage.mkdir()

    def start(name: str, *, elsewhere: bool = False, **options: str) -> LeaseHost:
        made.append(LeaseHost(name, storage, top / "run", elsewhere=elsewhere, **{"takeover": f"{TAKEOVER:g}", **options}))
        return made[-1]

    try:
        scenario(start)
    finally:
        for host in made:
            host.close()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[None]]:
    """What became of each scenario; all have ended."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        return {name: pool.submit(run, each, tmp_path_factory.mktemp("lease")) for name, each in SCENARIOS.items()}


def acquire_within(host: LeaseHost, seconds: float) -> tuple[float, int]:
    """Try until it has the image; return how long that took, and the token."""
    begin = time.monotonic()
    while True:
        try:
            token = host.call("acquire")
        except RuntimeError as error:
            if "Busy" not in str(error) or time.monotonic() > begin + seconds:
                raise
            time.sleep(0.05)
        else:
            return time.monotonic() - begin, token


def joined_again(host: LeaseHost) -> None:
    """Wait until a host that has lost its lease has joined as a new incarnation."""
    deadline = time.monotonic() + TAKEOVER + LATE
    while True:
        try:
            assert host.call("who")[1] == 2
        except RuntimeError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


@at_once
def what_a_dead_host_held_is_had_in_time_and_not_before(start: Start) -> None:
    a, b = start("host-a"), start("host-b")
    first = a.call("acquire")
    # The last renewal that b can have seen is no older than this.
    killed = time.monotonic()
    a.kill()
    with pytest.raises(RuntimeError, match="Busy: host host-a, process 4711"):
        b.call("acquire")
    took, token = acquire_within(b, TAKEOVER + LATE)
    assert token > first
    assert time.monotonic() - killed > TAKEOVER / 4, "that was before host-a had to fence"
    assert took < TAKEOVER + LATE
    assert ["host-a", "dead"] in [host[:2] for host in b.call("hosts")]


@at_once
def what_a_host_held_that_an_admin_says_is_dead_is_had_at_once(start: Start) -> None:
    """Long before it would be had by itself; and nobody is believed about a host that lives."""
    a, b = start("host-a", takeover="24"), start("host-b", takeover="24")
    a.call("acquire")
    for host, why in (("host-a", "it lives"), ("host-b", "is this one"), ("host-c", "there is no host 'host-c'")):
        with pytest.raises(RuntimeError, match=f"Denied: .*{why}"):
            b.call("confirm-dead", image=host)
    a.kill()
    with pytest.raises(RuntimeError, match="Busy: host host-a"):
        b.call("acquire")
    assert b.call("confirm-dead", image="host-a") == "host-a"
    b.call("acquire")
    assert ["host-a", "dead"] in [host[:2] for host in b.call("hosts")]


@at_once
def a_host_that_comes_back_too_late_is_a_new_one_and_waits_for_those_who_may_still_write(start: Start) -> None:
    a = start("host-a")
    who = a.call("who")
    a.call("acquire")
    a.kill()
    time.sleep(TAKEOVER / 2 + 0.5)
    begin = time.monotonic()
    a = start("host-a")
    joined_again(a)
    assert a.call("who") == [who[0], who[1] + 1]
    assert time.monotonic() - begin > TAKEOVER * 3 / 4, "others would have waited longer"
    a.call("acquire")


@at_once
def a_host_that_was_stopped_finds_its_lease_lost(start: Start) -> None:
    a, b = start("host-a"), start("host-b")
    a.call("acquire")
    a.pause()
    acquire_within(b, TAKEOVER + LATE)
    a.go_on()
    assert a.wait_for_loss()["lost"] == "img"
    with pytest.raises(RuntimeError, match="LockUnavailable: cannot change the lock"):
        a.call("convert", mode="shared")
    a.call("release")
    # What it has given back was not its own any more: the other one keeps it, also when this one has joined again.
    joined_again(a)
    with pytest.raises(RuntimeError, match="Busy: host host-b"):
        a.call("acquire")
    assert a.call("acquire", image="another") == 1


@at_once
def a_clone_of_this_machine_is_found_out(start: Start) -> None:
    a = start("host-a")
    a.call("acquire")
    with pytest.raises(RuntimeError, match=r"is at work as host id 1 \(host-a\): one is a copy of the other"):
        start("host-a", elsewhere=True)
    time.sleep(TAKEOVER / 4)
    assert a.call("who") == [1, 1]
    a.call("release")
    assert not a.losses


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", SCENARIOS)
def test_in_time(outcomes: dict[str, Future[None]], what: str) -> None:
    outcomes[what].result()
