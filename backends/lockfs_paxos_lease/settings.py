"""What the mount options say about leases, for each engine alike: their timing, where they lie, how they are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lockfs import text
from lockfs.backend import Context
from lockfs.errors import MountError
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.directory import LeaseDirectory
from lockfs_paxos_lease.disk.file import Storage
from lockfs_paxos_lease.engine.timing import DEFAULT_IO_TIMEOUT, Timing
from lockfs_paxos_lease.options import LIBVIRT, SANLOCK
from lockfs_paxos_lease.san.volume import Joined, LeaseVolume


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one share.  `leases` is a directory or a volume, empty for the default directory."""

    context: Context
    source: str
    timing: Timing
    leases: str
    host_id: int
    libvirt: bool

    @classmethod
    def of(cls, context: Context) -> Settings:
        """Return what the options of a share say.  Raises `MountError` for those that do not go together."""
        options = context.options
        leases, libvirt = str(options["leases"]), options["names"] == LIBVIRT
        timing = _timing(SANLOCK if options["engine"] == SANLOCK else options["takeover"], options["io_timeout"])
        if libvirt and not leases:
            raise MountError("names=libvirt needs leases=, which must be libvirt's disk_lease_dir")
        if libvirt and not timing.is_sanlock:
            raise MountError("names=libvirt needs takeover=sanlock: sanlock goes by no other timing")
        host_id = options["host_id"]
        source = text.from_bytes(context.source)
        return cls(context, source, timing, leases, host_id if isinstance(host_id, int) else 0, libvirt)

    def directory(self, storage: Storage) -> LeaseDirectory:
        """Return the directory of the leases."""
        return LeaseDirectory(
            storage, driver.boottime, self.timing, self.context.source_fd, self.source, self.leases,
            libvirt=self.libvirt,
        )  # fmt: skip

    def volume(self, storage: Storage, joined: Callable[[], Joined]) -> LeaseVolume:
        """Return the volume of the leases."""
        return LeaseVolume(storage, driver.boottime, self.timing, self.leases, joined)


def _timing(takeover: object, io_timeout: object) -> Timing:
    if isinstance(takeover, float) and takeover:
        return Timing.own(takeover)
    return Timing.sanlock(io_timeout if isinstance(io_timeout, int) else DEFAULT_IO_TIMEOUT)
