"""lockd killed again and again at random moments, under load; and both daemons within a few milliseconds.

LOCKFS_ROUNDS says how often (200 for a long run), LOCKFS_SEED with which random numbers.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import lockd, mounts, processes
from harness.actor import Actor, Refused
from harness.host import Host, Mount
from harness.load import Load
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard.ways import HELPERS

from lockfs.protocol.start import is_running

ROUNDS = int(os.environ.get("LOCKFS_ROUNDS") or 6)
SEED = int(os.environ.get("LOCKFS_SEED") or time.time_ns() % 1_000_000)
SOON = 30.0
pytestmark = pytest.mark.timeout(120 + 10 * ROUNDS)


class Hammer:
    """Processes on several mounts that want one image all the time; a marker on the storage tells if two have it."""

    def __init__(self, image: str, on: list[Mount], marker: Path) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._hammer, args=(mount / image, marker)) for mount in on]
        for each in self._threads:
            each.start()

    def _hammer(self, image: Path, marker: Path) -> None:
        try:
            with Actor() as actor:
                while not self._over.is_set():
                    try:
                        fd = actor.call("open", image, os.O_RDWR)
                    except Refused as refused:
                        self.outcomes[refused.name] += 1
                        if refused.name != "EBUSY":
                            self.wrong.append(refused.name)
                        continue
                    self.outcomes["ok"] += 1
                    self._be_inside(marker)
                    actor.call("close", fd)
                    time.sleep(0.01)
        except Exception as error:
            self.wrong.append(repr(error))

    def _be_inside(self, marker: Path) -> None:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            self.wrong.append("two have the image at once")
        time.sleep(0.002)
        marker.unlink(missing_ok=True)

    def stop(self) -> None:
        self._over.set()
        for each in self._threads:
            each.join()


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        pass


def stop_what_serves(host: Host) -> None:
    """Stop lockd; not one that is just starting, which takes `START_TIMEOUT` to be noticed."""
    try:
        kill(lockd.status(host.run_dir)["pid"], signal.SIGSTOP)
    except OSError:
        pass


def knows_both(host: Host) -> bool:
    try:
        return len(lockd.status(host.run_dir)["mounts"]) == 2
    except OSError:
        return False


def test_killed_at_random_moments(
    make_host: Callable[..., Host], host_b: Host, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    """Or stopped, now and then: the mounts then kill it."""
    for each in ("has not answered for 2 s: it is killed", "cannot have lockd back"):
        expect_log(each, optional=True)
    host = make_host("host-a", LOCKFS_HANG="2")
    rng = random.Random(SEED)
    print(f"\nLOCKFS_SEED={SEED} LOCKFS_ROUNDS={ROUNDS}")
    (storage / "wanted").touch()
    one, two = (host.mount(storage, tmp_path / name, "wait=0") for name in ("one", "two"))
    other = host_b.mount(storage, tmp_path / "other", "wait=0")
    with ExitStack() as stack:
        holder, asker = stack.enter_context(Actor()), stack.enter_context(Actor())
        holder.call("open", one / "held", os.O_RDWR | os.O_CREAT)
        loads = [stack.enter_context(Load(mount.path, f"disk{number}")) for number, mount in enumerate((one, two, other))]
        hammer = Hammer("wanted", [one, two, other, other], tmp_path / "inside")
        stack.callback(hammer.stop)
        for turn in range(ROUNDS):
            if turn % 4 == 1:  # programs wait for `session.PATIENCE`, so not all may be killed before the mounts are back
                wait_until(lambda: knows_both(host), SOON, "the mounts to come back")
            elif turn % 4:  # every fourth one is killed while it starts
                wait_until(lambda: is_running(str(host.run_dir)), SOON, "a lockd to serve")
            time.sleep(rng.choice((0.0, rng.random() * 0.3, rng.random() * 1.5)))
            if turn % 4 and rng.random() < 0.1:
                stop_what_serves(host)
            else:
                for pid in host.processes("lockfs.lockd"):
                    kill(pid)
            for load in loads:
                load.check()
            assert hammer.wrong == []
            assert asker.result("open", other / "held", os.O_RDWR) == "EBUSY"
        assert asker.result("open", two / "held", os.O_RDWR) == "EBUSY"
        hammer.stop()
        assert hammer.wrong == []
        (storage / "stop").touch()
        for load in loads:
            turns, longest = load.finish()
            print(f"{turns} turns, the longest took {longest:.3f} s")
        print(f"the image that four wanted: {dict(hammer.outcomes)}")
        assert hammer.outcomes["ok"] > 0
    wait_until(lambda: host.locks() == [], SOON, "all to be given back")
    for mount in (one, two):
        mount.umount()
    wait_until(lambda: not host.processes("lockfs.lockd"), SOON, "lockd to leave")
    assert not (host.run_dir / "lockd.state").exists()


def test_both_within_ten_milliseconds(host: Host, storage: Path, tmp_path: Path, expect_log: Expected) -> None:
    """Whatever is left of them, and also without the vault, an image that somebody can still write to is nobody else's."""
    for each in ("can be written to without a lock", "is locked again", "lost the lock o[nf]", "fenced", "daemon", "lock on", "lockd is not running", "lockd closed", "lockd is gone", "lockd knows no mount", "the vault"):
        expect_log(each, optional=True)
    rng = random.Random(SEED)
    print(f"\nLOCKFS_SEED={SEED} LOCKFS_ROUNDS={ROUNDS}")
    path = tmp_path / "mnt"
    for turn in range(max(2, ROUNDS // 3)):
        name = f"image{turn}"
        (storage / name).write_bytes(bytes(8192))
        mount = host.mount(storage, path, "data=passthrough,wait=0")
        with Puppet() as orphan:
            orphan.tell(HELPERS, path=str(mount / name))
            orphan.tell("fd = os.open(path, os.O_RDWR)")
            victims = [mount.daemon(), host.lockd()]
            rng.shuffle(victims)
            kill(victims[0])
            time.sleep(rng.random() * 0.01)
            kill(victims[1])
            if turn % 2:
                host.kill()  # the vault, too: then what both had is gone
            time.sleep(rng.choice((0.0, 0.3, 1.0)))
            assert mounts.umount(path, lazy=True) == ""
            host.mounts.remove(mount)
            again = host.mount(storage, path, "data=passthrough,wait=0")
            with Actor() as rival:
                for _ in range(3):
                    granted = rival.result("open", again / name, os.O_RDWR) == "ok"
                    # Not before: what was granted must not be written by the other from then on.
                    can_write = orphan.tell("outcome(os.pwrite, fd, b'orphan', 0)") == "ok"
                    assert not (granted and can_write), f"turn {turn}, {victims}"
                    time.sleep(0.1)
        with Actor() as rival:
            wait_until(lambda again=again, name=name, rival=rival: rival.result("open", again / name, os.O_RDWR) == "ok", SOON, "it to be free")
        again.umount()
        left = [pid for pid in host.processes("lockfs.fs") if processes.running(pid)]
        assert processes.wait_until_gone(left, SOON) == []


def test_the_hammer_notices_two(storage: Path, tmp_path: Path, host: Host, expect_log: Expected) -> None:
    """With a backend that grants everything, two are inside."""
    (storage / "wanted").touch()
    mount = host.mount(storage, tmp_path / "nop", "backend=nop")
    hammer = Hammer("wanted", [mount, mount, mount], tmp_path / "inside")
    try:
        wait_until(lambda: "two have the image at once" in hammer.wrong, SOON, "two to be inside")
    finally:
        hammer.stop()
