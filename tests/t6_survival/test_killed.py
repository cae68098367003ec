"""A mount daemon that is killed again and again, at any moment: no program notices, and no lock blinks."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import processes
from harness.actor import Actor
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t6_survival.successors import PATIENCE, kill, told

pytestmark = pytest.mark.usefixtures("succession")
ROUNDS = int(os.environ.get("LOCKFS_ROUNDS", "8"))
ROUNDS_OF_BOTH = int(os.environ.get("LOCKFS_ROUNDS", "3"))
SEED = int(os.environ.get("LOCKFS_SEED", "7"))
PROGRAM = Path(__file__).parent / "program.py"


class Blink(threading.Thread):
    """Another host, which tries to open an image for writing all the time; it must never succeed."""

    def __init__(self, image: Path) -> None:
        super().__init__()
        self.image = image
        self.got: list[float] = []
        self.tries = 0
        self.ended = threading.Event()

    def run(self) -> None:
        with Actor() as actor:
            while not self.ended.is_set():
                if actor.result("open", self.image, os.O_RDWR) != "EBUSY":
                    self.got.append(time.monotonic())
                    return
                self.tries += 1
                time.sleep(0.05)


def disturb(mount: Mount, choice: random.Random) -> float:
    """Kill or stop the daemon of a mount; return how long it took until another one served."""
    begin = time.monotonic()
    kill(mount, signal.SIGSTOP if choice.random() < 0.15 else signal.SIGKILL)
    return time.monotonic() - begin


def disturb_both(mount: Mount, choice: random.Random) -> float:
    """Kill or stop lockd and the daemon of a mount within 10 ms, now and then what comes after them, too.

    Return how long it took until others served.
    """
    host, begin = mount.host, time.monotonic()
    victims = [mount.daemon(), host.lockd()]
    choice.shuffle(victims)
    hows = [signal.SIGKILL, signal.SIGSTOP if choice.random() < 0.1 else signal.SIGKILL]
    choice.shuffle(hows)
    for pid, how in zip(victims, hows, strict=True):
        os.kill(pid, how)
        time.sleep(choice.random() * 0.01)
    if choice.random() < 0.25:
        time.sleep(choice.random() * 0.8)
        for pid in host.processes():
            if "lockfs.vault" not in processes.command_line(pid):
                processes.end([pid], signal.SIGKILL, 0)

    def others_serve() -> bool:
        try:
            now = told(mount)
            return bool(now) and not now.get("restarting") and now["pid"] not in victims and host.lockd() not in victims
        except (OSError, LookupError):
            return False

    wait_until(others_serve, PATIENCE, "others to serve")
    return time.monotonic() - begin


def play(
    mount: Mount, rounds: int, choice: random.Random, disturb: Callable[[Mount, random.Random], float] = disturb
) -> dict[str, Any]:
    """Have a program use a mount whose daemon dies *rounds* times; return what it says."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, mount.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        wait_until(lambda: (mount.source / "attributes").exists(), PATIENCE, "the program to begin")
        taken = []
        for _ in range(rounds):
            time.sleep(choice.uniform(0, 0.3))
            taken.append(disturb(mount, choice))
            if process.poll() is not None:
                break
        process.stdin.write("\n")
        process.stdin.flush()
        said: dict[str, Any] = json.loads(process.stdout.readline())
        said["taken"] = taken
        return said
    finally:
        process.kill()
        process.wait(20)
        process.stdin.close()
        process.stdout.close()


class Looks(threading.Thread):
    """Looks for a name that is not there, all the time: how long that takes is how long a mount does not answer."""

    def __init__(self, mount: Mount) -> None:
        super().__init__()
        self.mount = mount
        self.taken: list[float] = []
        self.wrong: set[str] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        with Actor() as actor:
            number = 0
            while not self.ended.is_set():
                begin, number = time.monotonic(), number + 1
                if (result := actor.result("stat", self.mount / f"missing{number}")) != "ENOENT":
                    self.wrong.add(result)
                    return
                self.taken.append(time.monotonic() - begin)
                time.sleep(0.005)

    def pauses(self, count: int) -> list[float]:
        """Return the *count* longest ones, the shortest first."""
        return sorted(self.taken)[-count:]


