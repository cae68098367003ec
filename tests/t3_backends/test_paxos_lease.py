"""What is paxos-lease's own: host ids, return after a death, what it leaves for a successor.  Hosts are real processes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from harness.waiting import wait_until
from lockfs_paxos_lease.format.leader import Leader
from t3_backends.lease_process import LeaseHost

TAKEOVER = 6.0
"""Seconds.  L is half of it, and others take over after three quarters."""

PATIENCE = 30.0
UNHURRIED = {"takeover": "30"}
"""Where a lockd has to be started anew before L, however busy the machine is, and nothing is waited for."""

Start = Callable[..., LeaseHost]


@pytest.fixture
def start(storage: Path, tmp_path: Path) -> Iterator[Start]:
    """Start hosts; they are ended after the test."""
    made: list[LeaseHost] = []

    def begin(name: str, *, elsewhere: bool = False, **options: str) -> LeaseHost:
        host = LeaseHost(
            name, storage, tmp_path / "run", elsewhere=elsewhere, **{"takeover": f"{TAKEOVER:g}", **options}
        )
        made.append(host)
        return host

    yield begin
    for host in made:
        host.close()


# Host ids ----------------------------------------------------------------------------------------


def test_each_host_gets_an_id_of_its_own_and_the_same_one_again(start: Start) -> None:
    a, b = start("host-a"), start("host-b")
    assert sorted([a.call("who"), b.call("who")]) == [[1, 1], [2, 1]]
    before = b.call("who")
    b.leave()
    a.leave()
    b = start("host-b")
    assert b.call("who") == [before[0], 2]
    assert [host[:2] for host in b.call("hosts")] == [["host-a", "free"], ["host-b", "live"]]


def test_hosts_that_start_at_once_do_not_clash(start: Start) -> None:
    with ThreadPoolExecutor() as pool:
        hosts = list(pool.map(start, [f"host-{number}" for number in range(5)]))
    assert sorted(host.call("who")[0] for host in hosts) == [1, 2, 3, 4, 5]


def test_a_host_id_that_is_in_use_is_refused_with_the_name_of_who_uses_it(start: Start) -> None:
    start("host-a", host_id="7")
    with pytest.raises(RuntimeError) as caught:
        start("host-b", host_id="7")
    assert "host id 7 is in use by the host" in str(caught.value)
    assert "host-a" in str(caught.value)


def test_joining_a_free_id_waits_for_nobodys_death(start: Start) -> None:
    start("host-a", takeover="120").leave()  # the first one makes the lockspace
    log = start("host-b", takeover="120").log.read_text()
    joined = next(line for line in log.splitlines() if "joined as host id" in line)
    assert float(joined.split()[0]) < 60_000, log  # milliseconds since Python began; a death takes twice that


def test_another_timing_is_refused(start: Start) -> None:
    start("host-a")
    with pytest.raises(RuntimeError, match="takeover=6, not with 16"):
        start("host-b", takeover="16")
    with pytest.raises(RuntimeError, match="takeover=6, not with sanlock's timing"):
        start("host-b", takeover="sanlock")


# Death -------------------------------------------------------------------------------------------


def test_a_lockd_that_is_killed_is_succeeded_under_the_same_id_and_generation(start: Start, storage: Path) -> None:
    more = {"takeover": "16"}  # L leaves time to start it anew on a busy machine
    a, b = start("host-a", **more), start("host-b", **more)
    who, token = a.call("who"), a.call("acquire")
    a.kill()
    a = start("host-a", **more)
    assert a.call("who") == who
    lockspace, host_id = storage / ".lockfs" / "leases" / "lockspace", who[0]

    def renewed() -> int:
        return Leader.decode(lockspace.read_bytes()[(host_id - 1) * 512 :]).timestamp

    for _ in range(2):
        before = renewed()
        wait_until(lambda before=before: renewed() != before, PATIENCE, "a renewal")
    with pytest.raises(RuntimeError, match="Busy: host host-a"):
        b.call("acquire")
    # Its own lease of that incarnation is free for it.
    assert a.call("acquire") > token
    a.call("release")
    b.call("acquire")


def test_what_nobody_takes_up_is_given_back(start: Start) -> None:
    a, b = start("host-a", **UNHURRIED), start("host-b", **UNHURRIED)
    for image in ("one", "two", "three"):
        a.call("acquire", image=image)
    a.call("acquire", image="shared", mode="shared")
    a.kill()
    a = start("host-a", **UNHURRIED)
    a.call("acquire", image="two")
    for image in ("one", "three", "shared"):
        with pytest.raises(RuntimeError, match="Busy: host host-a"):
            b.call("acquire", image=image)
    a.call("inherit")
    for image in ("one", "three", "shared"):
        b.call("acquire", image=image)
    with pytest.raises(RuntimeError, match="Busy: host host-a"):
        b.call("acquire", image="two")


def test_what_could_not_be_taken_up_stays_until_it_is_fenced(start: Start) -> None:
    a, b = start("host-a", **UNHURRIED), start("host-b", **UNHURRIED)
    a.call("acquire", mode="shared")
    a.kill()
    a = start("host-a", **UNHURRIED)
    with pytest.raises(RuntimeError, match=r"GrantLost: the lease on .* is not this host's any more"):
        a.call("adopt")
    a.call("inherit")
    with pytest.raises(RuntimeError, match="Busy: host host-a"):
        b.call("acquire")
    with pytest.raises(RuntimeError, match="is still being fenced"):
        a.call("acquire")
    a.call("fenced")
    b.call("acquire")


@pytest.mark.parametrize("killed", [True, False])
def test_a_host_that_held_nothing_is_back_at_once_if_nobody_can_have_had_its_id(start: Start, killed: bool) -> None:
    """Its record is what the last lockd has noted to have written."""
    a = start("host-a")
    a.call("acquire")
    a.call("release")
    if killed:
        a.kill()
    else:
        a.leave()
    time.sleep(TAKEOVER / 2 + 0.5)
    begin = time.monotonic()
    a = start("host-a")
    assert time.monotonic() - begin < TAKEOVER * 3 / 4
    assert a.call("who")[1] == 2


# What it leaves ----------------------------------------------------------------------------------


def state_files(tmp_path: Path, name: str) -> list[Path]:
    return list((tmp_path / "run" / name / "paxos-lease").glob("*.json"))


def test_the_state_says_what_a_successor_must_know(start: Start, tmp_path: Path, storage: Path) -> None:
    a = start("host-a")
    (file,) = state_files(tmp_path, "host-a")
    said = json.loads(file.read_text())
    assert [said["host_id"], said["generation"]] == a.call("who")
    held = file.with_suffix(".held")
    assert os.listdir(held) == []
    a.call("acquire")
    assert os.listdir(held) == [f"i-{(storage / 'img').stat().st_ino:x}"]
    a.call("release")
    assert os.listdir(held) == []
    a.leave()
    assert state_files(tmp_path, "host-a") == []


def test_two_processes_of_one_host_do_not_share_an_id(start: Start) -> None:
    start("host-a")
    with pytest.raises(RuntimeError, match="another process on this host uses the lockspace"):
        start("host-a")


def test_a_host_that_was_rebooted_is_back_soon_and_its_old_leases_are_free(
    start: Start, tmp_path: Path, storage: Path
) -> None:
    a, b = start("host-a"), start("host-b")
    host_id, _ = a.call("who")
    a.call("acquire")
    a.kill()
    # What is different after a boot: nothing is left in the run directory, and the clock is behind what was written.
    (file,) = state_files(tmp_path, "host-a")
    shutil.rmtree(file.parent)
    lockspace, sector = storage / ".lockfs" / "leases" / "lockspace", slice((host_id - 1) * 512, host_id * 512)
    data = bytearray(lockspace.read_bytes())
    record = Leader.decode(bytes(data[sector]))
    data[sector] = replace(record, timestamp=record.timestamp + 10**9).encode().ljust(512, b"\0")
    with lockspace.open("r+b") as there:
        there.write(data)
    begin = time.monotonic()
    a = start("host-a")
    assert a.call("who") == [host_id, 2]
    assert a.call("acquire") == 2
    assert time.monotonic() - begin < TAKEOVER * 3 / 4
    with pytest.raises(RuntimeError, match="Busy: host host-a"):
        b.call("acquire")


@pytest.mark.long
def test_a_mount_does_not_wait_for_a_join_that_the_rules_delay(start: Start) -> None:
    begin = time.monotonic()
    a = start("host-a", takeover="sanlock", io_timeout="10")
    assert time.monotonic() - begin < 10
    with pytest.raises(RuntimeError, match=r"LockUnavailable: this host has no valid lease .* has not joined"):
        a.call("acquire")
    while True:
        try:
            a.call("acquire")
        except RuntimeError:
            assert time.monotonic() - begin < 40
            time.sleep(0.5)
        else:
            break
    assert time.monotonic() - begin > 20
