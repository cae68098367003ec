"""lockd with many locks and many clients: memory, time of one more lock, and how fast a successor takes all up.

It mounts nothing: it speaks to lockd as mount daemons do.  Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import trio
from harness import processes
from t4_lockd.clients import bare

from lockfs.errors import LockfsError
from lockfs.fs.handover import Held, in_messages
from lockfs.lockd.daemon import raise_descriptor_limit
from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient
from lockfs.protocol.wire import close_all

SAMPLE = 300
"""Acquires, each with its release, that one figure is the median of."""


class Bench:
    """A mount daemon's part, with a descriptor for each image."""

    def __init__(self, run_dir: Path, source: Path, locks: int) -> None:
        self.run_dir = run_dir
        self.source = source
        self.locks = locks
        self.held: list[Held] = []
        self.mount_id = ""
        self.mount = m.Mount(str(source), "/mnt", "ext4", {}, "fcntl-lockd", {"cards": "no"})
        self.top = os.open(source, os.O_RDONLY | os.O_DIRECTORY)

    async def register(self) -> LockdClient:
        client = await LockdClient.connect(str(self.run_dir), start=True)
        try:
            registered, fds = await client.register(m.Register(self.mount, mount_id=self.mount_id), self.top)
        except (LockfsError, OSError):
            await client.aclose()
            raise
        close_all(fds)
        self.mount_id = registered.mount_id
        return client

    async def come_back(self) -> LockdClient:
        """Register with the next lockd; the one that was killed may still take connections while it dies."""
        while True:
            try:
                return await self.register()
            except (LockfsError, OSError):
                await trio.sleep(0.01)

    def image(self, number: int) -> tuple[m.Image, int]:
        name = f"{number}.img"
        fd = os.open(self.source / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        info = os.fstat(fd)
        return m.Image(info.st_dev, info.st_ino, name, f"/mnt/{name}"), fd

    async def take(self, client: LockdClient, upto: int) -> None:
        numbers = iter(range(len(self.held), upto))

        async def work() -> None:
            for number in numbers:
                image, fd = self.image(number)
                owner = m.Owner(f"process:{number}:1", 1000 + number, "qemu-system-x86", f"vm-{number}")
                await client.call(m.Acquire(self.mount_id, image, "exclusive", owner, 0, node=number + 2), m.Acquired, [fd])
                self.held.append(Held(image, [m.HeldBy(owner, "exclusive", nodes=[number + 2])], fd, (), False))

        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(work)

    async def one_more(self, client: LockdClient) -> tuple[float, float]:
        """Return the median microseconds of an acquire and of a release."""
        image, fd = self.image(-1)
        owner = m.Owner("process:1:1", 1)
        taken, given = [], []
        for _ in range(SAMPLE):
            begin = time.perf_counter()
            await client.call(m.Acquire(self.mount_id, image, "exclusive", owner, 0, node=1), m.Acquired, [fd])
            middle = time.perf_counter()
            await client.call(m.Release(self.mount_id, image.dev, image.ino, "exclusive", owner.key), m.Released)
            taken.append(middle - begin)
            given.append(time.perf_counter() - middle)
        os.close(fd)
        return statistics.median(taken) * 1e6, statistics.median(given) * 1e6

    def lockd(self) -> int:
        return next(pid for pid in processes.of_run_dir(self.run_dir) if "lockfs.lockd" in processes.command_line(pid))

    def rss(self) -> float:
        return processes.memory(self.lockd())["Rss"] / (1 << 20)

    async def measure(self, client: LockdClient, what: str) -> None:
        """Print a row of the table: an image more that is locked and unlocked, and what lockd has become."""
        acquire, release = await self.one_more(client)
        print(f"| {what} | {acquire:,.0f} µs | {release:,.0f} µs | {self.rss():.1f} MiB |", flush=True)

    async def run(self, clients: int) -> None:
        client = await self.register()
        print("| locks held | lock one more | unlock it | memory of lockd |\n|---|---:|---:|---:|")
        for share in (0, 4, 2, 1):
            count = self.locks // share if share else 0
            await self.take(client, count)
            await self.measure(client, f"{count:,}")
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(bare(self.run_dir)) for _ in range(clients)]
            for other in others:
                other.call("io.lockfs.Lockd.GetStatus")
                other.receive()
            await self.measure(client, f"{self.locks:,}, with {clients:,} clients more")
        state = (self.run_dir / "lockd.state").stat().st_size / 1024
        begin = time.perf_counter()
        os.kill(self.lockd(), signal.SIGKILL)
        await client.lost()
        await client.aclose()
        client = await self.come_back()
        started = time.perf_counter()
        parts = in_messages(self.held)
        for number, (images, fds) in enumerate(parts, 1):
            await client.call(m.HandOver(self.mount_id, images, number == len(parts)), m.HandedOver, fds)
        took = time.perf_counter() - started
        status, _ = await client.call(m.GetStatus(), m.Status)
        if status.locks != self.locks:
            raise RuntimeError(f"{status.locks} locks instead of {self.locks}")
        await self.measure(client, f"{self.locks:,}, after lockd was killed")
        print(
            f"\nWhen lockd was killed the next one knew the mount after {started - begin:.2f} s, and had taken up {self.locks:,} locks "
            f"after {took:.2f} s more.\nThe file that it keeps of them had {state:,.0f} KiB."
        )
        await client.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run lockd", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the locks and clients: a first impression")
    parser.add_argument("--locks", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--directory", default="/var/tmp", help="where to put the files (default: %(default)s)")
    arguments = parser.parse_args()
    share = 10 if arguments.quick else 1
    locks, clients = arguments.locks // share, arguments.clients // share
    raise_descriptor_limit()
    directory = Path(tempfile.mkdtemp(prefix="lockfs-bench.", dir=arguments.directory))
    run_dir = directory / "run"
    (directory / "images").mkdir()
    os.environ |= {"LOCKFS_RUN_DIR": str(run_dir), "LOCKFS_LOG": "file", "LOCKFS_IDLE_EXIT": "1"}
    try:
        print("lockd alone, backend fcntl-lockd (medians):\n")
        trio.run(Bench(run_dir, directory / "images", locks).run, clients)
    finally:
        processes.end(processes.of_run_dir(run_dir), signal.SIGTERM, 20)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