def report(said: dict[str, Any]) -> None:
    taken = said["taken"]
    print(f"{len(taken)} deaths; until a successor served: median {statistics.median(taken):.2f} s, most {max(taken):.2f} s")
    for kind, longest in sorted(said["pauses"].items()):
        print(f"{said['calls'][kind]:8} {kind:12} longest {', '.join(f'{each:.2f}' for each in longest[:-4:-1])} s")


@pytest.fixture
def patient(make_host: Callable[..., Host]) -> Host:
    """A host that never gives up."""
    return make_host("host-a", LOCKFS_RESTARTS="1000000", LOCKFS_HANG="1")


@pytest.mark.timeout(60 + 6 * ROUNDS)
@pytest.mark.parametrize("data", ["gated", "passthrough"])
def test_no_program_notices(
    patient: Host, host_b: Host, storage: Path, tmp_path: Path, data: str, expect_log: Expected
) -> None:
    expect_log("has not answered for", optional=True)
    mount = patient.mount(storage, tmp_path / "mnt", f"data={data}")
    other = host_b.mount(storage, tmp_path / "other", "wait=0")
    (storage / "image").write_bytes(b"")
    with Actor() as holder:
        holder.call("open", mount / "image", os.O_RDWR)
        blink = Blink(other / "image")
        blink.start()
        try:
            said = play(mount, ROUNDS, random.Random(SEED))
        finally:
            blink.ended.set()
            blink.join()
    report(said)
    assert said["wrong"] == []
    assert len(said["taken"]) == ROUNDS
    assert blink.got == [] and blink.tries > 0
    wait_until(lambda: not patient.locks(), PATIENCE, "all images to be free")
    pid = mount.daemon()
    mount.umount()
    assert not processes.running(pid)
    assert not list((patient.run_dir / "mounts").iterdir())


@pytest.mark.timeout(60 + 12 * ROUNDS_OF_BOTH)
@pytest.mark.parametrize("data", ["gated", "passthrough"])
def test_no_program_notices_that_both_die_at_once(
    patient: Host, host_b: Host, storage: Path, tmp_path: Path, data: str, expect_log: Expected
) -> None:
    """lockd and the mount daemon: then the vault alone keeps what both had."""
    for each in ("has not answered for", "has not come back for", "lockd is not running", "lockd closed", "lockd is gone", "did not come up", "the mount daemon failed", "lockd knows no mount"):
        expect_log(each, optional=True)
    mount = patient.mount(storage, tmp_path / "mnt", f"data={data}")
    other = host_b.mount(storage, tmp_path / "other", "wait=0")
    (storage / "image").write_bytes(b"")
    with Actor() as holder:
        holder.call("open", mount / "image", os.O_RDWR)
        blink, looks = Blink(other / "image"), Looks(mount)
        watchers: list[Blink | Looks] = [blink, looks]
        for each in watchers:
            each.start()
        try:
            said = play(mount, ROUNDS_OF_BOTH, random.Random(SEED), disturb_both)
        finally:
            for each in watchers:
                each.ended.set()
                each.join()
    report(said)
    pauses = looks.pauses(ROUNDS_OF_BOTH)
    print(f"pauses of metadata calls: median {statistics.median(pauses):.2f} s, most {pauses[-1]:.2f} s")
    assert said["wrong"] == [] and looks.wrong == set()
    assert len(said["taken"]) == ROUNDS_OF_BOTH
    assert blink.got == [] and blink.tries > 0
    wait_until(lambda: not patient.locks(), PATIENCE, "all images to be free")
    mount.umount()
    wait_until(lambda: not patient.processes(), PATIENCE, "all daemons to end")
    assert not list((patient.run_dir / "mounts").iterdir())
