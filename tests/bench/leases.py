"""Leases against those of the sanlock daemon: both take and give back the same lease in turn, through their daemons.

sanlock is asked through its Python binding, lockfs through lockd's socket.  Both work on one lease in one file, so that
the storage is the same for both; beside it stands lockfs on a lease of its own kind, which sanlock cannot use.
Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from harness import processes
from lockfs_paxos_lease.backend import PaxosBackend
from lockfs_paxos_lease.disk.file import Disks, RawFile
from lockfs_paxos_lease.format import delta
from lockfs_paxos_lease.format.dblock import NONE, RELEASED, Dblock, encode_host_sector
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.size import Geometry
from t3_backends.sanlock_daemon import Daemon
from t3_backends.stations import station

from lockfs.lockd.daemon import raise_descriptor_limit
from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient
from lockfs.protocol.wire import close_all

SANLOCK = {"takeover": "sanlock", "io_timeout": "1"}
SANLOCK_ID = 2
REGISTERED = (2, 64, 2000)
PYTHON = "/usr/bin/python3"
BINDING = Path(__file__).with_name("sanlock_binding.py")
WARM = 60
"""Leases taken and given back before memory is measured: by then the daemon has what it needs for any number."""
WATCHED = 6.0
"""Seconds for which the I/O of renewals is counted, at one renewal each half a second."""


class Binding:
    """The client of a sanlock daemon."""

    def __init__(self, space: str, leases: Path, lease: Path) -> None:
        self._process = subprocess.Popen(
            [PYTHON, BINDING, space, str(SANLOCK_ID), leases / "lockspace", SANLOCK["io_timeout"], lease.stem, lease],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        (self.joined,) = self._answer()

    def cycle(self) -> tuple[float, float]:
        """Return the seconds of an acquire and of a release."""
        acquire, release = self._ask("cycle")
        return acquire, release

    def hold(self, lease: Path) -> None:
        """Take a lease and keep it."""
        self._ask(f"hold {lease} {lease.stem}")

    def _ask(self, what: str) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client of sanlock has failed")
        return [float(each) for each in line.split()]

    def close(self) -> None:
        """End it, which gives back what it holds."""
        self._process.communicate()


@contextmanager
def sanlock(top: Path) -> Iterator[Daemon]:
    """Run a sanlock daemon, which the binding finds by the environment."""
    daemon = Daemon("bench-sanlock", top / "s")
    os.environ["SANLOCK_RUN_DIR"] = str(top / "s")
    try:
        yield daemon
    finally:
        daemon.close()


class Lockd:
    """A mount daemon's part towards a lockd of its own, which has a descriptor for each image."""

    def __init__(self, client: LockdClient, run_dir: Path, source: Path, mount_id: str) -> None:
        self.run_dir = run_dir
        self._client = client
        self._source = source
        self._mount_id = mount_id

    async def acquire(self, name: str) -> int:
        """Lock an image; return a descriptor that has it open."""
        fd = os.open(self._source / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        await self.take(name, fd)
        return fd

    async def take(self, name: str, fd: int) -> None:
        """Lock an image that is open already."""
        info = os.fstat(fd)
        image = m.Image(info.st_dev, info.st_ino, name, f"/mnt/{name}")
        owner = m.Owner(f"process:{info.st_ino}:1", 4711, "qemu-system-x86")
        _, fds = await self._client.call(m.Acquire(self._mount_id, image, "exclusive", owner, 0), m.Acquired, [fd])
        close_all(fds)

    async def release(self, fd: int) -> None:
        """Unlock an image."""
        info = os.fstat(fd)
        call = m.Release(self._mount_id, info.st_dev, info.st_ino, "exclusive", f"process:{info.st_ino}:1")
        await self._client.call(call, m.Released)

    async def cycle(self, name: str, fd: int) -> tuple[float, float]:
        """Return the seconds of an acquire and of a release."""
        began = time.perf_counter()
        await self.take(name, fd)
        middle = time.perf_counter()
        await self.release(fd)
        return middle - began, time.perf_counter() - middle

    def pss(self) -> int:
        """Return the memory of the daemon, in bytes."""
        pid = next(pid for pid in processes.of_run_dir(self.run_dir) if "lockfs.lockd" in processes.command_line(pid))
        return processes.memory(pid)["Pss"]


@asynccontextmanager
async def lockd(run_dir: Path, source: Path, options: dict[str, str]) -> AsyncIterator[Lockd]:
    """Run a lockd with one share."""
    os.environ |= {"LOCKFS_RUN_DIR": str(run_dir), "LOCKFS_LOG": "file", "LOCKFS_IDLE_EXIT": "1", "LOCKFS_HOST": run_dir.name}
    client = await LockdClient.connect(str(run_dir), start=True)
    top = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        mount = m.Mount(str(source), "/mnt", "ext4", {}, "paxos-lease", options)
        registered, fds = await client.register(m.Register(mount), top)
        close_all(fds)
        yield Lockd(client, run_dir, source, registered.mount_id)
    finally:
        os.close(top)
        await client.aclose()
        left = processes.end(processes.of_run_dir(run_dir), signal.SIGTERM, 20)
        if left:
            print(f"warning: lockd did not end: {left}")


def register(count: int, leases: Path, lease: Path) -> None:
    """Make records and blocks of hosts up to host id *count*, as if they had joined, and had each had the lease once."""
    geometry, first = Geometry(), SANLOCK_ID + 1
    space = Leader.decode((leases / "lockspace").read_bytes())
    records, blocks = b"", b""
    for host_id in range(first, count + 1):
        record = Leader(
            space.magic, space.version, space.flags, space.sector_size, 0, 1, host_id, 1, 0, space.space_name,
            f"host-{host_id}".encode(), timestamp=1000 + host_id, io_timeout=1,
        )  # fmt: skip
        records += delta.encode(record, b"", geometry.sector)
        # Ballot numbers that are the host's own, as sanlock has them, and of a version that is long past.
        block = Dblock(geometry.max_hosts + host_id, geometry.max_hosts + host_id, host_id, 1, 1000, 1, RELEASED)
        blocks += encode_host_sector(block, NONE, geometry.sector)
    for path, offset, data in (
        (leases / "lockspace", geometry.delta_offset(first), records),
        (lease, geometry.host_offset(first), blocks),
    ):
        if data:
            file = Disks().open(str(path))
            file.write(offset, data)
            file.close()


@dataclass
class Times:
    """What was measured of one way to lock, in seconds."""

    acquire: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)

    def add(self, acquire: float, release: float) -> None:
        """Take note of one cycle."""
        self.acquire.append(acquire)
        self.release.append(release)


