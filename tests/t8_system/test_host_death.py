"""The death of a host, of its virtual machine alone, and its return, with real mounts and leases.

All that is to be awaited is awaited at once: several pairs of hosts, each with a share of its own, suffer at the same
time.  Times count from the last renewal that the storage has of the host that died.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import mounts, processes
from harness.actor import Actor
from harness.host import Host, Mount
from harness.waiting import wait_until
from lockfs_paxos_lease.driver import boottime
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.leader import Leader
from t8_system.qemu import QemuIo, run

DEFAULT, TUNED = 16.0, 10.0
"""Values of takeover=, in seconds: that without the option, and one for storage that is never slow."""
LONG = 60.0
"""And one for what has to be quick whatever takeover= says: so a busy machine does not look like a rule."""
NOISE = 6.0
"""What a busy test machine may add: less than is between a rule that holds and one that does not."""
EARLIER_BOOT = ("unshare", "--time", "--boottime", "1000000")
"""In the life of a host before it is booted again its clock is far ahead."""


@dataclass
class Pair:
    """Two hosts on one share; the first holds an image by a qemu-io."""

    takeover: float
    a: Host
    b: Host
    storage: Path
    mount_a: Mount = field(init=False)
    mount_b: Mount = field(init=False)
    holder: QemuIo = field(init=False)

    def set_up(self, top: Path) -> None:
        """Mount, and have the image open on the first host, with the second one having seen that it lives."""
        run("qemu-img", "create", "-q", "-f", "raw", self.storage / "img", "4M")
        self.mount_a = self.a.mount(self.storage, top / "a", self.options)
        self.mount_b = self.b.mount(self.storage, top / "b", self.options)
        self.holder = QemuIo(self.mount_a / "img", "raw")

    @property
    def options(self) -> str:
        """The options of the mounts."""
        default = self.takeover == DEFAULT
        return "backend=paxos-lease,wait=0" + ("" if default else f",takeover={self.takeover:g}")

    @property
    def timing(self) -> Timing:
        """By which the hosts go."""
        return Timing.own(self.takeover)

    def last_renewal(self) -> float:
        """Return when the first host renewed its lease."""
        data = (self.storage / ".lockfs" / "leases" / "lockspace").read_bytes()
        return Leader.decode(data).timestamp / self.timing.units

    def kill_host(self) -> None:
        """End all that host A is, at one moment, and the virtual machine first of all to stop."""
        pids = [*self.a.processes(), self.holder.process.pid]
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, how)
        assert processes.wait_until_gone(pids[:-1], NOISE) == []
        self.holder.process.wait()

    def b_gets_it(self, seconds: float) -> float:
        """Have host B want the image until it has it; return when (CLOCK_BOOTTIME) that was."""
        until = time.monotonic() + seconds
        with Actor() as other:
            while (said := other.result("open", self.mount_b / "img", os.O_RDWR)) != "ok":
                assert said == "EBUSY", said
                assert time.monotonic() < until, f"not within {seconds:g} s"
                time.sleep(0.02)
            return boottime()


@pytest.fixture
def pair(make_host: Callable[..., Host], tmp_path: Path, expect_log: Callable[..., None]) -> Iterator[Callable[..., Pair]]:
    """Make pairs of hosts; the second is the same one in all."""
    expect_log("lockd is gone|is slow|could not be renewed|still joining", optional=True)
    made: list[Pair] = []
    other = make_host("host-b")

    def make(takeover: float, *prefix: str) -> Pair:
        top = tmp_path / f"pair{len(made)}"
        (top / "storage").mkdir(parents=True)
        number = len(made)
        made.append(Pair(takeover, make_host(f"a{number}"), other, top / "storage"))
        made[-1].a.prefix = prefix
        made[-1].set_up(top)
        return made[-1]

    yield make
    for each in made:
        each.holder.process.kill()
        each.holder.process.communicate()


def host_dies(pair: Pair) -> dict[str, float]:
    """B has it when A's lease has run out and the margin has passed, not earlier, and within the time promised."""
    pair.kill_host()
    killed, renewed = boottime(), pair.last_renewal()
    taken = pair.b_gets_it(pair.takeover + NOISE)
    return {"after its last renewal": taken - renewed, "after its death": taken - killed}


def machine_dies(pair: Pair) -> dict[str, float]:
    """B has it at once."""
    pair.holder.process.kill()
    killed = boottime()
    return {"after its death": pair.b_gets_it(pair.takeover) - killed}


def host_returns(pair: Pair) -> dict[str, float]:
    """In the same boot, before its lease has run out: it goes on under its incarnation, and has all that is its own."""
    before = Leader.decode((pair.storage / ".lockfs" / "leases" / "lockspace").read_bytes())
    pair.kill_host()
    killed = boottime()
    mounts.umount(pair.mount_a.path)
    pair.a.mount(pair.storage, pair.mount_a.path, pair.options)
    with Actor() as again:
        assert again.result("open", pair.mount_a / "img", os.O_RDWR) == "ok"
        took = boottime() - killed
        with Actor() as other:
            assert other.result("open", pair.mount_b / "img", os.O_RDWR) == "EBUSY"
    after = Leader.decode((pair.storage / ".lockfs" / "leases" / "lockspace").read_bytes())
    assert (after.owner_id, after.owner_generation) == (before.owner_id, before.owner_generation)
    return {"after its death": took}


def host_is_booted(pair: Pair) -> dict[str, float]:
    """In a new boot, in which nothing of the old one can still write: its images are its own as soon as it has joined.

    That takes one and a half renewals, in which a clone of this machine would show.
    """
    pair.kill_host()
    killed = boottime()
    mounts.umount(pair.mount_a.path)
    for each in pair.a.run_dir.iterdir():  # it lies in memory
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    pair.a.prefix = ()
    pair.a.mount(pair.storage, pair.mount_a.path, pair.options)
    with Actor() as again:
        wait_until(lambda: again.result("open", pair.mount_a / "img", os.O_RDWR) == "ok", pair.takeover, "its own image")
        took = boottime() - killed
    after = Leader.decode((pair.storage / ".lockfs" / "leases" / "lockspace").read_bytes())
    assert after.owner_generation == 2
    return {"after its death": took}


@pytest.mark.timeout(180)
def test_who_has_the_image_when_after_a_death(pair: Callable[..., Pair], record_property: Callable[..., None]) -> None:
    dies, tuned, vm, returns, booted = pair(DEFAULT), pair(TUNED), pair(LONG), pair(LONG), pair(LONG / 2, *EARLIER_BOOT)
    with ThreadPoolExecutor() as pool:
        results = {
            what: pool.submit(*call)
            for what, call in {
                "host dies": (host_dies, dies), "host dies, tuned": (host_dies, tuned), "machine dies": (machine_dies, vm),
                "host returns": (host_returns, returns), "host is booted": (host_is_booted, booted),
            }.items()
        }  # fmt: skip
    found = {what: result.result() for what, result in results.items()}
    print("\n".join(f"{what}: {({how: round(seconds, 2) for how, seconds in each.items()})}" for what, each in found.items()))
    for what, pair_of in (("host dies", dies), ("host dies, tuned", tuned)):
        assert found[what]["after its last renewal"] > pair_of.timing.dead_after(0), "somebody might still have written"
        assert found[what]["after its death"] < pair_of.takeover + NOISE
    # Far less than anybody would wait for a dead host.
    for what, pair_of in (("machine dies", vm), ("host returns", returns), ("host is booted", booted)):
        assert found[what]["after its death"] < pair_of.timing.dead_after(0), what
