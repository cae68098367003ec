"""Hosts with the real sanlock and hosts with lockfs on one lockspace, in a directory or on a volume."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lockfs_paxos_lease.cli import places
from lockfs_paxos_lease.format import rindex
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.size import Geometry
from t3_backends.lease_process import LeaseHost
from t3_backends.sanlock_daemon import Daemon

OPTIONS = {"takeover": "sanlock", "io_timeout": "1"}
DEAD = 68
"""Seconds after which a host is dead: 8 times io_timeout, and 60."""


class Cluster:
    """A share with one image, and hosts of both kinds.  *volume*: where the leases lie, if not in the share."""

    def __init__(self, storage: Path, tmp_path: Path, volume: str = "") -> None:
        self.storage = storage
        self.leases = storage / ".lockfs" / "leases"
        self._tmp_path = tmp_path
        self._volume = volume
        self.lockfs: list[LeaseHost] = []
        self.sanlock: list[Daemon] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def add_lockfs(self, name: str, **more: str) -> LeaseHost:
        """Have a host with lockfs join."""
        where = {"leases": self._volume} if self._volume else {}
        host = LeaseHost(name, self.storage, self._tmp_path / "run", **OPTIONS, **where, **more)
        self.lockfs.append(host)
        return host

    def add_sanlock(self, name: str, host_id: int) -> Daemon:
        """Have a host with sanlock join."""
        daemon = Daemon(name, self._tmp_path / name)
        self.sanlock.append(daemon)
        daemon.client("add_lockspace", "-s", f"{self.space}:{host_id}:{self.lockspace}:0", "-o", "1")
        return daemon

    def add(self, lockfs: Sequence[str], sanlock: Sequence[tuple[str, int]]) -> None:
        """Have several hosts join at once, a lockspace being there; each takes its time."""
        with ThreadPoolExecutor() as pool:
            joining = [pool.submit(self.add_lockfs, name) for name in lockfs]
            joining += [pool.submit(self.add_sanlock, *each) for each in sanlock]  # type: ignore[misc]
            for each in joining:
                each.result()

    @property
    def lockspace(self) -> str:
        """The file or device that has the lockspace at its start."""
        return self._volume or str(self.leases / "lockspace")

    def record(self, host_id: int) -> Leader:
        """Return what the storage says of a host."""
        sector = self._geometry.sector
        return Leader.decode(self._read((host_id - 1) * sector, sector))

    @property
    def _geometry(self) -> Geometry:
        return Leader.decode(self._read(0, 4096)).geometry

    def _read(self, offset: int, length: int) -> bytes:
        # As everybody does who uses leases: past the cache, which may have what is long overwritten.
        import mmap

        fd = os.open(self.lockspace, os.O_RDONLY | os.O_DIRECT)
        try:
            start = offset // 4096 * 4096
            with mmap.mmap(-1, 8192) as buffer:
                os.preadv(fd, [memoryview(buffer)], start)
                return bytes(buffer[offset - start : offset - start + length])
        finally:
            os.close(fd)

    @property
    def space(self) -> str:
        """The name of the lockspace."""
        return Leader.decode(self._read(0, 4096)).space_name.decode()

    @property
    def resource(self) -> str:
        """The one lease that there is, as sanlock is told it."""
        if not self._volume:
            (path,) = self.leases.glob("*.lease")
            return f"{self.space}:{path.stem}:{path}:0"
        align = self._geometry.align
        index = next(area.data for area in places.areas(places.parse(self._volume)) if area.offset == align)
        (entry,) = [entry for _, entry in rindex.entries(index, rindex.Header.decode(index)) if entry.name]
        return f"{self.space}:{entry.name.decode()}:{self._volume}:{entry.offset}"

    def hold_by_sanlock(self, daemon: Daemon, *command: str, shared: bool = False) -> subprocess.Popen[bytes]:
        """Have a program run under a lease of sanlock's."""
        child = daemon.command(self.resource + (":SH" if shared else ""), *command)
        self._children.append(child)
        return child

    def close(self) -> None:
        """End all."""
        for child in self._children:
            child.kill()
            child.wait()
        for daemon in self.sanlock:
            daemon.close()
        for host in self.lockfs:
            host.close()


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition; return how long it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() > begin + seconds:
            raise TimeoutError(f"after {seconds:g} s still waiting for {what}")
        time.sleep(0.05)
    return time.monotonic() - begin


def got(host: LeaseHost, mode: str = "exclusive") -> bool:
    """Try to get the image for a host with lockfs."""
    try:
        host.call("acquire", mode=mode)
    except RuntimeError as error:
        if "Busy" not in str(error):
            raise
        return False
    return True