async def alternate(top: Path, runs: Path, cycles: int) -> None:
    """Print the table of times."""
    source, other = top / "same", top / "other"
    source.mkdir()
    other.mkdir()
    leases = source / ".lockfs" / "leases"
    print(
        "| hosts registered | | sanlock | lockfs, same lease | ratio | lockfs, takeover=16 | ratio |\n"
        "|---:|---|---:|---:|---:|---:|---:|"
    )
    with sanlock(runs):
        async with lockd(runs / "ours", source, SANLOCK) as ours, lockd(runs / "plain", other, {}) as plain:
            fd, plain_fd = await ours.acquire("img"), await plain.acquire("img")
            await ours.release(fd)
            await plain.release(plain_fd)
            (lease,) = leases.glob("*.lease")
            space = Leader.decode((leases / "lockspace").read_bytes()).space_name.decode()
            theirs = Binding(space, leases, lease)
            for count in REGISTERED:
                register(count, leases, lease)
                await trio.sleep(5)  # both have seen them
                times = [Times(), Times(), Times()]
                for _ in range(cycles):
                    times[0].add(*await trio.to_thread.run_sync(theirs.cycle))
                    times[1].add(*await ours.cycle("img", fd))
                    times[2].add(*await plain.cycle("img", plain_fd))
                print(f"| {count:,} | acquire | {row(*(each.acquire for each in times))} |")
                print(f"| | release | {row(*(each.release for each in times))} |", flush=True)
            theirs.close()
            os.close(fd)
            os.close(plain_fd)


def row(theirs: list[float], *ours: list[float]) -> str:
    """Return medians, and how those of ours compare with theirs."""
    base = statistics.median(theirs)
    others = [f"{statistics.median(each) * 1e3:.2f} ms | {statistics.median(each) / base:.2f}" for each in ours]
    return " | ".join([f"{base * 1e3:.2f} ms", *others])


