"""lockd with many locks and many clients: memory, time of one more lock, and how fast a successor takes all up.

    PYTHONPATH=tests python tests/bench/lockd.py [--locks 10000] [--clients 1000] [--dir DIRECTORY]

Needs no root and mounts nothing: it speaks to lockd as mount daemons do.
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

from lockfs.fs.session import Held, _parts
from lockfs.lockd.daemon import raise_descriptor_limit
from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient
from lockfs.protocol.start import ensure_lockd

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
        self.mount_id = (await client.register(m.Register(self.mount, mount_id=self.mount_id), self.top)).mount_id
        return client

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

    async def run(self, clients: int) -> None:
        client = await self.register()
        for share in (0, 4, 2, 1):
            count = self.locks // share if share else 0
            await self.take(client, count)
            acquire, release = await self.one_more(client)
            print(f"{count:6} held: acquire {acquire:6.0f} us, release {release:6.0f} us, lockd {self.rss():6.1f} MiB")
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(bare(self.run_dir)) for _ in range(clients)]
            for other in others:
                other.call("io.lockfs.Lockd.GetStatus")
                other.receive()
            acquire, release = await self.one_more(client)
            print(f"{clients:6} clients beside: acquire {acquire:6.0f} us, release {release:6.0f} us, lockd {self.rss():6.1f} MiB")
        state = self.run_dir / "lockd.state"
        print(f"state file: {state.stat().st_size / 1024:.0f} KiB")
        os.kill(self.lockd(), signal.SIGKILL)
        await client.lost()
        await client.aclose()
        begin = time.perf_counter()
        ensure_lockd(str(self.run_dir))
        started = time.perf_counter()
        client = await self.register()
        parts = _parts(self.held)
        for number, (images, fds) in enumerate(parts, 1):
            await client.call(m.HandOver(self.mount_id, images, number == len(parts)), m.HandedOver, fds)
        took = time.perf_counter() - started
        print(f"killed: the next one served after {started - begin:.3f} s, and had taken up {self.locks} locks after {took:.3f} s more")
        status, _ = await client.call(m.GetStatus(), m.Status)
        if status.locks != self.locks:
            raise RuntimeError(f"{status.locks} locks instead of {self.locks}")
        acquire, release = await self.one_more(client)
        print(f"{self.locks:6} taken up: acquire {acquire:6.0f} us, release {release:6.0f} us, lockd {self.rss():6.1f} MiB")
        await client.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locks", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--dir", default="/var/tmp", help="where, on a disk, the images are made")
    arguments = parser.parse_args()
    raise_descriptor_limit()
    directory = Path(tempfile.mkdtemp(prefix="lockfs-bench-", dir=arguments.dir))
    run_dir = directory / "run"
    (directory / "images").mkdir()
    os.environ |= {"LOCKFS_RUN_DIR": str(run_dir), "LOCKFS_LOG": "file", "LOCKFS_IDLE_EXIT": "1"}
    try:
        trio.run(Bench(run_dir, directory / "images", arguments.locks).run, arguments.clients)
    finally:
        processes.end(processes.of_run_dir(run_dir), signal.SIGTERM, 20)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