class Counting:
    """Real files, and what was read and written of each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []

    def open(self, path: str, dir_fd: int | None = None) -> RawFile:
        """Open a file."""
        return _Counted(Disks().open(path, dir_fd), path, self.calls)


@dataclass
class _Counted:
    below: RawFile
    path: str
    calls: list[tuple[str, str, int]]

    @property
    def identity(self) -> tuple[int, int]:
        return self.below.identity

    def read(self, offset: int, length: int) -> bytes:
        self.calls.append(("read", self.path, length))
        return self.below.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.calls.append(("write", self.path, len(data)))
        self.below.write(offset, data)

    def close(self) -> None:
        self.below.close()


async def renewals(top: Path, held: int) -> None:
    """Print how much I/O a host does for its renewals, with and without leases, and how long it takes to join."""
    source, counting = top / "renewed", Counting()
    source.mkdir()
    made = station("other", source, "paxos-lease", {"takeover": "4"}, run_dirs=top / "run")
    print("\n| leases held | I/Os of the host in a second | KiB in a second |\n|---:|---:|---:|")
    async with made:
        began = time.perf_counter()
        host = station(
            "host", source, "paxos-lease", {"takeover": "4"}, run_dirs=top / "run",
            load=lambda context: PaxosBackend(context, counting),
        )  # fmt: skip
        async with host as here:
            joined = time.perf_counter() - began
            have = 0
            for wanted in (0, held // 10, held):
                grants = [await here.acquire(name=f"image{number}") for number in range(have, wanted)]
                have += len(grants)
                counting.calls.clear()
                await trio.sleep(WATCHED)
                volume = sum(length for _, _, length in counting.calls) / 1024
                print(f"| {have:,} | {len(counting.calls) / WATCHED:.1f} | {volume / WATCHED:.0f} |", flush=True)
    print(f"\nA host joined, with takeover=4, in {joined:.2f} s.")


async def joining(top: Path) -> None:
    """Print how long it takes a host to get a free host id, with the default options."""
    source = top / "joined"
    source.mkdir()
    times = []
    async with station("first", source, "paxos-lease", {}, run_dirs=top / "run"):
        for number in range(3):
            began = time.perf_counter()
            async with station(f"host-{number}", source, "paxos-lease", {}, run_dirs=top / "run"):
                times.append(time.perf_counter() - began)
    print(f"\nWith the default, takeover=16, a host joined in {statistics.median(times):.2f} s.")


async def memory(top: Path, runs: Path, held: int) -> None:
    """Print what a lease that is held needs."""
    source = top / "kept"
    source.mkdir()
    leases = source / ".lockfs" / "leases"
    with sanlock(runs / "memory") as daemon:
        async with lockd(runs / "keeps", source, SANLOCK) as ours:
            for number in range(WARM):
                fd = await ours.acquire(f"warm-{number}")
                await ours.release(fd)
                os.close(fd)
            before = ours.pss()
            fds = [await ours.acquire(f"image-{number}") for number in range(held)]
            grown = (ours.pss() - before) / held
            for fd in fds:
                await ours.release(fd)
                os.close(fd)
            paths = [leases / f"i-{(source / f'image-{number}').stat().st_ino:x}.lease" for number in range(held)]
            size = statistics.median(path.stat().st_blocks * 512 for path in paths)
            space = Leader.decode((leases / "lockspace").read_bytes()).space_name.decode()
            theirs = Binding(space, leases, paths[0])
            theirs.hold(paths[0])
            before = processes.memory(daemon.process.pid)["Pss"]
            for path in paths[1:]:
                theirs.hold(path)
            their_growth = (processes.memory(daemon.process.pid)["Pss"] - before) / (held - 1)
            theirs.close()
    print("\n| for each lease | lockfs | sanlock |\n|---|---:|---:|")
    print(f"| memory of the daemon while it is held | {grown / 1024:.1f} KiB | {their_growth / 1024:.1f} KiB |")
    print(f"| its file | {size / 1024:,.0f} KiB | the same |")


async def run(top: Path, runs: Path, quick: bool) -> None:
    """Measure all."""
    await alternate(top, runs, 60 if quick else 300)
    await renewals(top, 50 if quick else 500)
    await joining(top)
    (runs / "memory").mkdir()
    await memory(top, runs, 50 if quick else 200)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run leases", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a first impression")
    parser.add_argument("--directory", default="/var/tmp", help="where to put the files (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        subprocess.run([PYTHON, "-c", "import sanlock"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        parser.exit(2, "tests/bench/run leases: sanlock's Python binding is missing: apt-get install python3-sanlock\n")
    raise_descriptor_limit()
    top = Path(tempfile.mkdtemp(prefix="lockfs-bench.", dir=arguments.directory))
    # The run directories of both are on tmpfs, as /run is.
    runs = Path(tempfile.mkdtemp(prefix="lockfs-bench.", dir="/dev/shm"))
    os.environ["SANLOCK_PRIVILEGED"] = "0"
    try:
        print("Leases, with both daemons on one lease of one file in turn (medians):\n")
        trio.run(run, top, runs, arguments.quick)
    finally:
        shutil.rmtree(top)
        shutil.rmtree(runs)


if __name__ == "__main__":
    main()
